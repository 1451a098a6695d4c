"""Linen's dense layers: which axes of its input each contracts, and what an update adds to its output."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from peanut_jax.base.kernels import named_conv1d
from peanut_jax.matrices import float32_dot
from peanut_jax.updates import Update, map_with_axes, parts

DROPOUT_RNG = "dropout"
CONV1D = "FlaxConv1D"  # of HF's GPT-2 alone (transformers 4.57, models/gpt2/modeling_flax_gpt2.py)
# What a module's `dot_general` may be: any other product may not be linear in the kernel.
_PLAIN_PRODUCTS = (None, lax.dot_general, float32_dot)

Axes = tuple[int, ...]


def dense_class(module: nn.Module, kernel: str) -> type:
    """The dense layer that a module is, or is a subclass of.

    Args:
        kernel: Path of its kernel, for the error and to tell GPT-2's layers.

    Raises:
        NotImplementedError: it is not one.
    """
    for kind in type(module).__mro__:
        if kind in (nn.Dense, nn.DenseGeneral) or (kind.__name__ == CONV1D and named_conv1d(kernel)):
            return kind
    raise NotImplementedError(
        f"kernel {kernel!r} belongs to a {type(module).__name__}; PEANuT adapts nn.Dense, nn.DenseGeneral and "
        "GPT-2's FlaxConv1D (named c_attn, q_attn, c_proj, c_fc)"
    )


def is_own_call(context: Any, kind: type) -> bool:
    """Whether the method that an interceptor sees is that of the dense layer `kind`, and not a subclass's.

    Args:
        kind: From `dense_class`.
    """
    method = context.orig_method
    running = getattr(method, "func", getattr(method, "__func__", method))
    return running is inspect.unwrap(kind.__call__)


def added(
    module: nn.Module,
    x: Float[Array, "*x"],
    y: Float[Array, "*y"],
    updates: Sequence[Update],
    dropout: Sequence[float],
    kernel: str,
) -> Float[Array, "*y"]:
    """What the updates of a dense layer add to its output y, given its input x.

    Args:
        dropout: Rate for the input of each.
        kernel: Path of the kernel, for errors.

    Raises:
        ValueError: an update whose shapes are not the module's; dropout without an rng.
        NotImplementedError: a module with a product of its own.
    """
    product = getattr(module, "dot_general", None) or getattr(module, "dot_general_cls", None)
    if product not in _PLAIN_PRODUCTS:
        raise NotImplementedError(
            f"kernel {kernel!r} belongs to a {type(module).__name__} with dot_general={_name(product)}, and what that "
            "makes of W0 + dW is not known here: leave the module out (exclude_modules), or merge"
        )
    axis, batch_dims, features = _axes(module, x)
    stack, d_in, d_out = tuple(x.shape[i] for i in batch_dims), math.prod(x.shape[i] for i in axis), math.prod(features)
    rest = tuple(i for i in range(x.ndim) if i not in axis and i not in batch_dims)

    def as_matrix(x: Array) -> Array:
        x = x.transpose(*batch_dims, *rest, *axis)
        return x.reshape(*x.shape[: len(stack) + len(rest)], d_in)

    flat_y = y.reshape(*y.shape[: y.ndim - len(features)], d_out)
    total = None
    for update, rate in zip(updates, dropout, strict=True):
        for one in parts(update):
            _check_shapes(one, stack, d_in, d_out, kernel)
        dropped = _dropout(x, rate, module, kernel) if rate else x
        part = update(as_matrix(dropped.astype(y.dtype)), flat_y, module.precision)
        total = part if total is None else total + part
    assert total is not None  # nothing is bound empty
    return total.reshape(y.shape)


def _axes(module: Any, x: Array) -> tuple[Axes, Axes, Axes]:
    """(contracted axes of x, batch axes of x, output features) of a dense module, all non-negative."""
    if not isinstance(module, nn.DenseGeneral):
        return (x.ndim - 1,), (), (module.features,)
    axis, batch_dims, features = (_tuple(v) for v in (module.axis, module.batch_dims, module.features))
    # In the order of the kernel's rows: Flax sorts both (flax 0.12, `_normalize_axes` in linen/linear.py).
    return tuple(sorted(i % x.ndim for i in axis)), tuple(sorted(i % x.ndim for i in batch_dims)), features


def _check_shapes(update: Update, stack: Axes, d_in: int, d_out: int, kernel: str) -> None:
    sides = {"in": d_in, "out": d_out}  # and then the sizes of the method's own axes, as the first array has them
    wrong: list[str] = []

    def check(axes: tuple[str, ...], array: Array) -> Array:
        fits = array.shape[: len(stack)] == stack and array.ndim == len(stack) + len(axes)
        own = array.shape[len(stack) :]
        if not fits or any(sides.setdefault(word, size) != size for word, size in zip(axes, own, strict=True)):
            wrong.append(f"{array.shape} for {[*stack, *(sides.get(word, word) for word in axes)]}".replace("'", ""))
        return array

    map_with_axes(check, update)
    if wrong:
        raise ValueError(
            f"kernel {kernel!r}: the update's arrays are {', '.join(wrong)}, as the module asks. An nn.scan or nn.vmap "
            "must carry params on axis 0; for DenseGeneral without a bias set kernel_axes=peanut_jax.kernel_axes(...) "
            "in the config"
        )


def _dropout(x: Array, rate: float, module: nn.Module, kernel: str) -> Array:
    if not module.has_rng(DROPOUT_RNG):
        raise ValueError(
            f"config.dropout={rate} needs a 'dropout' rng in training, and kernel {kernel!r} was called without one: "
            "pass rngs={'dropout': key} to apply, or dropout_rng=key, train=True to a HF Flax model"
        )
    keep = jax.random.bernoulli(module.make_rng(DROPOUT_RNG), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def sides_of(module: nn.Module) -> tuple[int, int] | None:
    """How many of its kernel's axes are inputs and how many outputs, of a dense layer over the last axes of its input.

    None for any other module.
    """
    if isinstance(module, nn.DenseGeneral):
        axis = _tuple(module.axis)
        last = tuple(axis) == tuple(range(-len(axis), 0))
        return (len(axis), len(_tuple(module.features))) if last and not module.batch_dims else None
    return (1, 1) if isinstance(module, nn.Dense) or type(module).__name__ == CONV1D else None


def kernel_axes(fn: Callable, params: PyTree, *args, **kwargs) -> dict[str, tuple[int, int]]:
    """(Input axes, output axes) of every dense kernel that `fn(params, *args, **kwargs)` calls, traced without running.

    Needed only for a model with `nn.DenseGeneral` kernels that have no bias: make it the config's `kernel_axes`.

    Examples:
        >>> model = nn.DenseGeneral((2, 5), use_bias=False)
        >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> pj.kernel_axes(model.apply, params, jnp.ones((1, 4)))
        {'kernel': (1, 2)}
    """
    seen: dict[str, tuple[int, int]] = {}

    def record(next_fun, call_args, call_kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, (nn.Dense, nn.DenseGeneral)):
            general = isinstance(module, nn.DenseGeneral)
            counts = (len(_tuple(module.axis)), len(_tuple(module.features))) if general else (1, 1)
            seen["/".join((*module.path, "kernel"))] = counts
        return next_fun(*call_args, **call_kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda p: fn(p, *args, **kwargs), params)
    return seen


def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)
