"""The sections one after the other within a budget of time, and their lines in one file."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.accelerator import process
from benchmarks.accelerator.context import Context
from benchmarks.accelerator.sizes import FULL, SIZES

RESULTS, LOG = "results.jsonl", "log.txt"
# Seconds kept for the page.
RESERVE = 2.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A section, or several that share a process.

    Attributes:
        least: Seconds without which it is not begun.
        limit: Seconds after which it is ended.
    """

    sections: tuple[str, ...]
    least: float
    limit: float


# The first start of a fresh machine reads gigabytes of libraries from its disk.
ENVIRONMENT = Plan(("environment",), 5.0, 180.0)

KINDS = ("environment", "step", "torch", "decode", "roads", "remat", "attention", "merge", "load")
# Seconds; of a section that is not named, the last.
_LIMITS = {"step": 240.0, "torch": 120.0, "load": 120.0, "profile": 120.0, "": 150.0}


def sections_of(sizes_name: str) -> tuple[str, ...]:
    """The sections but the environment in their order: what matters most first, for time may run out."""
    steps = SIZES[sizes_name].steps.items()
    early, late = ([f"step/{name}" for name, step in steps if step.late is late] for late in (False, True))
    return (*early, "torch", "decode", "roads", "remat", "attention", "merge", "load", *late)


def plans(sizes_name: str, only: Sequence[str], profile: bool) -> list[Plan]:
    """The processes to run after the environment.

    Args:
        only: Sections ("step", or "step/llama-3-8b" for one setting); empty for all.
    """
    chosen = [name for name in sections_of(sizes_name) if not only or name in only or name.partition("/")[0] in only]
    if profile:
        chosen.insert(1 if chosen and chosen[0].startswith("step/") else 0, "profile")
    if sizes_name == FULL.name:
        return [Plan((name,), 30.0, _LIMITS.get(name.partition("/")[0], _LIMITS[""])) for name in chosen]
    # Little can go wrong at toy sizes, and starting jax would be most of their time: what runs alone is torch, and
    # jax's profiler, which has been seen to end its process.
    alone = [(name,) for name in chosen if name in ("torch", "profile")]
    together = tuple(name for name in chosen if (name,) not in alone)
    return [Plan(names, 1.0, 600.0) for names in (together, *alone) if names]


class Results:
    """The lines of a run: each is written to the file as soon as it is known."""

    def __init__(self, file: IO[str], tell: Callable[[str], None]):
        self.lines: list[dict[str, Any]] = []
        self.running: dict[str, Any] = {}
        self._file, self._tell = file, tell

    def take(self, line: dict[str, Any]) -> None:
        """A line of a child: a result, or the case that it has begun."""
        if "started" in line:
            self.running = {"section": line["section"], "case": line["started"]}
            return
        self.running = {}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._tell(brief(line))

    def context(self, sizes_name: str | None, folder: Path) -> Context:
        """What later sections need of these lines."""
        good = [line for line in self.lines if line["status"] == "ok"]
        peaks = [line["tflops"] for line in good if line["section"] == "environment" and "tflops" in line]
        remat: dict[str, str] = {}
        for line in good:
            if line["section"].startswith("step/") and "remat" in line:
                remat.setdefault(line["step"], line["remat"])
        done = frozenset(line["case"] for line in good)
        peak = max(peaks, default=None)
        sizes = None if sizes_name is None else SIZES[sizes_name]
        return Context(chosen=sizes, folder=folder, peak_tflops=peak, remat=remat, done=done)


def brief(line: dict[str, Any]) -> str:
    """One line for a person who watches."""
    figures = {"tokens_per_second": "{:,.0f} tokens/s", "tflops": "{:.1f} TFLOP/s", "gb_per_second": "{:.1f} GB/s"}
    shown = [form.format(line[name]) for name, form in figures.items() if line.get(name) is not None]
    if "seconds_over_first" in line:
        shown = [f"{name} {ratio:.3f}" for name, ratio in line["seconds_over_first"].items()]
    return f"{line['case']}: {', '.join(shown) or line['status']}{': ' + line['reason'] if 'reason' in line else ''}"


def one(plan: Plan, results: Results, context: Context, log: IO[str], deadline: float) -> None:
    """Runs one process, and adds a line where it did not end well or was not begun."""
    left = deadline - RESERVE - time.monotonic()
    if left < plan.least:
        short = f"{max(0.0, left):.0f} s of the budget were left, and a section is begun with {plan.least:.0f} s"
        for section in plan.sections:
            results.take({"section": section, "case": section, "status": "skipped", "reason": short})
        return
    seconds = min(plan.limit, left)
    log.write(f"\n== {' '.join(plan.sections)}: at most {seconds:.0f} s\n")
    log.flush()
    arguments = ["-m", "benchmarks.accelerator.child", context.dumps(), str(seconds), *plan.sections]
    reason: str | None = "the run was stopped"
    try:
        reason = process.run(arguments, process.environment(plan.sections[0]), log, seconds, results.take)
    finally:
        if reason is not None:
            _ended(plan, results, reason)


def _ended(plan: Plan, results: Results, reason: str) -> None:
    """Lines for a process that did not end well: the case that it was at, and the sections that it never reached."""
    first = plan.sections[0]
    results.take({**(results.running or {"section": first, "case": first}), "status": "failed", "reason": reason})
    told = {line["section"] for line in results.lines}
    for section in plan.sections:
        if section not in told:
            results.take({"section": section, "case": section, "status": "skipped", "reason": "its process had ended"})


def sizes_of(results: Results) -> str | None:
    """The sizes that the environment's section names; None where there is no device to measure."""
    return next((line["sizes"] for line in results.lines if line["case"] == "device" and line["status"] == "ok"), None)
