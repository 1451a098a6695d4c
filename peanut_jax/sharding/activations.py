"""How a layer's input, output and update lie on the mesh, given how its kernel does."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, PyTree

from peanut_jax.architectures import is_output_head
from peanut_jax.base.kernels import Kernel, Leaf, find, flatten, module_of, replace
from peanut_jax.frontends.linen import Bound, bound_in
from peanut_jax.frontends.linen_modules import sides_of
from peanut_jax.sharding.mesh import BATCH_AXES, axes_of, batch_axes, batch_shards, full_spec, mesh_of
from peanut_jax.sharding.tracing import tracing_for
from peanut_jax.updates import map_with_axes

# (Specs of the stack's axes, of the rows, of the columns) of a kernel as a stack of matrices.
MatrixSpec = tuple[tuple, Any, Any]


def matrix_spec(kernel: Kernel, leaf: Leaf) -> MatrixSpec:
    """(Specs of the stack, p_in, p_out) of a kernel as a stack of matrices.

    Where a side has several axes, only a cut of the first is a cut of their product; any other counts as none.
    """
    spec = tuple(full_spec(leaf))
    stack, sides = spec[: len(kernel.stack)], spec[len(kernel.stack) :]
    if kernel.transposed:
        return stack, sides[1], sides[0]
    return stack, _product(sides[: len(kernel.ins)]), _product(sides[len(kernel.ins) :])


def side_spec(axes: tuple[str, ...], stack: tuple, p_in: Any, p_out: Any) -> Spec:
    """The spec of an array beside a kernel, whose axes behind the stack's are these in words."""
    sides = {"in": p_in, "out": p_out}
    return Spec(*stack, *(sides.get(word) for word in axes))


def _product(parts: tuple) -> Any:
    return parts[0] if all(part is None for part in parts[1:]) else None


def constrain(fn: Callable, params: PyTree) -> Callable:
    """`fn(params, ...)` with the activations of its dense layers and embeddings held to the batch's devices.

    What goes into a layer and comes out of it keeps its batch on `data` and `fsdp`, and its width on the `tensor` part
    of the kernel's spec. Without this XLA may answer a kernel sharded over fsdp by sharding the activations along
    their width and adding them up over all devices; with it, it gathers the kernel where it is used, inside the layer
    scan. Updates that are bound beside the kernels are held to their specs. Only where arrays lie changes, never a
    number; a module whose weights are not those of `params` in shape is left alone. `traced_mesh()` is the mesh inside,
    for kernels that XLA cannot divide.

    Args:
        fn: Calls Linen modules with `params`, whose tree is that of `params` here.
        params: The sharded base, or its shapes with shardings.
    """
    mesh = mesh_of(params)
    flat = flatten(params)
    # Inside the step every axis is Auto, whatever it is outside.
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    batch, shards = batch_axes(mesh), batch_shards(mesh)

    def hold(x: Array, side: tuple) -> Array:
        # A first axis that does not divide is not a batch (a table of positions or distances).
        if x.ndim <= len(side) or x.shape[0] % shards:
            return x
        spec = Spec(batch, *[None] * (x.ndim - 1 - len(side)), *map(_without_batch, side))
        return jax.lax.with_sharding_constraint(x, NamedSharding(auto, spec))

    def keep(next_fun, args, kwargs, context):
        cut = _sides(context.module, flat) if context.method_name == "__call__" else None
        if cut is None:
            return next_fun(*args, **kwargs)
        ins, outs = cut
        if args and not isinstance(context.module, nn.Embed):
            args = (hold(args[0], ins), *args[1:])
        return hold(next_fun(*args, **kwargs), outs)

    def held(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(keep), tracing_for(auto):
            return fn(replace(params, _held_leaves(params, flat, auto)), *args, **kwargs)

    return held


def _sides(module: nn.Module, flat: Mapping[str, Leaf]) -> tuple[tuple, tuple] | None:
    """The specs of a layer's input axes and of its output axes, by its kernel's; None for what is not a layer here."""
    name = "embedding" if isinstance(module, nn.Embed) else "kernel"
    leaf = flat.get("/".join((*module.path, name)))
    if leaf is None or not module.has_variable("params", name):
        return None
    own: Any = module.get_variable("params", name)
    if tuple(leaf.shape[leaf.ndim - own.ndim :]) != tuple(own.shape):
        return None  # another model's module of the same path
    spec = tuple(full_spec(leaf))
    if name == "embedding":
        return (), spec[-1:]
    counts = sides_of(module)
    if counts is None:
        return None
    n_in, n_out = counts
    ins, outs = spec[len(spec) - n_in - n_out : len(spec) - n_out], spec[len(spec) - n_out :]
    return (ins, outs) if isinstance(module, (nn.Dense, nn.DenseGeneral)) else (outs, ins)  # Conv1D stores [out, in]


def _held_leaves(params: PyTree, flat: Mapping[str, Leaf], mesh: Mesh) -> dict[str, Any]:
    """The leaves of `params` whose spec is not XLA's to choose, held to it.

    Updates keep theirs. Embeddings and the head, outside the layers, are gathered over the batch's axes once: a lookup
    in a table cut along its width would have XLA gather the activations of the whole batch, and the loss's chunks
    would gather the head anew for the forward, the recomputed and the backward pass.
    """

    def hold(leaf: Array, spec: Spec) -> Array:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    held: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        name = path.rpartition("/")[2]
        if name == "embedding" or (name == "kernel" and is_output_head(module_of(path))):
            held[path] = hold(leaf, Spec(*map(_without_batch, full_spec(flat[path]))))
    kernels = find(flat)
    for path, bound in bound_in(params).items():
        kernel = "/".join((*path.split("/")[:-1], "kernel"))

        def hold_part(axes: tuple[str, ...], array: Array, kernel: str = kernel) -> Array:
            return hold(array, side_spec(axes, *_read_as(kernels.get(kernel), flat[kernel], array, axes)))

        held[path] = Bound(tuple(map_with_axes(hold_part, update) for update in bound.updates), bound.dropout)
    return held


def _read_as(kernel: Kernel | None, leaf: Leaf, array: Array, axes: tuple[str, ...]) -> MatrixSpec:
    """The kernel's specs, where its shape alone says how its axes divide; else with the stack that the array shows."""
    n_stack = array.ndim - len(axes)
    if kernel is not None and len(kernel.stack) == n_stack:
        return matrix_spec(kernel, leaf)
    return tuple(full_spec(leaf))[:n_stack], None, None


def _without_batch(part: Any) -> tuple[str, ...] | None:
    return tuple(name for name in axes_of(part) if name not in BATCH_AXES) or None
