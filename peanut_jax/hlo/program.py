"""The text of a compiled program as instructions, and the walk over what a run of it executes."""

import dataclasses
import re
from collections.abc import Iterator

# A quoted string in an instruction's attributes; what it holds is not syntax.
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
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
        return round(self.times_with(None))

    def times_with(self, unknown: float | None) -> float:
        """Executions in one run, a loop without a known trip count taken to turn `unknown` times.

        Raises:
            ValueError: as `times`, where `unknown` is None.
        """
        times: float = 1
        for loop in self.loops:
            trips = unknown if loop.trips is None else loop.trips
            if trips is None:
                raise ValueError(
                    f"loop {loop.name!r} has no known trip count, so {self.instruction.name!r} "
                    f"({self.instruction.opcode}) inside it cannot be counted: give the loop a static length"
                )
            times *= trips
        return times


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
    return ints(shape.partition("[")[2])


def ints(text: str) -> tuple[int, ...]:
    """The numbers in a text."""
    return tuple(int(n) for n in re.findall(r"\d+", text))


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
        for role, called in _CALLED.findall(QUOTED.sub('""', instruction.attributes)):
            around = (*loops, _loop(instruction, role)) if instruction.opcode == "while" else loops
            for callee in re.findall(r"[\w.\-]+", called):
                yield from _walk(blocks, callee, around)


def _loop(instruction: Instruction, role: str) -> Loop:
    known = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', instruction.attributes)
    return Loop(instruction.name, int(known[1]) + (role == "condition") if known else None)
