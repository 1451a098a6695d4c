"""A mesh of devices, and a base laid out on it by rules: the only place that says how anything is sharded."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import PyTree

from peanut_jax.architectures import Rules
from peanut_jax.base.kernels import Leaf, flatten, replace
from peanut_jax.base.origin import carry
from peanut_jax.messages import short

AXES = ("data", "fsdp", "tensor")
# The axes that the batch is sharded over. fsdp shards the parameters too, which each layer gathers before it runs.
BATCH_AXES = ("data", "fsdp")


def make_mesh(sizes: str, devices: Sequence[jax.Device] | None = None, *, explicit: bool = False) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor` over all devices of all processes.

    Args:
        sizes: Such as "data=2,fsdp=2,tensor=2". An axis left out has size 1; one of them may be -1, for what is left.
        devices: By default `jax.devices()`.
        explicit: Axes of type Explicit, where an array's type holds its sharding, instead of Auto.

    Raises:
        ValueError: an unknown axis, a size that is not a number, more or fewer places than there are devices.

    Examples:
        >>> from peanut_jax.sharding import make_mesh
        >>> dict(make_mesh("data=-1,tensor=4").shape)  # of 8 devices
        {'data': 2, 'fsdp': 1, 'tensor': 4}
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
        if name not in AXES or not re.fullmatch(r"-1|[1-9]\d{0,8}", size) or name in given:
            raise ValueError(f"mesh must be like data=2,fsdp=2,tensor=2 (axes {', '.join(AXES)}), got {short(sizes)}")
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


def _check_spec(path: str, shape: Sequence[int], spec: Spec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"{path!r} of shape {tuple(shape)} cannot be cut by {spec}: it has {len(shape)} dimensions")
    for i, names in enumerate(axes_of(part) for part in spec):
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

    Given `jax.ShapeDtypeStruct`s, it returns them with shardings.

    Raises:
        ValueError: as `param_shardings`.
    """
    flat = flatten(params)
    shardings = param_shardings(params, mesh, rules)
    placed = {path: _place(leaf, shardings[path]) for path, leaf in flat.items()}
    carry(flat, placed)
    return replace(params, placed)


def _place(leaf: Leaf, sharding: NamedSharding) -> Leaf:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return on(leaf, sharding)
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)  # each process holds the whole, and its devices take their slices
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of the mesh that the batch is sharded over.

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
    """Number of parts that the batch is sharded into."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, Spec(batch_axes(mesh)))


def check_batch(rows: int, mesh: Mesh | AbstractMesh, accumulate_steps: int = 1) -> None:
    """Raises a ValueError for a batch that would not be cut evenly, and then be computed whole by every device."""
    if rows < 1 or rows % (batch_shards(mesh) * accumulate_steps):
        raise ValueError(
            f"a batch of {rows} rows does not divide over {batch_shards(mesh)} data shards"
            + (f" and {accumulate_steps} microbatches" if accumulate_steps > 1 else "")
        )


def on(leaf: Leaf, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of a leaf, on a mesh."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


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


def full_spec(leaf: Leaf) -> Spec:
    """The leaf's spec with one entry for each of its dimensions."""
    spec = leaf.sharding.spec
    return Spec(*spec, *[None] * (len(leaf.shape) - len(spec)))


def axes_of(part: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)
