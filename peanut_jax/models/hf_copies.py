"""Copies of transformers' Flax modules in which a function is another one, while the originals stay as they are.

A Linen module finds what it calls among the names of its source file, where nothing can reach from outside but a patch
of the whole process. So that file is run once more under another name, and the class that `hf.load` returns builds its
modules from there. Classes that are not Linen modules, such as the outputs, are the original's in both.
"""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.attention import dot_product_attention_weights

_LEVELS = 2**16  # of the dropout rate

Change = Callable[[types.ModuleType], None]


def calls_attention_weights(model_class: Any) -> bool:
    """Whether the modules of a `FlaxPreTrainedModel` class leave attention dropout to Flax."""
    return hasattr(_source(model_class), dot_product_attention_weights.__name__)


def masks_each_row(copy: types.ModuleType) -> None:
    """Has attention dropout draw a mask for each row and head, as PyTorch does, and not one for the whole batch."""
    setattr(copy, _weights.__name__, _weights)


@functools.wraps(dot_product_attention_weights)
def _weights(
    query: jax.Array,
    key: jax.Array,
    *,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    broadcast_dropout: bool = True,
    **kwargs: Any,
) -> jax.Array:
    weights = dot_product_attention_weights(query, key, deterministic=True, **kwargs)
    if deterministic or dropout_rate == 0:
        return weights
    dropped = round(dropout_rate * _LEVELS)  # what is kept is scaled by this very rate, so that the mean stays
    keep = _random16(dropout_rng, weights.shape) >= dropped
    return jnp.where(keep, weights * (_LEVELS / max(_LEVELS - dropped, 1)), 0)


def _random16(key: Any, shape: tuple[int, ...]) -> jax.Array:
    """Integers in [0, 2**16): two a word of random bits, as `jax.random.bits` spends more on 16 bits than on 32."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*shape[:-1], -1)
    return halves[..., : shape[-1]].astype(jnp.int32)


@functools.cache
def rebuilt(model_class: Any, changes: tuple[Change, ...]) -> Any:
    """The class of the same name whose modules come from a copy of their source file.

    Args:
        model_class: A `FlaxPreTrainedModel` class.
        changes: Each changes the copy in place.
    """
    copy = _copy(_source(model_class), changes)
    module_class = getattr(copy, model_class.module_class.__name__)
    body = {"module_class": module_class, "__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (model_class,), body)


def _source(model_class: Any) -> types.ModuleType:
    return sys.modules[model_class.module_class.__module__]


@functools.cache
def _copy(source: types.ModuleType, changes: tuple[Change, ...]) -> types.ModuleType:
    spec: Any = source.__spec__
    copy = types.ModuleType("_".join((source.__name__, "with", *(change.__name__ for change in changes))))
    copy.__package__, copy.__file__, copy.__spec__ = source.__package__, source.__file__, spec
    sys.modules[copy.__name__] = copy  # where dataclasses look for the names of annotations
    exec(spec.loader.get_code(source.__name__), vars(copy))
    for name, value in vars(source).items():
        if isinstance(value, type) and not issubclass(value, nn.Module):
            setattr(copy, name, value)
    for change in changes:
        change(copy)
    return copy
