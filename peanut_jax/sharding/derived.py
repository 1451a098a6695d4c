"""Many devices: what follows from how the base is laid out on its mesh.

The layout is `peanut_jax.sharding.mesh`'s. The parameters carry it as their `.sharding`, and the rest is derived from
there: adapters and factors from their kernels, the optimizer's state from the adapters, and activations
from the kernels that make them.

    kernel  (p_in, p_out)                       output orientation        input orientation
    A                                           (p_out, None)             (p_in, None)
    B                                           (None, p_out)             (None, p_in)
    left  [d_in, r], right [r, d_out]           (p_in, None), (None, p_out)

The rows of W0 are independent, so that with a row-sharded kernel W0 @ A needs no collective, and with a column-sharded
one a single all-reduce of [d_in, r]. A's gradient is the other way round, and so is the input orientation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, PRNGKeyArray, PyTree

from peanut_jax.adapters import NOT_FINITE, check_finite, init
from peanut_jax.architectures import is_output_head
from peanut_jax.base.kernels import Axes, Kernel, Leaf, find, flatten, module_of, replace
from peanut_jax.base.select import Target, select
from peanut_jax.frontends.linen import LEFT, RIGHT
from peanut_jax.methods.base import Config, LoraConfig
from peanut_jax.sharding.mesh import (
    BATCH_AXES,
    axes_of,
    batch_axes,
    batch_shards,
    check_batch,
    full_spec,
    mesh_of,
    on,
)
from peanut_jax.training import LossFn, TrainState, make_train_step


def state_shardings(state: TrainState, params: PyTree, config: Config, axes: Axes | None = None) -> TrainState:
    """The sharding of every leaf of a train state, derived from the parameters'.

    Args:
        state: A train state or its shapes.
        params: The sharded base, or `jax.ShapeDtypeStruct`s that hold shardings.
        axes: As for `init`.

    Returns:
        The same tree with `NamedSharding`s. Leaves of the optimizer state that are an adapter leaf's (moments) are cut
        as it is, the others replicated.
    """
    flat, mesh = flatten(params), mesh_of(params)
    targets = select(params, config, axes)
    specs: dict[str, Any] = {
        path: theta_specs(targets[path], flat[path], set(value), config)
        if isinstance(value, Mapping)
        else full_spec(flat[path])
        for path, value in state.adapters.items()
    }
    by_path = {
        key: (spec, leaf.shape)
        for (key, spec), leaf in zip(
            jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec), jax.tree.leaves(state.adapters), strict=True
        )
    }

    def of_leaf(key: tuple, leaf: Leaf) -> NamedSharding:
        for start in range(len(key)):
            spec, shape = by_path.get(key[start:], (Spec(), None))
            if shape == leaf.shape:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, Spec())

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def theta_specs(target: Target, kernel: Leaf, names: set[str], config: Config) -> dict[str, Spec]:
    """The spec of each leaf of a kernel's theta."""
    stack, p_in, p_out = matrix_spec(target.kernel, kernel)
    if target.rows is not None:
        stack = (None, *stack[1:])  # a choice of layers need not divide
    if isinstance(config, LoraConfig):
        sides = p_in, p_out
    else:
        side = p_out if config.orientation == "output" else p_in
        sides = side, side
    own = {"a": Spec(*stack, sides[0], None), "b": Spec(*stack, None, sides[1])}
    return {name: own.get(name, Spec(*stack)) for name in names}


def matrix_spec(kernel: Kernel, leaf: Leaf) -> tuple[tuple, Any, Any]:
    """(specs of the stack, p_in, p_out) of a kernel as a stack of matrices.

    Of several input (or output) axes, only a cut of the first is a cut of their product; any other counts as none.
    """
    ins, outs = _sides(kernel, leaf)
    return tuple(full_spec(leaf))[: len(kernel.stack)], _product(ins), _product(outs)


def _product(parts: tuple) -> Any:
    return parts[0] if all(part is None for part in parts[1:]) else None


def state_shapes(
    params: PyTree, config: Config, tx: optax.GradientTransformation, axes: Axes | None = None
) -> TrainState:
    """The train state as `jax.ShapeDtypeStruct`s with shardings, for params or their shapes with shardings.

    Raises:
        ValueError: as `init`.
    """
    key = jax.eval_shape(jax.random.key, 0)
    shapes = jax.eval_shape(lambda key, params: _create(key, params, config, tx, axes), key, params)
    return jax.tree.map(on, shapes, state_shardings(shapes, params, config, axes))


def init_state(
    key: PRNGKeyArray,
    params: PyTree,
    config: Config,
    tx: optax.GradientTransformation,
    axes: Axes | None = None,
) -> TrainState:
    """The state before the first step, each leaf on its devices; the numbers are those of one device.

    Args:
        key: Split in two: for `init`, and for the train step.
        params: The sharded base.
        tx: Of the train step.
        axes: As for `init`.

    Raises:
        ValueError: as `init`.
    """
    flat = flatten(params)
    check_finite({path: flat[path] for path in select(params, config, axes)}, NOT_FINITE)  # init sees tracers here
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(params, config, tx, axes))
    create = jax.jit(lambda key, params: _create(key, params, config, tx, axes), out_shardings=shardings)
    return create(key, params)


def _create(
    key: PRNGKeyArray, params: PyTree, config: Config, tx: optax.GradientTransformation, axes: Axes | None
) -> TrainState:
    init_key, train_key = jax.random.split(key)
    return TrainState.create(init(init_key, params, config, axes), tx, train_key)


def sharded_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    config: Config,
    state: TrainState,
    params: PyTree,
    *,
    accumulate_steps: int = 1,
    max_grad_norm: float | None = None,
    axes: Axes | None = None,
) -> jax.stages.Wrapped:
    """`make_train_step` over a mesh: activations are kept where they belong, and the state stays as it is cut.

    Args:
        state: From `init_state`, or its shapes with shardings.
        params: The sharded base, or its shapes with shardings.
        axes: As for `init`.

    Returns:
        `step(state, params, batch) -> (state, metrics)`; the batch cut by `batch_sharding`.

    Raises:
        ValueError: as `make_train_step`; a state that is not on the mesh; a batch that does not divide over the mesh
            and the microbatches.
    """
    mesh = mesh_of(params)
    for path, leaf in jax.tree.leaves_with_path(state):
        if not isinstance(getattr(leaf, "sharding", None), NamedSharding):
            raise ValueError(f"state{jax.tree_util.keystr(path)} is not on the params' mesh: make it with init_state")
    step = make_train_step(
        constrain(loss_fn, params, axes), tx, config, accumulate_steps=accumulate_steps, max_grad_norm=max_grad_norm
    )

    def checked(state: TrainState, params: PyTree, batch: PyTree):
        for leaf in jax.tree.leaves(batch):
            check_batch(leaf.shape[0], mesh, accumulate_steps)
        return step(state, params, batch)

    out = (jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, Spec()))
    return jax.jit(_in_auto(checked, mesh, out), donate_argnums=0, out_shardings=out)


def _in_auto(fn: Callable, mesh: Mesh, out: Any) -> Callable:
    """`fn`, traced with the mesh's axes as Auto: models are written without shardings in their types."""
    if AxisType.Explicit not in mesh.axis_types:
        return fn
    return jax.sharding.auto_axes(fn, out_sharding=out)


def constrain(fn: Callable, params: PyTree, axes: Axes | None = None) -> Callable:
    """`fn(params, ...)` with the activations of its dense layers and embeddings held to the batch's devices.

    What goes into a layer and comes out of it keeps its batch on `data` and `fsdp`, and its width on the `tensor` part
    of the kernel's spec. Without this XLA may answer a kernel cut over fsdp by cutting the activations along their
    width and adding them up over all devices; with it, it gathers the kernel where it is used, inside the layer scan.
    Factors that are bound beside the kernels are held to their specs.

    Args:
        fn: Calls Linen modules with `params`, whose tree is that of `params` here.
        params: The sharded base, or its shapes with shardings.
        axes: As for `init`.
    """
    mesh = mesh_of(params)
    flat = flatten(params)
    kernels = find(flat, axes)
    # Inside the step every axis is Auto, whatever it is outside.
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    cuts = {kernel.module: _sides(kernel, flat[path]) for path, kernel in kernels.items()}
    for path, leaf in flat.items():
        if path.endswith("/embedding"):
            cuts[module_of(path)] = (), (full_spec(leaf)[-1],)
    matrices = {kernel.module: matrix_spec(kernel, flat[path]) for path, kernel in kernels.items()}
    batch, shards = batch_axes(mesh), batch_shards(mesh)

    def hold(x: Array, side: tuple) -> Array:
        # A first axis that does not divide is no batch (a table of positions or distances).
        if x.ndim <= len(side) or x.shape[0] % shards:
            return x
        spec = Spec(batch, *[None] * (x.ndim - 1 - len(side)), *map(_without_batch, side))
        return jax.lax.with_sharding_constraint(x, NamedSharding(auto, spec))

    def keep(next_fun, args, kwargs, context):
        module = context.module
        cut = cuts.get(".".join(module.path)) if context.method_name == "__call__" else None
        if cut is None or not _is_layer(module):
            return next_fun(*args, **kwargs)
        ins, outs = cut
        if args and not isinstance(module, nn.Embed):
            args = (hold(args[0], ins), *args[1:])
        return hold(next_fun(*args, **kwargs), outs)

    def held(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        kept = {}
        for path, leaf in flatten(params).items():
            if (spec := _used_as(path, flat, matrices)) is not None:
                kept[path] = jax.lax.with_sharding_constraint(leaf, NamedSharding(auto, spec))
        with nn.intercept_methods(keep):
            return fn(replace(params, kept), *args, **kwargs)

    return held


def _is_layer(module: nn.Module) -> bool:
    """Whether it maps the last axes of one array, as `_sides` says."""
    if isinstance(module, nn.DenseGeneral):
        wanted = module.axis if isinstance(module.axis, Sequence) else (module.axis,)
        return not module.batch_dims and tuple(wanted) == tuple(range(-len(wanted), 0))
    return isinstance(module, (nn.Dense, nn.Embed)) or type(module).__name__ == "FlaxConv1D"


def _sides(kernel: Kernel, leaf: Leaf) -> tuple[tuple, tuple]:
    """The specs of a kernel's input axes and of its output axes."""
    rest = tuple(full_spec(leaf))[len(kernel.stack) :]
    if kernel.transposed:
        return rest[1:], rest[:1]
    return rest[: len(kernel.ins)], rest[len(kernel.ins) :]


def _used_as(path: str, flat: Mapping[str, Leaf], matrices: Mapping[str, tuple]) -> Spec | None:
    """The spec in which a leaf enters the model, where it is not XLA's to choose.

    Factors keep theirs. Embeddings and the head, outside the layers, are gathered over the batch's axes once: a lookup
    in a table cut along its width would have XLA gather the activations of the whole batch, and the loss's chunks
    would gather the head anew for the forward, the recomputed and the backward pass.
    """
    module, name = module_of(path), path.rpartition("/")[2]
    if name in (LEFT, RIGHT):
        stack, p_in, p_out = matrices[module]
        return Spec(*stack, p_in, None) if name == LEFT else Spec(*stack, None, p_out)
    if name == "embedding" or (name == "kernel" and is_output_head(module)):
        return Spec(*map(_without_batch, full_spec(flat[path])))
    return None


def _without_batch(part: Any) -> tuple[str, ...] | None:
    return tuple(name for name in axes_of(part) if name not in BATCH_AXES) or None


def _is_spec(value: Any) -> bool:
    return isinstance(value, Spec)
