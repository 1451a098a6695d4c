"""Replica groups: which devices take part in a collective together."""

import math
import re

import numpy as np

from peanut_jax.hlo.program import ints


def replica_groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The replica groups, of whichever form: a list, an iota, axes of a mesh, or {} for all devices."""
    text = re.split(r"(?:replica_groups|source_target_pairs)=", attributes, maxsplit=1)[-1]
    if text.startswith("{}"):
        return (tuple(range(devices)),)
    if listed := re.match(r"\{(\{[\d,{}]*\})\}", text):
        return tuple(ints(group) for group in re.findall(r"\{([\d,]*)\}", listed[1]))
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        rows = _iota(iota[2]).reshape(ints(iota[1]))
    elif mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}", text):
        rows = _mesh_groups(*mesh.groups())
    else:
        raise ValueError(f"cannot read the replica groups in {attributes[:120]!r}")
    return tuple(tuple(row) for row in rows.tolist())


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> np.ndarray:
    """Groups along `axes` of a mesh: `'x'` is an axis, `'x':(2)4` the 4 of an axis split into 2 * 4 * rest.

    References:
        openxla/xla `xla/hlo/ir/replica_group.cc`, MeshAxesReplicaGroupList. As there, members are in the mesh's order.
    """
    names = re.findall(r"'([^']*)'=", mesh)
    sizes = [int(n) for n in re.findall(r"=(\d+)", mesh)]
    ids = np.arange(math.prod(sizes))
    if device_ids:
        ids = _iota(device_ids).ravel() if device_ids.startswith("[") else np.array(ints(device_ids))
    fixed = np.indices(sizes).reshape(len(sizes), -1)
    group_size = 1
    for name, before, part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes):
        axis = names.index(name)
        size = int(part or sizes[axis])
        stride = sizes[axis] // (int(before or 1) * size)
        fixed[axis] -= fixed[axis] // stride % size * stride
        group_size *= size
    # A group is what agrees in all other coordinates; the sort is stable.
    return ids[np.lexsort(fixed[::-1])].reshape(-1, group_size)


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0..7 as a 4 by 2 array, transposed."""
    shape, _, order = text.partition("T")
    return np.arange(math.prod(ints(shape))).reshape(ints(shape)).transpose(ints(order) or None)
