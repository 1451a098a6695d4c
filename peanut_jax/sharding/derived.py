"""Many devices: what follows from how the base is laid out on its mesh.

The layout is `peanut_jax.sharding.mesh`'s. The parameters carry it as their `.sharding`, and the rest is derived from
there: adapters and updates from their kernels, the optimizer's state from the adapters, and activations
from the kernels that make them.

    kernel  (p_in, p_out)                       output orientation        input orientation
    A                                           (p_out, None)             (p_in, None)
    B                                           (None, p_out)             (None, p_in)
    left  [d_in, r], right [r, d_out]           (p_in, None), (None, p_out)

The rows of W0 are independent, so that with a row-sharded kernel W0 @ A needs no collective, and with a column-sharded
one a single all-reduce of [d_in, r]. A's gradient is the other way round, and so is the input orientation.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import PRNGKeyArray, PyTree

from peanut_jax.adapters import NOT_FINITE, Adapters, check_finite, check_key, init
from peanut_jax.base.kernels import Leaf, flatten
from peanut_jax.base.select import Target, select
from peanut_jax.methods.base import Method
from peanut_jax.sharding.activations import constrain, matrix_spec, side_spec
from peanut_jax.sharding.mesh import check_batch, full_spec, mesh_of, on
from peanut_jax.training import LossFn, TrainState, make_train_step


def state_shardings(state: TrainState, params: PyTree, config: Method) -> TrainState:
    """The sharding of every leaf of a train state, derived from the parameters'.

    Args:
        state: A train state or its shapes.
        params: The sharded base, or `jax.ShapeDtypeStruct`s that hold shardings.

    Returns:
        The same tree with `NamedSharding`s. Leaves of the optimizer state that belong to an adapter leaf (moments) are
        sharded as it is, the others replicated.
    """
    flat, mesh = flatten(params), mesh_of(params)
    targets = select(params, config)
    theta: Any = {path: theta_specs(target, flat[path], config) for path, target in targets.items()}
    saved: Any = {path: full_spec(flat[path]) for path in state.adapters.saved}
    specs = Adapters(theta, saved)
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


def theta_specs(target: Target, kernel: Leaf, config: Method) -> dict[str, Spec]:
    """The spec of each leaf of a kernel's theta: along the kernel's sides as the kernel, else whole."""
    stack, p_in, p_out = matrix_spec(target.kernel, kernel)
    if target.rows is not None:
        stack = (None, *stack[1:])  # a choice of layers need not divide
    return {name: side_spec(leaf.axes, stack, p_in, p_out) for name, leaf in config.leaves().items()}


def state_shapes(params: PyTree, config: Method, tx: optax.GradientTransformation) -> TrainState:
    """The train state as `jax.ShapeDtypeStruct`s with shardings, for params or their shapes with shardings.

    Raises:
        ValueError: as `init`.
    """
    key = jax.eval_shape(jax.random.key, 0)
    shapes = jax.eval_shape(lambda key, params: _create(key, params, config, tx), key, params)
    return jax.tree.map(on, shapes, state_shardings(shapes, params, config))


def init_state(
    key: PRNGKeyArray,
    params: PyTree,
    config: Method,
    tx: optax.GradientTransformation,
) -> TrainState:
    """The state before the first step, each leaf on its devices; the numbers are those of one device.

    Args:
        key: Split in two: for `init`, and for the train step.
        params: The sharded base.
        tx: The train step's optimizer.

    Raises:
        ValueError: as `init`.
    """
    check_key(key)
    flat = flatten(params)
    check_finite({path: flat[path] for path in select(params, config)}, NOT_FINITE)  # init sees tracers here
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(params, config, tx))
    create = jax.jit(lambda key, params: _create(key, params, config, tx), out_shardings=shardings)
    return create(key, params)


def _create(key: PRNGKeyArray, params: PyTree, config: Method, tx: optax.GradientTransformation) -> TrainState:
    init_key, train_key = jax.random.split(key)
    return TrainState.create(init(init_key, params, config), tx, train_key)


def sharded_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    config: Method,
    state: TrainState,
    params: PyTree,
    *,
    accumulate_steps: int = 1,
    max_grad_norm: float | None = None,
) -> jax.stages.Wrapped:
    """`make_train_step` over a mesh: activations are kept where they belong, and the state stays sharded as it is.

    Args:
        state: From `init_state`, or its shapes with shardings.
        params: The sharded base, or its shapes with shardings.

    Returns:
        `step(state, params, batch) -> (state, metrics)`; the batch sharded by `batch_sharding`.

    Raises:
        ValueError: as `make_train_step`; a state that is not on the mesh; a batch that does not divide over the mesh
            and the microbatches.
    """
    mesh = mesh_of(params)
    for path, leaf in jax.tree.leaves_with_path(state):
        if not isinstance(getattr(leaf, "sharding", None), NamedSharding):
            raise ValueError(f"state{jax.tree_util.keystr(path)} is not on the params' mesh: make it with init_state")
    step = make_train_step(
        constrain(loss_fn, params), tx, config, accumulate_steps=accumulate_steps, max_grad_norm=max_grad_norm
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


def _is_spec(value: Any) -> bool:
    return isinstance(value, Spec)
