"""The collectives of a compiled program: what each moves, how often, and between which devices."""

import dataclasses
import math
import re

from peanut_jax.hlo.groups import replica_groups
from peanut_jax.hlo.program import Execution, dims, executions

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective on one device.

    Attributes:
        kind: One of `COLLECTIVES`; an asynchronous pair is one of its kind.
        shapes: Shapes of the results, without layouts, such as `("f32[64,32]",)`.
        bytes: Bytes that one execution moves: the larger of what goes in and what comes out, over all operands or
            results. So the gathered result of an all-gather, the operand of a reduce-scatter.
        times: Executions in one run of the program.
        group_size: Devices that take part together; 2 for a collective-permute.
        groups: Those devices, by their place in the program's device order; (source, target) pairs for a
            collective-permute.
        op_name: Where the program's author wrote it, "" if XLA does not say.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    times: int
    group_size: int
    groups: tuple[tuple[int, ...], ...]
    op_name: str


def collectives(hlo: str) -> list[Collective]:
    """The collectives that one device takes part in.

    Sums of bytes * times over a kind are the traffic of a step. XLA:CPU moves float32 where the program has bfloat16,
    and has no pass that makes a reduce-scatter of an all-reduce and a slice: both are read as they are.

    Args:
        hlo: `compiled.as_text()`.

    Returns:
        One record for each place in the program, in the order of the walk.

    Raises:
        ValueError: for a collective in a loop whose trip count is not known, or a text that is not compiled HLO.
    """
    devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo.split("\n", 1)[0]))
    return [
        _collective(run, devices)
        for run in executions(hlo)
        if run.instruction.opcode.removesuffix("-start") in COLLECTIVES
    ]


def _collective(run: Execution, devices: int) -> Collective:
    instruction = run.instruction
    kind = instruction.opcode.removesuffix("-start")
    shapes, n = instruction.shapes, len(instruction.operands)
    # An async start returns (operands, results, contexts), except an all-reduce's: its results alone.
    if instruction.opcode.endswith("-start") and len(shapes) >= 2 * n:
        shapes = shapes[n : 2 * n]
    groups = replica_groups(instruction.attributes, devices)
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
    return Collective(
        kind=kind,
        shapes=shapes,
        bytes=max(sum(map(_bytes, shapes)), sum(_bytes(shape) for made in run.operands for shape in made.shapes)),
        times=run.times,
        group_size=max(map(len, groups), default=1),
        groups=groups,
        op_name=op_name[1] if op_name else "",
    )


def _bytes(shape: str) -> int:
    """Bytes of an array; a `pred` takes one, a token none."""
    bits = 8 if shape.startswith("pred") else int((re.findall(r"^[a-z]+(\d+)", shape) or [0])[0])
    return (math.prod(dims(shape)) * bits + 7) // 8
