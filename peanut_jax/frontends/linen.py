"""The Linen side: a dense module adds its update to what it computes; dW is never formed.

Each update is bound beside its kernel, as one subtree of the module's own params. `nn.scan`, `nn.remat` and `nn.vmap`
slice and save it as they do the kernel, and a module is changed if and only if its own params hold an update. Nothing
is looked up by path, so that another model, or the same one with other params, stays as it is.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
from jaxtyping import PyTree

from peanut_jax.adapters import Adapters, check_adapters, compute_updates, with_saved
from peanut_jax.base.kernels import BOUND, COLLECTION, flatten, replace
from peanut_jax.frontends.linen_modules import added, dense_class, is_own_call
from peanut_jax.frontends.used import never_changes, unused
from peanut_jax.methods.base import Method, checked
from peanut_jax.updates import Update, Updates
from peanut_jax.updates import checked as checked_updates


@flax.struct.dataclass
class Bound:
    """What stands beside a kernel.

    Attributes:
        updates: One, or several where `adapt` is nested; they add up.
        dropout: Rate for each one's input. Static, so that a function compiled for training is not taken for another.
    """

    updates: tuple[Update, ...]
    dropout: tuple[float, ...] = flax.struct.field(pytree_node=False)


def adapt(fn: Callable, config: Method, *, train: bool = False) -> Callable:
    """`fn(params, *args, **kwargs)` becomes `forward(adapters, params, *args, **kwargs)` of the adapted model.

    Pure: jit, grad, vmap, pmap and remat compose with it, outside and inside `fn`. Differentiate the first argument, in
    reverse mode (`jax.jvp` and `jax.jacfwd` raise: the products have reverse rules alone).

    Args:
        fn: Anything that calls Linen modules with `params`: `model.apply` of a Linen module, or a function around a HF
            Flax model. What it calls with other params is not adapted. It sees the updates as leaves of `params` named
            "peanut_update"; `unbind` leaves them out, as for a penalty on all parameters.
        config: The adapter's config.
        train: True applies `config.dropout`, for which the model needs its 'dropout' rng. `make_train_step` does.

    Raises:
        ValueError: when called: adapters that do not fit; a kernel that `fn` never uses, by path.
        NotImplementedError: a module that runs its kernel in another way than a dense layer's `__call__`.

    Examples:
        >>> model = nn.Dense(3)
        >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> config = pj.PeanutConfig(r=2, target_modules="all-linear")
        >>> adapters = pj.init(jax.random.key(1), params, config)
        >>> pj.adapt(model.apply, config)(adapters, params, jnp.ones((1, 4))).shape
        (1, 3)
    """
    checked(config)
    _check_function(fn, "adapt")

    def forward(adapters: Adapters, params: PyTree, *args, **kwargs):
        check_adapters(adapters)
        _check_saved(params, adapters)
        updates = compute_updates(adapters, params, config)
        bound = _bound(fn, updates, config.dropout if train else 0.0)
        return bound(with_saved(params, adapters), *args, **kwargs)

    return forward


def bind(fn: Callable, updates: Mapping[str, Any], dropout: float = 0.0) -> Callable:
    """`fn(params, *args, **kwargs)` with updates that are known already: what `adapt` calls.

    Args:
        fn: As for `adapt`.
        updates: Kernel path -> update, from `peanut_jax.compute_updates`, `factors`, `from_lora` or `combine`.
        dropout: Rate for the input of the updates, drawn from the modules' 'dropout' rng. Training only.

    Raises:
        ValueError: `updates` are none; when called, as `adapt`.
    """
    _check_function(fn, "bind")
    return _bound(fn, checked_updates(updates, "bind", Update), dropout)


def _bound(fn: Callable, updates: Updates, dropout: float) -> Callable:
    def call(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        def run(updates: Updates) -> Any:
            return fn(_with_bound(params, updates, dropout), *args, **kwargs)

        with applying(updates, params) as seen:
            out = run(updates)
            never = [path for path in updates if path not in seen]
            # A function that was traced before does not come by here again: then the program decides, or the result.
            if never:
                found = unused(run, updates, never)
                never = never_changes(run, updates, never, out) if found is None else found
        if never:
            raise ValueError(
                f"{len(never)} adapted kernels were never called, or what they gave is not used, so their update is "
                f"not in the result: {', '.join(never[:5])}{' ...' if len(never) > 5 else ''}. Call the model with the "
                "params that the function is given, and leave out modules that this call does not reach "
                "(exclude_modules)"
            )
        return out

    return call


def _check_function(fn: Any, caller: str) -> None:
    if isinstance(fn, nn.Module):
        raise ValueError(f"{caller} takes a function of params, got the module {type(fn).__name__}: pass its apply")
    if not callable(fn):
        raise ValueError(f"{caller} takes a function of params, got {type(fn).__name__}")


def _check_saved(params: PyTree, adapters: Adapters) -> None:
    """Refuses to replace a module that an adapter around this one changes: that update is of the kernel replaced."""
    clash = [path for path in bound_in(params) if path.removesuffix(BOUND) + "kernel" in adapters.saved]
    if clash:
        raise ValueError(
            f"{clash[0].removesuffix('/' + BOUND)!r} is adapted by one adapter and saved in full by another within it"
        )


def unbind(params: PyTree) -> PyTree:
    """`params` without what `adapt` and the train step bind into it, for a loss that sums over all parameters.

    Args:
        params: As a loss function is given them.
    """
    if not isinstance(params, Mapping):
        raise ValueError(f"unbind takes the params that a function is given, got {type(params).__name__}")

    def without(tree: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in tree.items() if name != BOUND}
        return {name: without(value) if isinstance(value, Mapping) else value for name, value in kept.items()}

    stripped = without(params)
    return flax.core.freeze(stripped) if isinstance(params, flax.core.FrozenDict) else stripped


def bound_in(params: PyTree) -> dict[str, Bound]:
    """Path of the bound leaf -> what is bound there, in a tree that an adapted function was given."""
    tree = flax.core.unfreeze(params.get(COLLECTION, params))
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf for path, leaf in flat.items() if path.rpartition("/")[2] == BOUND}


def _with_bound(params: PyTree, updates: Updates, dropout: float) -> PyTree:
    there = bound_in(params)
    leaves: dict[str, Any] = {}
    for path, update in updates.items():
        beside = path.removesuffix("kernel") + BOUND
        old = there.get(beside, Bound((), ()))
        leaves[beside] = Bound((*old.updates, update), (*old.dropout, dropout))
    return replace(params, leaves)


class _Run(threading.local):
    """What this thread is in the middle of: one interceptor serves all adapted functions that it is within."""

    def __init__(self) -> None:
        self.watches: list[_Watch] = []
        self.calls: list[tuple[str, ...]] = []  # paths of modules whose __call__ is open
        self.methods: list[list[Any]] = []  # [path, whether its __call__ ran] of those whose other method is


class _Watch:
    """Which of one call's updates were applied: by their arrays, else by the module's path."""

    def __init__(self, updates: Updates, params: PyTree) -> None:
        self.paths = set(updates)
        self.kernels = {path: id(leaf) for path, leaf in flatten(params).items() if path in updates} if updates else {}
        self.owners: dict[int, set[str]] = {}
        for path, update in updates.items():
            for leaf in jax.tree.leaves(update):
                self.owners.setdefault(id(leaf), set()).add(path)
        self.seen: set[str] = set()


_CHANGED = (
    "kernel {path!r} is not the one that params hold when its module runs: something between changes it, as "
    "nn.WeightNorm or nn.map_variables do, and its update is of the kernel as it was. Leave the module out "
    "(exclude_modules), or merge"
)


def _note(path: str, bound: Bound, kernel: Any) -> None:
    """Tells each watch which of its updates are being applied, beside which kernel.

    Arrays are known by identity, but not those that a scan or a jit has made of them. Then the path tells, as long as
    every watch that has an update of this path can have one of those that are bound here.
    """
    arrays = {id(leaf) for leaf in jax.tree.leaves(bound)}
    known = False
    for watch in _run.watches:
        owned = [watch.owners[one] for one in arrays if one in watch.owners]
        for paths in owned:
            if path in paths and watch.kernels[path] != id(kernel):
                raise NotImplementedError(_CHANGED.format(path=path))
            watch.seen |= {path} if path in paths else paths if len(paths) == 1 else set()
        known |= bool(owned)
    holders = [watch for watch in _run.watches if path in watch.paths]
    if not known and len(bound.updates) >= len(holders):
        for watch in holders:
            watch.seen.add(path)


_run = _Run()


@contextlib.contextmanager
def applying(updates: Updates, params: PyTree = None) -> Iterator[set[str]]:
    """Inside, modules whose params hold an update apply it. Yields the paths of `updates` that were, so far.

    What is traced after a call has ended, such as the backward rule of a `jax.custom_vjp`, needs a context around that.
    """
    watch = _Watch(updates, params)
    first = not _run.watches
    _run.watches.append(watch)
    try:
        with nn.intercept_methods(_apply) if first else contextlib.nullcontext():
            yield watch.seen
    finally:
        _run.watches.remove(watch)


def _apply(next_fun: Callable, args: tuple, kwargs: Mapping[str, Any], context: nn.module.InterceptorContext) -> Any:
    """Runs a method of a module, and adds to a dense layer's own `__call__` what is bound beside its kernel."""
    module = context.module
    if module.scope is None or context.method_name == "setup" or not module.has_variable(COLLECTION, BOUND):
        return next_fun(*args, **kwargs)
    if context.method_name != "__call__":
        return _other_method(next_fun, args, kwargs, context)
    path = tuple(module.path)
    for method in _run.methods:
        method[1] |= method[0] == path
    _run.calls.append(path)
    try:
        y = next_fun(*args, **kwargs)
    finally:
        _run.calls.pop()
    kernel = "/".join((*path, "kernel"))
    if not is_own_call(context, dense_class(module, kernel)):
        return y  # a subclass: its base class's own call comes by here too
    bound: Any = module.get_variable(COLLECTION, BOUND)
    _note(kernel, bound, module.get_variable(COLLECTION, "kernel"))
    x = args[0] if args else kwargs["inputs"]
    return y + added(module, x, y, bound.updates, bound.dropout, kernel)


def _other_method(next_fun: Callable, args: tuple, kwargs: Mapping[str, Any], context: Any) -> Any:
    """A method other than `__call__`: right within `__call__` or around it, and otherwise past the update."""
    path = tuple(context.module.path)
    frame = [path, path in _run.calls]
    _run.methods.append(frame)
    try:
        out = next_fun(*args, **kwargs)
    finally:
        _run.methods.pop()
    if not frame[1]:
        raise NotImplementedError(
            f"the method {context.method_name!r} of the adapted module {'/'.join(path)!r} ran: only its __call__ is "
            "adapted, and a method that reads the kernel by itself would miss the update. Leave the module out "
            "(exclude_modules), or merge"
        )
    return out
