"""Rotary embeddings: what a checkpoint's config says of them, their frequencies, and the rotation.

References:
    transformers 4.57, `modeling_rope_utils.py`.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peanut_jax.messages import short
from peanut_jax.models.config_fields import number, size

# Rope type -> the fields that it needs.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# What says that there is a rope, and nothing more: transformers 4's name of the type, 5's, and 5's place of the base.
_NAMES = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
# Beyond them the frequencies are not numbers in float32; published models have a theta of up to 1e9.
_SMALLEST, _LARGEST = 1e-6, 1e15


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

    transformers 4 keeps rope_theta beside rope_scaling; 5 puts both into rope_parameters. A file may hold both, where
    they say the same.

    Raises:
        ValueError: a type that is not supported, a field that is missing or not a positive number, two places that
            contradict each other.
    """
    theta = fields.get("rope_theta")
    if theta is not None:
        theta = _positive("rope_theta", theta)
    given = {name: fields[name] for name in ("rope_parameters", "rope_scaling") if fields.get(name) is not None}
    read = {name: _read(name, value, theta) for name, value in given.items()}
    if len(read) == 2 and read["rope_parameters"] != read["rope_scaling"]:
        raise ValueError(
            f"rope_parameters={short(given['rope_parameters'])} and rope_scaling={short(given['rope_scaling'])} "
            "contradict each other; keep the one that the model was trained with"
        )
    return next(iter(read.values()), Rope() if theta is None else Rope(theta))


def _read(place: str, value: Any, theta: float | None) -> Rope:
    """The rotary embedding of one object.

    Args:
        place: The field that holds it.
        theta: The rope_theta beside it.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} must be an object, got {short(value)}")
    nested = next((name for name, own in value.items() if isinstance(own, Mapping)), None)
    if nested is not None:
        raise ValueError(f"{place} by type of layer ({short(nested)}) is not supported, only one for all layers")
    if value.get("partial_rotary_factor") not in (1, None):
        raise ValueError(
            f"partial_rotary_factor={short(value['partial_rotary_factor'])} is not supported (supported: 1)"
        )
    own = theta if value.get("rope_theta") is None else _positive("rope_theta", value["rope_theta"])
    if theta not in (None, own):
        raise ValueError(f"rope_theta={theta} and the rope_theta={own} of {place} contradict each other")
    kind = _kind(place, value)
    needed = _FIELDS[kind]
    if missing := [name for name in needed if value.get(name) is None]:
        raise ValueError(f"rope type {kind!r} needs {missing[0]}")
    rope = Rope(Rope.theta if own is None else own, kind, **{name: _positive(name, value[name]) for name in needed})
    if not rope.low_freq_factor < rope.high_freq_factor:
        raise ValueError(
            f"low_freq_factor={rope.low_freq_factor} must be below high_freq_factor={rope.high_freq_factor}"
        )
    return rope


def _kind(place: str, value: Mapping[str, Any]) -> str:
    """The type of an object's rope, which both versions' names give alike."""
    named = {name: value[name] for name in ("rope_type", "type") if value.get(name) is not None}
    for kind in named.values():
        if not isinstance(kind, str) or kind not in _FIELDS:
            raise ValueError(f"rope type {short(kind)} is not supported, only {', '.join(_FIELDS)}")
    if len(set(named.values())) > 1:
        both = f"rope_type={named['rope_type']!r} and type={named['type']!r}"
        raise ValueError(f"{both} of {place} contradict each other")
    if not named and (other := [name for name in value if name not in _NAMES]):
        raise ValueError(f"{place} has {short(other[0])} and lacks rope_type, one of {', '.join(_FIELDS)}")
    return next(iter(named.values()), "default")


def _positive(name: str, value: Any) -> Any:
    if name == "original_max_position_embeddings":
        return size(name, value)
    found = number(name, value, "above 0", sys.float_info.min, sys.float_info.max)
    if not _SMALLEST <= found <= _LARGEST:
        raise ValueError(f"{name} must be between {_SMALLEST:g} and {_LARGEST:g}, got {short(value)}")
    return found


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
