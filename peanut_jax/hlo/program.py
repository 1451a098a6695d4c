"""What a compiled program costs on one device, read from its HLO text: collectives and the FLOPs of its products.

`compiled.as_text()` is the program that every device runs (SPMD), so all numbers are of one device. The call graph is
walked from ENTRY and what is inside a loop counts as often as the loop turns; XLA's `cost_analysis` counts it once.
Of a conditional every branch counts once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# cuBLAS calls carry a dot's dimension numbers in their backend_config.
GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions\\?":\[)([^\]}]*)')
_OPAQUE_PRODUCT = re.compile(
    r"gemm|matmul|dot|conv(?!ert)|dnn|fmha|attention|triton|mosaic|tpu_custom_call", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. `shapes` are the leaves of its result without layouts; `operands` are names."""

    name: str
    opcode: str
    shapes: tuple[str, ...]
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop around an instruction, and how often it runs that instruction; None where XLA does not know."""

    name: str
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction reached from ENTRY, the instructions that make its operands, and the loops around it."""

    instruction: Instruction
    operands: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    @property
    def times(self) -> int:
        """Executions in one run of the program.

        Raises:
            ValueError: where a loop around it has no known trip count.
        """
        times = 1
        for loop in self.loops:
            if loop.trips is None:
                raise ValueError(
                    f"loop {loop.name!r} has no known trip count, so {self.instruction.name!r} "
                    f"({self.instruction.opcode}) inside it cannot be counted: give the loop a static length"
                )
            times *= loop.trips
        return times


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective on one device.

    Attributes:
        kind: one of `COLLECTIVES`; an asynchronous pair is one of its kind.
        shapes: of the results, without layouts, such as `("f32[64,32]",)`.
        bytes: of one execution: the larger of what goes in and what comes out, over all operands or results.
            So the gathered result of an all-gather, the operand of a reduce-scatter.
        times: executions in one run of the program.
        group_size: devices that take part together; 2 for a collective-permute.
        groups: those devices, by their place in the program's device order; (source, target) pairs for a
            collective-permute.
        op_name: where the program's author wrote it, "" if XLA does not say.
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
        ValueError: for a collective in a loop whose trip count is not known, or a text that is no compiled HLO.
    """
    devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo.split("\n", 1)[0]))
    return [
        _collective(run, devices)
        for run in executions(hlo)
        if run.instruction.opcode.removesuffix("-start") in COLLECTIVES
    ]


def dot_flops(hlo: str) -> int:
    """2 * batch * M * N * K of every matrix product that one device computes.

    Counted are `dot`, cuBLAS calls, and a `convolution` without padding or dilation, which is a product (a patch
    embedding; XLA:TPU writes its dots so). XLA turns a product of two vectors, or one over an axis of length 1, into
    multiplications: those are no products here, nor are triangular solves and factorizations.

    Args:
        hlo: `compiled.as_text()`.

    Returns:
        The FLOPs, a multiplication and an addition being two.

    Raises:
        ValueError: for a product in a loop whose trip count is not known, a convolution or a library's or hand-written
            kernel whose FLOPs the text does not tell, or a text that is no compiled HLO.

    References:
        openxla/xla `xla/service/hlo_cost_analysis.cc`, GetDotFlops, whose count this is.
    """
    return sum(flops * run.times for run in executions(hlo) if (flops := _flops(run)))


def executions(hlo: str) -> Iterator[Execution]:
    """Every instruction that a run of the program reaches, with the loops around it.

    Args:
        hlo: `compiled.as_text()`.

    Yields:
        Instructions in program order, what an instruction calls right behind it; once for each place it is called
        from. A loop's condition has one trip more than its body.
    """
    entries = re.findall(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    if len(entries) != 1:
        raise ValueError(f"expected a compiled HLO module with one ENTRY computation, got {len(entries)}")
    yield from _walk(computations(hlo), entries[0], ())


def computations(hlo: str) -> dict[str, dict[str, Instruction]]:
    """The instructions of every computation, by name, in the order of the text.

    Args:
        hlo: `compiled.as_text()`.
    """
    blocks: dict[str, dict[str, Instruction]] = {}
    block: dict[str, Instruction] | None = None
    for line in hlo.splitlines():
        if block is None:
            if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$", line):
                block = blocks[header[1]] = {}
        elif line.startswith("}"):
            block = None
        elif line.strip():
            instruction = _instruction(line)
            block[instruction.name] = instruction
    return blocks


def dims(shape: str) -> tuple[int, ...]:
    """The axes of an array's shape: `dims("bf16[8,<=4]")` is (8, 4)."""
    return _ints(shape.partition("[")[2])


def _instruction(line: str) -> Instruction:
    """`ROOT %name = shape opcode(operands), attributes`."""
    text = re.sub(r"/\*index=\d+\*/", "", line.strip())
    head = re.match(r"(?:ROOT )?%?([\w.\-]+) = ", text)
    if head is None:
        raise ValueError(f"not an HLO instruction: {line.strip()[:120]!r}")
    rest = text[head.end() :]
    cut = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:cut], rest[cut:].lstrip()
    opening = call.index("(")
    end = _closing(call, opening)
    operands = re.findall(r"%([\w.\-]+)", call[opening:end])
    return Instruction(head[1], call[:opening], tuple(re.findall(r"\w+\[[^\]]*\]", shape)), tuple(operands), call[end:])


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`; layouts hold parentheses too."""
    depth = 0
    for mark in re.finditer(r"[()]", text[start:]):
        depth += 1 if mark[0] == "(" else -1
        if depth == 0:
            return start + mark.end()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]!r}")


def _walk(blocks: dict[str, dict[str, Instruction]], name: str, loops: tuple[Loop, ...]) -> Iterator[Execution]:
    block = blocks[name]
    for instruction in block.values():
        yield Execution(instruction, tuple(block[operand] for operand in instruction.operands), loops)
        # An async-done names the computation that its async-start runs.
        if instruction.opcode.endswith(("-update", "-done")):
            continue
        for role, called in _CALLED.findall(_QUOTED.sub('""', instruction.attributes)):
            around = (*loops, _loop(instruction, role)) if instruction.opcode == "while" else loops
            for callee in re.findall(r"[\w.\-]+", called):
                yield from _walk(blocks, callee, around)


def _loop(instruction: Instruction, role: str) -> Loop:
    known = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', instruction.attributes)
    return Loop(instruction.name, int(known[1]) + (role == "condition") if known else None)


def _collective(run: Execution, devices: int) -> Collective:
    instruction = run.instruction
    kind = instruction.opcode.removesuffix("-start")
    shapes, n = instruction.shapes, len(instruction.operands)
    # An async start returns (operands, results, contexts), except an all-reduce's: its results alone.
    if instruction.opcode.endswith("-start") and len(shapes) >= 2 * n:
        shapes = shapes[n : 2 * n]
    groups = _groups(instruction.attributes, devices)
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


def _flops(run: Execution) -> int:
    """FLOPs of one execution of a product, 0 of anything else."""
    opcode, attributes = run.instruction.opcode, run.instruction.attributes
    called = re.search(r'custom_call_target="([^"]*)"', attributes)
    target = called[1] if called else ""
    if opcode == "dot" or target in GEMMS:
        contracted = _CONTRACTED.search(attributes)
        lhs = dims(run.operands[0].shapes[0])
        terms = [lhs[axis] for axis in _ints(contracted[1])] if contracted else []
        return 2 * math.prod(dims(run.instruction.shapes[0])) * math.prod(terms)
    plain = re.search(r"dim_labels=\w+_(\w+)->", attributes)
    if (
        opcode == "convolution"
        and plain
        and not re.search(r"pad=|dilate=|batch_group_count=", _QUOTED.sub('""', attributes))
    ):
        kernel = dims(run.operands[1].shapes[0])
        # Every element of the result reads the whole kernel of its feature, "o".
        return 2 * math.prod(dims(run.instruction.shapes[0])) * math.prod(kernel) // kernel[plain[1].index("o")]
    if opcode in ("convolution", "ragged-dot", "scaled-dot") or _OPAQUE_PRODUCT.search(target):
        raise ValueError(f"cannot count the FLOPs of {(target or opcode)!r} ({run.instruction.name!r})")
    return 0


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The replica groups, of whichever form: a list, an iota, axes of a mesh, or {} for all devices."""
    text = re.split(r"(?:replica_groups|source_target_pairs)=", attributes, maxsplit=1)[-1]
    if text.startswith("{}"):
        return (tuple(range(devices)),)
    if listed := re.match(r"\{(\{[\d,{}]*\})\}", text):
        return tuple(_ints(group) for group in re.findall(r"\{([\d,]*)\}", listed[1]))
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        rows = _iota(iota[2]).reshape(_ints(iota[1]))
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
        ids = _iota(device_ids).ravel() if device_ids.startswith("[") else np.array(_ints(device_ids))
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
    return np.arange(math.prod(_ints(shape))).reshape(_ints(shape)).transpose(_ints(order) or None)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def _bytes(shape: str) -> int:
    """Bytes of an array; a `pred` takes one, a token none."""
    bits = 8 if shape.startswith("pred") else int((re.findall(r"^[a-z]+(\d+)", shape) or [0])[0])
    return (math.prod(dims(shape)) * bits + 7) // 8
