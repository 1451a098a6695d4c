"""The collectives of a compiled train step as moves of single arrays: along which mesh axes, and whose."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from peanut_jax import hlo

OWNERS = ("model", "tweaker", "optimizer")
# A scope around the loss: what lies in it is the model's. A constraint stands outside it.
SCOPE = "the_model"


@dataclasses.dataclass(frozen=True)
class Move:
    """One array in a collective, on one device; the fields are those of `hlo.Collective`.

    Attributes:
        axes: Of the mesh, along which the places of a group differ.
        owner: One of `OWNERS`; several joined by "+" where XLA does not say which array is whose.
    """

    kind: str
    shape: str
    bytes: int
    times: int
    group_size: int
    axes: tuple[str, ...]
    owner: str

    @property
    def dims(self) -> tuple[int, ...]:
        return hlo.dims(self.shape)

    @property
    def traffic(self) -> int:
        """Bytes a step."""
        return self.bytes * self.times


def moves(program: str, mesh: Mesh) -> Iterator[Move]:
    """The collectives of a compiled program, one for each array that they move."""
    for one in hlo.collectives(program):
        names = op_names(one.op_name)
        sizes = [math.prod(hlo.dims(shape)) for shape in one.shapes]
        owners = [owner(name) for name in names]
        if len(owners) != len(sizes):
            owners = ["+".join(sorted(set(owners)))] * len(sizes)
        for shape, size, whose in zip(one.shapes, sizes, owners, strict=True):
            part = one.bytes * size // sum(sizes)
            yield Move(one.kind, shape, part, one.times, one.group_size, axes_of(one.groups, mesh), whose)


def axes_of(groups: Sequence[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh along which the places of a group differ; a program's devices are in the mesh's order."""
    places = np.stack(np.unravel_index(np.array(groups), mesh.devices.shape), axis=-1)  # group, member, axis
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, on in zip(mesh.axis_names, differ, strict=True) if on)


def op_names(merged: str) -> list[str]:
    """XLA's name of several operations in one, such as "jit(f)/(a:b/c)", as their own: jit(f)/a and jit(f)/b/c."""
    head, opening, rest = merged.partition("/(")
    if not opening or not rest.endswith(")"):
        return merged.split(":")
    return [f"{head}/{part}" for part in rest[:-1].split(":")]


def owner(op_name: str) -> str:
    """Whose an operation of the train step is, by its name."""
    if SCOPE in op_name or "sharding_constraint" in op_name:
        return "model"
    return "tweaker" if "jvp(" in op_name else "optimizer"
