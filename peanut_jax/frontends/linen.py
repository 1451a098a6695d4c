"""The Linen side: dense modules add (x @ left) @ right to what they compute; dW is never formed.

Each pair is put beside its kernel in the 'params' collection, so that `nn.scan`, `nn.remat` and `nn.vmap` slice and
save it as they do the kernel, and a dense module finds its own pair whatever called it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from peanut_jax.adapters import Adapters, FactorTree, factors, with_saved
from peanut_jax.base.kernels import COLLECTION, named_conv1d, replace
from peanut_jax.methods.base import Config

LEFT, RIGHT = "peanut_left", "peanut_right"
DROPOUT_RNG = "dropout"


def bind(params: PyTree, pairs: FactorTree) -> PyTree:
    """`params` with every pair beside its kernel, as the leaves `peanut_left` and `peanut_right`."""
    leaves: dict[str, Array] = {}
    for path, (left, right) in pairs.items():
        module = path.removesuffix("kernel")
        leaves |= {module + LEFT: left, module + RIGHT: right}
    return replace(params, leaves)


@contextlib.contextmanager
def intercept(pairs: FactorTree, dropout: float = 0.0) -> Iterator[None]:
    """Inside this context, Linen modules add their pair's low-rank term to their output.

    Covers `nn.Dense`, `nn.DenseGeneral` with any axes, and HF's `FlaxConv1D`. A module takes the pair bound beside its
    kernel (see `bind`), else the one of its path. Inside `nn.scan` or `nn.vmap` only a bound pair is sliced with the
    kernel: `adapt` binds. Enter the context inside the function given to `jax.jit`: a function that was compiled
    before runs without it, which leaving the context reports.

    Args:
        pairs: Kernel path -> (left [*stack, d_in, r], right [*stack, r, d_out]), from `factors`.
        dropout: Rate for the input of the low-rank term, drawn from the modules' 'dropout' rng. Training only.

    Raises:
        ValueError: a kernel that was never called, by path; a pair that does not fit the module that runs; dropout
            without an rng.

    Example:
        with pj.intercept(pj.factors(adapters, params, config)):
            logits = model(**batch, params=params).logits
    """
    called: set[str] = set()

    def add(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return y
        path = "/".join((*module.path, "kernel"))
        if module.has_variable(COLLECTION, LEFT):
            pair = module.get_variable(COLLECTION, LEFT), module.get_variable(COLLECTION, RIGHT)
        elif path in pairs and module.has_variable(COLLECTION, "kernel"):
            pair = pairs[path]
        else:
            return y
        called.add(path)
        x = args[0] if args else kwargs["inputs"]
        if dropout:
            x = _dropout(x, dropout, module, path)
        return y + low_rank(module, x.astype(y.dtype), pair, path)

    with nn.intercept_methods(add):
        yield
    missing = [path for path in pairs if path not in called]
    if missing:
        raise ValueError(
            f"{len(missing)} adapted kernels were never called, so their update is not in the result: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Leave out modules that this call does not "
            "reach (exclude_modules), and enter intercept() inside the jitted function, not around it"
        )


def adapt(fn: Callable, config: Config, *, train: bool = False) -> Callable:
    """`fn(params, *args, **kwargs)` becomes `forward(adapters, params, *args, **kwargs)` of the adapted model.

    Pure: jit, grad, vmap, pmap and remat compose with it. Differentiate the first argument.

    Args:
        fn: Anything that calls Linen modules with `params`: `model.apply` of a Linen module, or a function around a HF
            Flax model.
        config: The adapter's config.
        train: True applies `config.dropout`, for which the model needs its 'dropout' rng. `make_train_step` does.

    Example:
        forward = jax.jit(pj.adapt(lambda params, ids: model(ids, params=params).logits, config))
        logits = forward(adapters, params, input_ids)
    """

    def forward(adapters: Adapters, params: PyTree, *args, **kwargs):
        pairs = factors(adapters, params, config)
        return with_pairs(fn, pairs, config.dropout if train else 0.0)(with_saved(params, adapters), *args, **kwargs)

    return forward


def with_pairs(fn: Callable, pairs: FactorTree, dropout: float = 0.0) -> Callable:
    """`fn`, called with `pairs` bound into its params and inside `intercept`."""

    def call(params: PyTree, *args, **kwargs):
        with intercept(pairs, dropout):
            return fn(bind(params, pairs), *args, **kwargs)

    return call


def low_rank(module: nn.Module, x: Float[Array, "*x"], pair: tuple[Array, Array], path: str) -> Float[Array, "*y"]:
    """(x @ left) @ right, contracted over the axes of x that the module contracts, in x's dtype.

    Raises:
        ValueError: a pair whose shapes are not the module's.
        NotImplementedError: a module that is no dense layer.
    """
    axis, batch_dims, features = _dense_axes(module, x, path)
    ins = tuple(x.shape[i] for i in axis)
    stack = tuple(x.shape[i] for i in batch_dims)
    left, right = pair
    r = left.shape[-1]
    expected = (*stack, math.prod(ins), r), (*stack, r, math.prod(features))
    if (left.shape, right.shape) != expected:
        raise ValueError(
            f"kernel {path!r}: the factors are {left.shape} and {right.shape}, but the module contracts {ins} into "
            f"{features}, so {expected[0]} and {expected[1]} were expected. Inside nn.scan use adapt(), which binds "
            "the factors; for DenseGeneral without a bias pass axes=kernel_axes(...) to init"
        )
    rest = tuple(i for i in range(x.ndim) if i not in axis and i not in batch_dims)
    x = x.transpose(*batch_dims, *rest, *axis)
    x = x.reshape(*x.shape[: len(stack) + len(rest)], left.shape[-2])
    y = _product(x, left.astype(x.dtype), right.astype(x.dtype), len(stack), module.precision)
    return y.reshape(*y.shape[:-1], *features)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x: Array, left: Array, right: Array, n_stack: int, precision: lax.PrecisionLike) -> Array:
    """(x @ left) @ right for x [*stack, *rest, d_in], left [*stack, d_in, r] and right [*stack, r, d_out].

    Its own backward pass, because in the derived one XLA on CPU transposes x and the cotangent of y, the two large
    arrays, to contract their tokens. Here only arrays with r columns are transposed; the barrier keeps XLA from
    simplifying that away.
    """
    return _times(_times(x, left, n_stack, precision), right, n_stack, precision)


def _product_forward(x: Array, left: Array, right: Array, n_stack: int, precision: lax.PrecisionLike):
    h = _times(x, left, n_stack, precision)
    return _times(h, right, n_stack, precision), (x, h, left, right)


def _product_backward(n_stack: int, precision: lax.PrecisionLike, saved: tuple[Array, ...], g: Array):
    x, h, left, right = saved
    d_h = _times(g, jnp.swapaxes(right, -1, -2), n_stack, precision)
    d_x = _times(d_h, jnp.swapaxes(left, -1, -2), n_stack, precision)
    d_left = lax.optimization_barrier(_over_tokens(d_h, x, n_stack, precision))
    return d_x, jnp.swapaxes(d_left, -1, -2), _over_tokens(h, g, n_stack, precision)


_product.defvjp(_product_forward, _product_backward)


def _times(x: Array, m: Array, n_stack: int, precision: lax.PrecisionLike) -> Array:
    """[*stack, *rest, i] by [*stack, i, j] -> [*stack, *rest, j]."""
    stack = tuple(range(n_stack))
    return lax.dot_general(x, m, (((x.ndim - 1,), (n_stack,)), (stack, stack)), precision=precision)


def _over_tokens(a: Array, b: Array, n_stack: int, precision: lax.PrecisionLike) -> Array:
    """[*stack, *rest, i] and [*stack, *rest, j] -> [*stack, i, j], summed over rest."""
    stack, rest = tuple(range(n_stack)), tuple(range(n_stack, a.ndim - 1))
    return lax.dot_general(a, b, ((rest, rest), (stack, stack)), precision=precision)


def _dense_axes(module: nn.Module, x: Array, path: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(contracted axes of x, batch axes of x, output features) of a dense module, all non-negative."""
    if isinstance(module, nn.DenseGeneral):
        axis, batch_dims, features = (
            tuple(v) if isinstance(v, (tuple, list)) else (v,)
            for v in (module.axis, module.batch_dims, module.features)
        )
        return tuple(i % x.ndim for i in axis), tuple(i % x.ndim for i in batch_dims), features
    if isinstance(module, nn.Dense) or (type(module).__name__ == "FlaxConv1D" and named_conv1d(path)):
        return (x.ndim - 1,), (), (module.features,)
    raise NotImplementedError(
        f"kernel {path!r} belongs to a {type(module).__name__}; PEANuT adapts nn.Dense, nn.DenseGeneral and "
        "GPT-2's FlaxConv1D (named c_attn, q_attn, c_proj, c_fc)"
    )


def _dropout(x: Array, rate: float, module: nn.Module, path: str) -> Array:
    if not module.has_rng(DROPOUT_RNG):
        raise ValueError(
            f"config.dropout={rate} needs a 'dropout' rng in training, and kernel {path!r} was called without one: "
            "pass rngs={'dropout': key} to apply, or dropout_rng=key, train=True to a HF Flax model"
        )
    keep = jax.random.bernoulli(module.make_rng(DROPOUT_RNG), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def kernel_axes(fn: Callable, params: PyTree, *args, **kwargs) -> dict[str, tuple[int, int]]:
    """(Input axes, output axes) of every dense kernel that `fn(params, *args, **kwargs)` calls, traced without running.

    Needed only for a model with `nn.DenseGeneral` kernels that have no bias: pass the result to `init`.

    Example:
        axes = pj.kernel_axes(model.apply, variables, tokens)
        adapters = pj.init(key, variables, config, axes=axes)
    """
    seen: dict[str, tuple[int, int]] = {}

    def record(next_fun, call_args, call_kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, (nn.Dense, nn.DenseGeneral)):
            general = isinstance(module, nn.DenseGeneral)
            counts = (_length(module.axis), _length(module.features)) if general else (1, 1)
            seen["/".join((*module.path, "kernel"))] = counts
        return next_fun(*call_args, **call_kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda p: fn(p, *args, **kwargs), params)
    return seen


def _length(value: int | Sequence[int]) -> int:
    return len(value) if isinstance(value, Sequence) else 1
