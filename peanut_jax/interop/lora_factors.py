"""One module's update as LoRA's factors, and the config of a LoRA that every engine reads alike."""

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peanut_jax.base.digest import digest, hexadecimal
from peanut_jax.matrices import Plain
from peanut_jax.methods.base import AdapterConfig, Method, Theta
from peanut_jax.methods.lora import LoraConfig
from peanut_jax.updates import KernelUpdate, LowRank


def tensor_update(
    tensor: Float[np.ndarray, "rows columns"],
    bias: Float[np.ndarray, " d_out"] | None,
    theta: Mapping[str, np.ndarray],
    config: Method,
    dtype: str,
    conv1d: bool,
) -> tuple[KernelUpdate, str]:
    """The update, and the fingerprint, of a kernel that torch keeps as `tensor`, read in `dtype`.

    Args:
        conv1d: The tensor is [d_in, d_out], as GPT-2's; a Linear's is [d_out, d_in].
    """
    with jax.default_matmul_precision("highest"):
        update, found = _tensor_update(tensor, bias, theta, config, dtype, conv1d)
    return update, hexadecimal(jax.device_get(found))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _tensor_update(
    tensor: Array, bias: Array | None, theta: Theta, config: Method, dtype: str, conv1d: bool
) -> tuple[KernelUpdate, Array]:
    kernel = (tensor if conv1d else tensor.T).astype(dtype)
    return config.update(theta, Plain(kernel), bias), digest(kernel)


def kernel_update(theta: Theta, kernel: Array, bias: Array | None, config: Method) -> KernelUpdate:
    """The update of a kernel as Flax keeps it."""
    with jax.default_matmul_precision("highest"):
        return _kernel_update(theta, kernel, bias, config)


@partial(jax.jit, static_argnums=3)
def _kernel_update(theta: Theta, kernel: Array, bias: Array | None, config: Method) -> KernelUpdate:
    return config.update(theta, Plain(kernel), bias)


def as_lora(update: KernelUpdate, name: str, rank: int) -> Theta:
    """left and right as LoRA's A [*stack, d_in, rank] and B [*stack, rank, d_out], with zeros where its own rank ends.

    Raises:
        ValueError: an update that is not low-rank; one that is not finite.
    """
    if not isinstance(update, LowRank):
        raise ValueError(
            f"the update of {name!r} is a {type(update).__name__}, not low-rank, so it is not a LoRA; merge it instead "
            "(peanut-jax merge)"
        )
    if not all(bool(jnp.isfinite(side).all()) for side in update):
        raise ValueError(f"NaNs detected in the factors of {name!r}: the adapter or the base is broken there")
    stack, more = [(0, 0)] * (update.left.ndim - 2), (0, rank - update.left.shape[-1])
    return {"a": jnp.pad(update.left, [*stack, (0, 0), more]), "b": jnp.pad(update.right, [*stack, more, (0, 0)])}


def lora_config(config: Method, rank: int) -> LoraConfig:
    """The LoRA of the same modules with this rank; the scaling is in the factors, so that lora_alpha = r.

    Raises:
        ValueError: a method without a rank.
    """
    if not {"r", "scaling"} <= vars(config).keys():
        raise ValueError(
            f"an adapter of {type(config).__name__} has no rank, so it is not a LoRA; merge it instead (peanut-jax "
            "merge), or keep it as it is"
        )
    shared = [field.name for field in dataclasses.fields(AdapterConfig)]
    return LoraConfig(r=rank, scaling=1.0, **{name: getattr(config, name) for name in shared})


def listed(config: LoraConfig, modules: Collection[str]) -> LoraConfig:
    """`config` with target_modules as a list: of `modules` where it is a regular expression or left to the reader."""
    if isinstance(config.target_modules, tuple):
        return config
    return dataclasses.replace(
        config,
        target_modules=tuple(sorted(modules)),
        exclude_modules=None,
        layers_pattern=None,
        layers_to_transform=None,
    )


def is_plain(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a LoRA's adapter_config.json say what every engine reads alike."""
    alpha = float(fields.get("lora_alpha", 8))  # PEFT's default
    patterns = any(fields.get(name) for name in ("rank_pattern", "alpha_pattern", "use_rslora"))
    return alpha.is_integer() and not patterns and isinstance(fields.get("target_modules"), list)
