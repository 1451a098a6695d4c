"""Many devices: a mesh, rules for the base's parameters, and all that follows from them.

Rules are the only place that says how anything is cut. The parameters carry the result as their `.sharding`, and the
rest is derived from there: adapters and factors from their kernels, the optimizer's state from the adapters, and
activations from the kernels that make them.

    kernel  (p_in, p_out)                       output orientation        input orientation
    A                                           (p_out, None)             (p_in, None)
    B                                           (None, p_out)             (None, p_in)
    left  [d_in, r], right [r, d_out]           (p_in, None), (None, p_out)

The rows of W0 are independent, so that with a row-sharded kernel W0 @ A needs no collective, and with a column-sharded
one a single all-reduce of [d_in, r]. A's gradient is the other way round, and so is the input orientation.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray, PyTree

from peanut_jax.adapters import NOT_FINITE, check_finite, init
from peanut_jax.config import Config, LoraConfig
from peanut_jax.intercept import LEFT, RIGHT
from peanut_jax.kernels import Axes, Kernel, Leaf, find, flatten, module_of, replace
from peanut_jax.targets import Target, is_output_head, select
from peanut_jax.training import LossFn, TrainState, make_train_step

Spec = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("data", "fsdp", "tensor")
# The axes that cut the batch. fsdp cuts the parameters too, which each layer gathers before it runs.
BATCH_AXES = ("data", "fsdp")


def _encoder(*first: tuple[str, Spec]) -> Rules:
    return (
        *first,
        (r".*/(query|key|value)/kernel", Spec("fsdp", "tensor")),
        (r".*/intermediate/dense/kernel", Spec("fsdp", "tensor")),
        (r".*/layer/\d+/(attention/)?output/dense/kernel", Spec("tensor", "fsdp")),
        (r".*", Spec()),
    )


# HF's model_type -> rules for its Flax class. Vocabularies such as RoBERTa's 50,265 divide by nothing, so that
# embeddings are cut along their width. GPT-2 stores [d_out, d_in].
_RULES: Mapping[tuple[str, ...], Rules] = {
    ("bert", "roberta", "xlm-roberta"): _encoder((r".*/word_embeddings/embedding", Spec(None, "fsdp"))),
    ("vit",): _encoder(),
    ("t5", "mt5"): (
        (r"shared/embedding", Spec(None, "fsdp")),
        (r".*Attention/(q|k|v)/kernel", Spec("fsdp", "tensor")),
        (r".*Attention/o/kernel", Spec("tensor", "fsdp")),
        (r".*DenseReluDense/wi(_\d)?/kernel", Spec("fsdp", "tensor")),
        (r".*DenseReluDense/wo/kernel", Spec("tensor", "fsdp")),
        (r".*", Spec()),
    ),
    ("gpt2",): (
        (r"transformer/wte/embedding", Spec(None, "fsdp")),
        (r".*/(c_attn|c_fc)/kernel", Spec("tensor", "fsdp")),
        (r".*/c_proj/kernel", Spec("fsdp", "tensor")),
        (r".*", Spec()),
    ),
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def rules_for(model_type: str, *, scan_layers: bool = True) -> Rules:
    """The table of an architecture: (regular expression, PartitionSpec) pairs for `shard` and the loaders.

    Args:
        model_type: HF's, such as "roberta"; "llama", "mistral", "qwen2" and "qwen3" are the library's decoder.
        scan_layers: Of the decoder: whether its layers are one stack.

    Raises:
        ValueError: an architecture without a table.
    """
    if model_type in DECODERS:
        stack = (None,) if scan_layers else ()
        return (
            (r"model/embed_tokens/embedding", Spec("tensor", "fsdp")),
            (r".*/(q|k|v|gate|up)_proj/kernel", Spec(*stack, "fsdp", "tensor")),
            (r".*/(o|down)_proj/kernel", Spec(*stack, "tensor", "fsdp")),
            (r"(lm_head/kernel)?", Spec("fsdp", "tensor")),
            (r".*", Spec()),
        )
    for names, rules in _RULES.items():
        if model_type in names:
            return rules
    known = sorted({name for names in (*_RULES, DECODERS) for name in names})
    raise ValueError(f"no sharding rules for {model_type!r} (there are some for {', '.join(known)}): pass your own")


def make_mesh(sizes: str, devices: Sequence[jax.Device] | None = None, *, explicit: bool = False) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor` over all devices of all processes.

    Args:
        sizes: Such as "data=2,fsdp=2,tensor=2". An axis left out has size 1; one of them may be -1, for what is left.
        devices: By default `jax.devices()`.
        explicit: Axes of type Explicit, where an array's type holds its sharding, instead of Auto.

    Raises:
        ValueError: an unknown axis, a size that is no number, more or fewer places than there are devices.

    Example:
        mesh = make_mesh("data=-1,tensor=4")
    """
    found = mesh_sizes(sizes)
    devices = jax.devices() if devices is None else devices
    open_axes = [name for name, size in found.items() if size == -1]
    if open_axes:
        fixed = math.prod(size for size in found.values() if size != -1)
        if len(open_axes) > 1 or len(devices) % fixed:
            raise ValueError(f"mesh {sizes!r}: one axis may be -1, and {fixed} must divide {len(devices)} devices")
        found[open_axes[0]] = len(devices) // fixed
    places = math.prod(found.values())
    if places != len(devices):
        raise ValueError(f"mesh {sizes!r} has {places} places and there are {len(devices)} devices: they must be equal")
    kind = AxisType.Explicit if explicit else AxisType.Auto
    # A TPU's torus may have to be split along an axis of its own to give these sizes.
    grid = create_device_mesh(tuple(found.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(kind,) * len(AXES))


def mesh_sizes(sizes: str) -> dict[str, int]:
    """Axis -> size, with 1 for an axis that is left out, and -1 as it is.

    Raises:
        ValueError: as `make_mesh`.
    """
    given: dict[str, int] = {}
    for part in filter(None, sizes.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not re.fullmatch(r"-1|[1-9]\d*", size) or name in given:
            raise ValueError(f"mesh must be like data=2,fsdp=2,tensor=2 (axes {', '.join(AXES)}), got {sizes!r}")
        given[name] = int(size)
    return {name: given.get(name, 1) for name in AXES}


def param_shardings(params: PyTree, mesh: Mesh, rules: Rules) -> dict[str, NamedSharding]:
    """Path -> sharding of every parameter, by the first rule that matches the whole path.

    Args:
        params: Arrays or `jax.ShapeDtypeStruct`s.
        rules: (regular expression, PartitionSpec) pairs. A spec is that of the whole leaf: the first axis of a scanned
            stack is its layers. End them with (".*", PartitionSpec()) to replicate the rest.

    Raises:
        ValueError: a parameter that no rule matches, a rule that matches none, an axis that the mesh has not, a
            dimension that does not divide, each by name.
    """
    found: dict[str, NamedSharding] = {}
    used: set[str] = set()
    for path, leaf in flatten(params).items():
        rule = next((rule for rule in rules if re.fullmatch(rule[0], path)), None)
        if rule is None:
            raise ValueError(f"no rule matches {path!r}; end the rules with ('.*', PartitionSpec()) to replicate it")
        used.add(rule[0])
        _check_spec(path, leaf.shape, rule[1], mesh)
        found[path] = NamedSharding(mesh, rule[1])
    for pattern, _ in rules:
        if pattern not in used and re.fullmatch(pattern, "") is None:  # one that matches "" may match nothing
            raise ValueError(f"rule {pattern!r} matches no parameter that an earlier rule leaves")
    return found


def _check_spec(path: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"{path!r} of shape {tuple(shape)} cannot be cut by {spec}: it has {len(shape)} dimensions")
    for i, names in enumerate(_axes(part) for part in spec):
        if absent := [name for name in names if name not in mesh.shape]:
            raise ValueError(f"{path!r}: the mesh has no axis {absent[0]!r}, only {', '.join(map(str, mesh.shape))}")
        size = math.prod(mesh.shape[name] for name in names)
        if shape[i] % size:
            raise ValueError(
                f"{path!r} of shape {tuple(shape)} cannot be cut by {spec}: dimension {i} of {shape[i]} does not "
                f"divide by {'*'.join(names)}={size}"
            )


def shard(params: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """`params` spread over the mesh; each device gets its own slices. For `load_decoder` pass the mesh to it instead.

    Of `jax.ShapeDtypeStruct`s it gives the same with shardings.

    Raises:
        ValueError: as `param_shardings`.
    """
    flat = flatten(params)
    shardings = param_shardings(params, mesh, rules)
    return replace(params, {path: _place(leaf, shardings[path]) for path, leaf in flat.items()})


def _place(leaf: Leaf, sharding: NamedSharding) -> Leaf:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return on(leaf, sharding)
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)  # each process holds the whole, and its devices take their slices
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of the mesh that cut the batch.

    Raises:
        ValueError: a mesh with none of them.
    """
    axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
    if not axes:
        raise ValueError(
            f"the mesh has the axes {', '.join(map(str, mesh.shape))}: one must be 'data' or 'fsdp', to cut the batch"
        )
    return axes


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the batch is cut."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, Spec(batch_axes(mesh)))


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
        else _full(flat[path])
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


def theta_specs(target: Target, kernel: Leaf, names: set[str], config: Config) -> dict[str, PartitionSpec]:
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
    return tuple(_full(leaf))[: len(kernel.stack)], _product(ins), _product(outs)


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


def on(leaf: Leaf, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of a leaf, on a mesh."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


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


def check_batch(rows: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Raises a ValueError for a batch that would not be cut evenly, and then be computed whole by every device."""
    if rows < 1 or rows % (batch_shards(mesh) * accumulate_steps):
        raise ValueError(
            f"a batch of {rows} rows does not divide over {batch_shards(mesh)} data shards"
            + (f" and {accumulate_steps} microbatches" if accumulate_steps > 1 else "")
        )


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
    flat, kernels = flatten(params), find(flatten(params), axes)
    # Inside the step every axis is Auto, whatever it is outside.
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    cuts = {kernel.module: _sides(kernel, flat[path]) for path, kernel in kernels.items()}
    for path, leaf in flat.items():
        if path.endswith("/embedding"):
            cuts[module_of(path)] = (), (_full(leaf)[-1],)
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
    rest = tuple(_full(leaf))[len(kernel.stack) :]
    if kernel.transposed:
        return rest[1:], rest[:1]
    return rest[: len(kernel.ins)], rest[len(kernel.ins) :]


def _used_as(path: str, flat: Mapping[str, Leaf], matrices: Mapping[str, tuple]) -> PartitionSpec | None:
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
        return Spec(*map(_without_batch, _full(flat[path])))
    return None


def _without_batch(part: Any) -> tuple[str, ...] | None:
    return tuple(name for name in _axes(part) if name not in BATCH_AXES) or None


def mesh_of(params: PyTree) -> Mesh:
    """The mesh that the parameters are spread over.

    Raises:
        ValueError: parameters that are not on a mesh.
    """
    for path, leaf in flatten(params).items():
        if not isinstance(getattr(leaf, "sharding", None), NamedSharding):
            raise ValueError(f"{path!r} is not on a mesh: pass the params through shard(params, mesh, rules) first")
        return leaf.sharding.mesh
    raise AssertionError("flatten refuses empty trees")


def _full(leaf: Leaf) -> PartitionSpec:
    """The leaf's spec with one entry for each of its dimensions."""
    spec = leaf.sharding.spec
    return Spec(*spec, *[None] * (len(leaf.shape) - len(spec)))


def _axes(part: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)
