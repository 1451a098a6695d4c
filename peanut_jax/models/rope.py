"""Rotary embeddings: what a checkpoint's config says of them, their frequencies, and the rotation.

References:
    transformers 4.57, `modeling_rope_utils.py`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Rope type -> the fields that it needs.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: `type` is "default", "linear" or "llama3"; the last three fields are llama3's."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def read_rope(fields: Mapping[str, Any]) -> Rope:
    """The rotary embedding that the fields of a config.json mean.

    transformers 4 keeps rope_theta beside rope_scaling; 5 puts both into rope_parameters.

    Raises:
        ValueError: a type that is not supported, a field that is missing or not a positive number.
    """
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(raw, Mapping):
        raise ValueError(f"rope_scaling must be an object, got {raw!r}")
    given = dict(raw)
    if given.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor={given['partial_rotary_factor']!r} is not supported (supported: 1)")
    theta = given.pop("rope_theta", fields.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _FIELDS:
        raise ValueError(f"rope type {kind!r} is not supported, only {', '.join(_FIELDS)}")
    if missing := [name for name in _FIELDS[kind] if name not in given]:
        raise ValueError(f"rope type {kind!r} needs {missing[0]}")
    own = {name: given[name] for name in _FIELDS[kind]}
    for name, value in {"rope_theta": theta, **own}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return Rope(theta=float(theta), type=kind, **own)


def inverse_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair of dimensions."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        inverse = inverse / rope.factor
    elif rope.type == "llama3":
        wavelength = 2 * math.pi / inverse
        turns = rope.original_max_position_embeddings / wavelength
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        inverse = (1 - smooth) * inverse / rope.factor + smooth * inverse
    return inverse.astype(np.float32)


def rotate(x: Float[Array, "batch seq heads head_dim"], positions: Int[Array, "batch seq"], rope: Rope) -> Array:
    """Rotary embedding, halves rotated against each other as transformers lays them out; computed in float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, x.shape[-1])
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
