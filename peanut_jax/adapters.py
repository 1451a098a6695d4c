"""The adapter pytree: one flat dict, kernel path -> theta, and path -> array for the leaves of saved modules."""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from peanut_jax import tweaker
from peanut_jax.activations import ACTIVATIONS
from peanut_jax.config import AdapterConfig, LoraConfig, PeanutConfig
from peanut_jax.kernels import Axes, flatten, replace
from peanut_jax.targets import Target, saved_paths, select

Adapters = dict[str, tweaker.Theta | Array]
FactorTree = dict[str, tweaker.Factors]


def init(key: PRNGKeyArray, params: PyTree, config: AdapterConfig, axes: Axes | None = None) -> Adapters:
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
    _check_finite({path: flat[path] for path in targets}, "the base kernel holds a NaN or an infinity: {paths}")
    adapters: Adapters = {}
    for path, target in targets.items():
        zero_b = config.init_weights if isinstance(config, PeanutConfig) else True
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        adapters[path] = tweaker.init(path_key, _shapes(target, config), target.stack, zero_b)
    for path in saved_paths(flat, config):
        adapters[path] = jnp.array(flat[path])
    return adapters


def factors(adapters: Adapters, params: PyTree, config: AdapterConfig) -> FactorTree:
    """The low-rank update of every adapted kernel: path -> (left [*stack, d_in, r], right [*stack, r, d_out]).

    dW = left @ right, with `scaling` folded in. A pure function, cheap beside a forward pass, and the only one that
    knows the method; everything else sees pairs. Rows of a layer stack that are not adapted hold zeros.

    Raises:
        ValueError: if `adapters` does not belong to this config and these params, naming the leaves.
    """
    flat = flatten(params)
    targets = check(adapters, params, config)
    act = ACTIVATIONS[config.act_fn]

    def pair(path: str, target: Target) -> tweaker.Factors:
        theta = adapters[path]
        if isinstance(config, LoraConfig):
            left, right = tweaker.lora_factors(theta, act=act, scaling=config.scaling)
        else:
            kernel = target.kernel.matrix(flat[path])
            kernel = kernel if target.rows is None else kernel[jnp.array(target.rows)]
            left, right = tweaker.factors(
                kernel, theta, act=act, scaling=config.scaling, orientation=config.orientation
            )
        if target.rows is None:
            return left, right
        return tuple(_scatter(side, target.rows, target.kernel.stack[0]) for side in (left, right))

    return {path: pair(path, target) for path, target in targets.items()}


def combine(*trees: FactorTree) -> FactorTree:
    """Several adapters at once: the sum of their updates, each computed from the original W0, as one set of pairs."""
    return {
        path: (
            jnp.concatenate([tree[path][0] for tree in trees if path in tree], axis=-1),
            jnp.concatenate([tree[path][1] for tree in trees if path in tree], axis=-2),
        )
        for path in dict.fromkeys(path for tree in trees for path in tree)
    }


def merge(params: PyTree, adapters: Adapters, config: AdapterConfig) -> PyTree:
    """W0 + dW in a new tree of the same kind, with the saved modules in place; `params` stays as it is.

    Summed in float32 at full matmul precision, then rounded once to the kernel's dtype. There is no way back by
    subtraction, since dW depends on W0: keep `params`.

    Raises:
        ValueError: an adapter that does not belong here; "NaNs detected in the merged weights", naming the kernels.
    """
    flat = flatten(params)
    with jax.default_matmul_precision("highest"):
        pairs = factors(adapters, params, config)
    kernels = {path: target.kernel for path, target in check(adapters, params, config).items()}
    merged = {}
    for path, (left, right) in pairs.items():
        update = kernels[path].stored(tweaker.delta(left, right))
        merged[path] = (flat[path].astype(jnp.float32) + update).astype(flat[path].dtype)
    _check_finite(merged, "NaNs detected in the merged weights; the adapter or the base is broken at {paths}")
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
    return {
        path: jax.tree.map(lambda _, label=("adapter" if isinstance(value, Mapping) else "saved"): label, value)
        for path, value in adapters.items()
    }


def count(adapters: Adapters) -> int:
    """Trainable parameters: theta and the saved modules."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def check(adapters: Adapters, params: PyTree, config: AdapterConfig) -> dict[str, Target]:
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
        for name, shape in _shapes(target, config).items()
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


def _shapes(target: Target, config: AdapterConfig) -> tweaker.Shapes:
    kernel = target.kernel
    if isinstance(config, LoraConfig):
        return tweaker.lora_shapes(kernel.d_in, kernel.d_out, config.r)
    return tweaker.shapes(kernel.d_in, kernel.d_out, config.r, config.depth, config.orientation)


def _axes_of(adapters: Adapters, flat: Mapping[str, Array], config: AdapterConfig) -> Axes:
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
            if _product(side) == d_out:
                axes[path] = (len(ins), n_out)
                break
    return axes


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _scatter(side: Array, rows: tuple[int, ...], layers: int) -> Array:
    return jnp.zeros((layers, *side.shape[1:]), side.dtype).at[jnp.array(rows)].set(side)


def _check_finite(arrays: Mapping[str, Array], message: str) -> None:
    """Raises for concrete arrays that are not finite; tracers and abstract shapes have no values to check."""
    concrete = {path: a for path, a in arrays.items() if isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer)}
    finite = jax.device_get({path: jnp.isfinite(a).all() for path, a in concrete.items()})
    bad = [path for path, ok in finite.items() if not ok]
    if bad:
        raise ValueError(message.format(paths=", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")))


def _name(leaf: tuple[str, str]) -> str:
    path, name = leaf
    return f"{path!r} {name}".rstrip()
