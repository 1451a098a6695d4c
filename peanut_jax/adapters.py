"""An adapter: what is trained for each kernel, and the leaves of the modules that are trained in full."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey
from jaxtyping import Array, PRNGKeyArray, PyTree

from peanut_jax.base.kernels import Leaf, flatten, replace
from peanut_jax.base.select import Target, saved_paths, select
from peanut_jax.matrices import Plain
from peanut_jax.methods.base import Method, Theta, checked
from peanut_jax.updates import KernelUpdate, LowRank, Updates, scattered

NOT_FINITE = "the base kernel holds a NaN or an infinity: {paths}"


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class Adapters:
    """What is trained. A pytree that flattens as one mapping of both fields would, sorted by path.

    Attributes:
        theta: Kernel path -> name -> float32 array, layer axes leading.
        saved: Path -> array, of the leaves of the saved modules.
    """

    theta: dict[str, Theta]
    saved: dict[str, Array]

    def tree_flatten_with_keys(self) -> tuple[list[tuple[DictKey, Any]], tuple[tuple[str, bool], ...]]:
        """Children by path, and which of them are thetas."""
        paths = sorted({*self.theta, *self.saved})
        children = [(DictKey(path), self.theta[path] if path in self.theta else self.saved[path]) for path in paths]
        return children, tuple((path, path in self.theta) for path in paths)

    @classmethod
    def tree_unflatten(cls, kinds: tuple[tuple[str, bool], ...], children: Any) -> "Adapters":
        """The inverse."""
        parts: tuple[dict, dict] = {}, {}
        for (path, is_theta), child in zip(kinds, children, strict=True):
            parts[0 if is_theta else 1][path] = child
        return cls(*parts)


def init(key: PRNGKeyArray, params: PyTree, config: Method) -> Adapters:
    """A fresh adapter for `params`: an exact no-op unless the config asks for another start.

    Each kernel's key is folded from its path, so that adding a target changes no other draw.

    Args:
        key: A PRNG key.
        params: Frozen base parameters; tracers are fine, and `jax.ShapeDtypeStruct`s for a method whose start does not
            read the kernel, and then values are not checked.
        config: What to adapt, and how.

    Returns:
        Float32 thetas, and copies of the saved modules as they are.

    Raises:
        ValueError: bad params or config (see `select`); a targeted kernel with a NaN or an infinity, by path; a
            key that is not a PRNG key.
        NotImplementedError: a target that is not a dense kernel.

    Examples:
        >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
        >>> adapters = pj.init(jax.random.key(0), params, pj.PeanutConfig(r=2, target_modules=["query"]))
        >>> jax.tree.map(jnp.shape, adapters.theta)
        {'query/kernel': {'a': (6, 2), 'b': (2, 6)}}
    """
    check_key(key)
    flat = flatten(params)
    targets = select(params, checked(config))
    check_finite({path: flat[path] for path in targets}, NOT_FINITE)
    theta = {
        path: config.start(jax.random.fold_in(key, zlib.crc32(path.encode())), _matrix(target, flat[path]))
        for path, target in targets.items()
    }
    return Adapters(theta, {path: jnp.array(flat[path]) for path in saved_paths(flat, config)})


def _matrix(target: Target, stored: Leaf) -> Plain:
    """The kernel as a method reads it; its shape alone where no more is known."""
    return Plain((target.shape_of if isinstance(stored, jax.ShapeDtypeStruct) else target.matrix)(stored))


def compute_updates(adapters: Adapters, params: PyTree, config: Method) -> Updates:
    """The update of every adapted kernel, by path: what the front end binds, and what is merged and exported.

    A pure function, cheap beside a forward pass. Rows of a layer stack that are not adapted hold zeros.

    Raises:
        ValueError: if `adapters` does not belong to this config and these params, naming the leaves.
    """
    targets, flat = check(adapters, params, config), flatten(params)
    return {path: _update(adapters.theta[path], flat, target, config) for path, target in targets.items()}


def factors(adapters: Adapters, params: PyTree, config: Method) -> dict[str, LowRank]:
    """As `compute_updates`, of a method whose updates are low-rank: dW = left @ right, with `scaling` folded in.

    Returns:
        Kernel path -> (left [*stack, d_in, r], right [*stack, r, d_out]).

    Raises:
        ValueError: as `compute_updates`; an update that is not low-rank.
    """
    found: dict[str, LowRank] = {}
    for path, update in compute_updates(adapters, params, config).items():
        if not isinstance(update, LowRank):
            raise ValueError(
                f"the update of {path!r} is a {type(update).__name__}, which has no factors left @ right; use "
                "peanut_jax.compute_updates, or merge"
            )
        found[path] = update
    return found


def _update(theta: Theta, flat: Mapping[str, Leaf], target: Target, config: Method) -> KernelUpdate:
    kernel = Plain(target.matrix(flat[target.kernel.path]))
    update = config.update(theta, kernel, target.bias(flat))
    return update if target.rows is None else scattered(update, target.rows, target.kernel.stack[0])


def merge(params: PyTree, adapters: Adapters, config: Method) -> PyTree:
    """W0 + dW in a new tree of the same kind, with the saved modules in place; `params` stays as it is.

    Summed in float32 at full matmul precision, then rounded once to the kernel's dtype. There is no way back by
    subtraction, since dW depends on W0: keep `params`.

    Raises:
        ValueError: an adapter that does not belong here; "NaNs detected in the merged weights", naming the kernels.
    """
    targets, flat = check(adapters, params, config), flatten(params)
    merged = {}
    with jax.default_matmul_precision("highest"):
        for path, target in targets.items():
            kernel = target.kernel.matrix(flat[path].astype(jnp.float32))
            update = _update(adapters.theta[path], flat, target, config)
            total = target.kernel.stored(kernel + update.delta(kernel))
            merged[path] = total.astype(flat[path].dtype)
    check_finite(merged, "NaNs detected in the merged weights; the adapter or the base is broken at {paths}")
    return replace(params, {**merged, **adapters.saved})


def with_saved(params: PyTree, adapters: Adapters) -> PyTree:
    """`params` with the leaves of the saved modules put in."""
    check_adapters(adapters)
    return replace(params, adapters.saved) if adapters.saved else params


def labels(adapters: Adapters) -> Adapters:
    """The same tree with "adapter" or "saved" for each leaf, for `optax.partition`."""
    return Adapters(
        {path: dict.fromkeys(theta, "adapter") for path, theta in adapters.theta.items()},  # type: ignore[arg-type]
        dict.fromkeys(adapters.saved, "saved"),  # type: ignore[arg-type]
    )


def count(adapters: PyTree) -> int:
    """Number of trainable parameters: theta and the saved modules."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def check(adapters: Adapters, params: PyTree, config: Method) -> dict[str, Target]:
    """The targets of `adapters`, once its paths and shapes are what `config` asks of `params`.

    Raises:
        ValueError: naming the leaves that are missing, not expected, or of another shape; arguments in another order.
    """
    check_adapters(adapters)
    flat = flatten(params)
    targets = select(params, checked(config))
    wanted = {
        (path, name): target.stack + shape
        for path, target in targets.items()
        for name, shape in config.shapes(target.kernel.d_in, target.kernel.d_out).items()
    } | {(path, ""): tuple(flat[path].shape) for path in saved_paths(flat, config)}
    given = {(path, name): tuple(leaf.shape) for path, theta in adapters.theta.items() for name, leaf in theta.items()}
    given |= {(path, ""): tuple(leaf.shape) for path, leaf in adapters.saved.items()}
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


def check_adapters(adapters: Any) -> None:
    """Raises a ValueError for anything but `Adapters`, such as a parameter tree in its place."""
    if not isinstance(adapters, Adapters):
        raise ValueError(
            f"adapters must be the Adapters that init returns, got {type(adapters).__name__}: are adapters and params "
            "swapped?"
        )


def check_key(key: Any) -> None:
    """Raises a ValueError for anything but a PRNG key, such as an integer seed."""
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == jnp.uint32 and shape is not None and len(shape) == 1
    if not ((typed and shape == ()) or raw):
        got = repr(key) if isinstance(key, int) else type(key).__name__
        raise ValueError(f"key must be a PRNG key such as jax.random.key(0), got {got}")


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
