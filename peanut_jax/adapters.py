"""The adapter pytree: one flat dict, kernel path -> theta, and path -> array for the leaves of saved modules."""

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from peanut_jax.base.kernels import Axes, Kernel, Leaf, flatten, replace
from peanut_jax.base.select import Target, saved_paths, select
from peanut_jax.methods import tweaker
from peanut_jax.methods.activations import ACTIVATIONS
from peanut_jax.methods.base import Config, LoraConfig, PeanutConfig

NOT_FINITE = "the base kernel holds a NaN or an infinity: {paths}"

Adapters = dict[str, tweaker.Theta | Array]
FactorTree = dict[str, tweaker.Factors]


def init(key: PRNGKeyArray, params: PyTree, config: Config, axes: Axes | None = None) -> Adapters:
    """A fresh adapter for `params`; with `init_weights=True` an exact no-op.

    Each kernel's key is folded from its path, so that adding a target changes no other draw.

    Args:
        key: A PRNG key.
        params: Frozen base parameters; tracers and `jax.eval_shape` are fine, and then values are not checked.
        config: What to adapt.
        axes: From `kernel_axes`; only DenseGeneral kernels without a bias need it.

    Returns:
        Kernel path -> theta (float32, layer axes leading), and path -> array for saved modules, copied as they are.

    Raises:
        ValueError: bad params or config (see `select`); a targeted kernel with a NaN or an infinity, by path.
        NotImplementedError: a target that is no dense kernel.

    Example:
        adapters = pj.init(jax.random.key(0), params, pj.PeanutConfig(r=8, target_modules=["query", "value"]))
    """
    flat = flatten(params)
    targets = select(params, config, axes)
    check_finite({path: flat[path] for path in targets}, NOT_FINITE)
    adapters: Adapters = {}
    for path, target in targets.items():
        zero_b = config.init_weights if isinstance(config, PeanutConfig) else True
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        adapters[path] = tweaker.init(path_key, theta_shapes(target.kernel, config), target.stack, zero_b)
    for path in saved_paths(flat, config):
        adapters[path] = jnp.array(flat[path])
    return adapters


def factors(adapters: Adapters, params: PyTree, config: Config) -> FactorTree:
    """The low-rank update of every adapted kernel: path -> (left [*stack, d_in, r], right [*stack, r, d_out]).

    dW = left @ right, with `scaling` folded in. A pure function, cheap beside a forward pass, and the only one that
    knows the method; everything else sees pairs. Rows of a layer stack that are not adapted hold zeros.

    Raises:
        ValueError: if `adapters` does not belong to this config and these params, naming the leaves.
    """
    flat = flatten(params)
    targets = check(adapters, params, config)
    return {path: _scattered_pair(adapters[path], flat[path], target, config) for path, target in targets.items()}


def pair(theta: tweaker.Theta, kernel: Float[Array, "*layers d_in d_out"], config: Config) -> tweaker.Factors:
    """(left [*layers, d_in, r], right [*layers, r, d_out]) of one kernel. Nothing else knows the method."""
    act = ACTIVATIONS[config.act_fn]
    if isinstance(config, LoraConfig):
        return tweaker.lora_factors(theta, act=act, scaling=config.scaling)
    return tweaker.factors(kernel, theta, act=act, scaling=config.scaling, orientation=config.orientation)


def _scattered_pair(theta: tweaker.Theta | Array, stored: Leaf, target: Target, config: Config) -> tweaker.Factors:
    assert isinstance(theta, dict)  # check() has been here
    left, right = pair(theta, target.matrix(stored), config)
    if target.rows is None:
        return left, right
    layers = target.kernel.stack[0]
    return _scatter(left, target.rows, layers), _scatter(right, target.rows, layers)


def combine(*trees: FactorTree) -> FactorTree:
    """Several adapters at once: the sum of their updates, each computed from the original W0, as one set of pairs."""
    return {
        path: (
            jnp.concatenate([tree[path][0] for tree in trees if path in tree], axis=-1),
            jnp.concatenate([tree[path][1] for tree in trees if path in tree], axis=-2),
        )
        for path in dict.fromkeys(path for tree in trees for path in tree)
    }


def merge(params: PyTree, adapters: Adapters, config: Config) -> PyTree:
    """W0 + dW in a new tree of the same kind, with the saved modules in place; `params` stays as it is.

    Summed in float32 at full matmul precision, then rounded once to the kernel's dtype. There is no way back by
    subtraction, since dW depends on W0: keep `params`.

    Raises:
        ValueError: an adapter that does not belong here; "NaNs detected in the merged weights", naming the kernels.
    """
    flat = flatten(params)
    targets = check(adapters, params, config)
    merged = {}
    with jax.default_matmul_precision("highest"):
        for path, target in targets.items():
            update = tweaker.delta(*_scattered_pair(adapters[path], flat[path], target, config))
            total = flat[path].astype(jnp.float32) + target.kernel.stored(update)
            merged[path] = total.astype(flat[path].dtype)
    check_finite(merged, "NaNs detected in the merged weights; the adapter or the base is broken at {paths}")
    return replace(params, {**merged, **saved(adapters)})


def with_saved(params: PyTree, adapters: Adapters) -> PyTree:
    """`params` with the leaves of the saved modules put in."""
    leaves = saved(adapters)
    return replace(params, leaves) if leaves else params


def saved(adapters: Adapters) -> dict[str, Array]:
    """The leaves of the saved modules, by path."""
    return {path: value for path, value in adapters.items() if not isinstance(value, Mapping)}


def labels(adapters: Adapters) -> PyTree:
    """The same tree with "adapter" or "saved" for each leaf, for `optax.partition`."""

    def label(value: tweaker.Theta | Array) -> PyTree:
        return dict.fromkeys(value, "adapter") if isinstance(value, Mapping) else "saved"

    return {path: label(value) for path, value in adapters.items()}


def count(adapters: Adapters) -> int:
    """Trainable parameters: theta and the saved modules."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def check(adapters: Adapters, params: PyTree, config: Config) -> dict[str, Target]:
    """The targets of `adapters`, once its paths and shapes are what `config` asks of `params`.

    Raises:
        ValueError: naming the leaves that are missing, not expected, or of another shape.
    """
    if not isinstance(adapters, Mapping):
        raise ValueError(f"adapters must be the mapping that init returns, got {type(adapters).__name__}")
    flat = flatten(params)
    targets = select(params, config, _axes_of(adapters, flat, config))
    wanted = {
        (path, name): target.stack + shape
        for path, target in targets.items()
        for name, shape in theta_shapes(target.kernel, config).items()
    } | {(path, ""): tuple(flat[path].shape) for path in saved_paths(flat, config)}
    given = {
        (path, name): tuple(leaf.shape)
        for path, value in adapters.items()
        for name, leaf in (value.items() if isinstance(value, Mapping) else [("", value)])
    }
    problems = [
        *(f"{_name(leaf)} is missing" for leaf in wanted if leaf not in given),
        *(f"{_name(leaf)} is not asked for" for leaf in given if leaf not in wanted),
        *(
            f"{_name(leaf)} is {given[leaf]}, expected {shape}"
            for leaf, shape in wanted.items()
            if leaf in given and given[leaf] != shape
        ),
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the adapter does not fit this config and these params: {'; '.join(problems[:5])}{more}")
    return targets


def theta_shapes(kernel: Kernel, config: Config) -> tweaker.Shapes:
    """The shapes of one kernel's theta, without layer axes."""
    if isinstance(config, LoraConfig):
        return tweaker.lora_shapes(kernel.d_in, kernel.d_out, config.r)
    return tweaker.shapes(kernel.d_in, kernel.d_out, config.r, config.depth, config.orientation)


def _axes_of(adapters: Adapters, flat: Mapping[str, Leaf], config: Config) -> Axes:
    """How theta, made once by `init`, divides the axes of each kernel that has more than two."""
    axes = {}
    for path, theta in adapters.items():
        if not isinstance(theta, Mapping) or path not in flat or flat[path].ndim == 2 or not {"a", "b"} <= set(theta):
            continue
        shape, n_stack = flat[path].shape, theta["a"].ndim - 2
        d_out = theta["b"].shape[-1]
        reads_output = not isinstance(config, LoraConfig) and config.orientation == "input"
        for n_out in range(1, len(shape) - n_stack):
            outs, ins = shape[len(shape) - n_out :], shape[n_stack : len(shape) - n_out]
            side = ins if reads_output else outs
            if math.prod(side) == d_out:
                axes[path] = (len(ins), n_out)
                break
    return axes


def _scatter(side: Array, rows: tuple[int, ...], layers: int) -> Array:
    return jnp.zeros((layers, *side.shape[1:]), side.dtype).at[jnp.array(rows)].set(side)


def check_finite(arrays: Mapping[str, Leaf], message: str) -> None:
    """Raises for concrete arrays that are not finite; tracers and abstract shapes have no values to check."""
    known = (jax.Array, np.ndarray)
    concrete = {p: a for p, a in arrays.items() if isinstance(a, known) and not isinstance(a, jax.core.Tracer)}
    finite = jax.device_get({path: jnp.isfinite(a).all() for path, a in concrete.items()})
    bad = [path for path, ok in finite.items() if not ok]
    if bad:
        raise ValueError(
            message.format(paths=", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else ""))
        )


def _name(leaf: tuple[str, str]) -> str:
    path, name = leaf
    return f"{path!r} {name}".rstrip()
