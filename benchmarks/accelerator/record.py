"""A section's results: one JSON line for each case, also for one that failed or no longer fits the time."""

import gc
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from peanut_jax.messages import one_line

# Characters of a failure's reason.
REASON = 300
OUT_OF_MEMORY = "out of memory"
# What allocators say: XLA's status, torch's exception, XLA's compiler, the operating system.
_SIGNS = ("resource_exhausted", "out of memory", "allocate memory", "outofmemory", "memoryerror", "does not fit")


class DoesNotFit(Exception):
    """A compiled program that needs more memory than the device has."""


class Record:
    """Runs cases one after the other and writes a line for each as soon as it is known.

    Args:
        out: Where the lines go.
        section: Name of the section, part of every line.
        deadline: Time (`time.monotonic`) at which the process is ended.
        done: Names of cases that are measured already; those that this section measures are added.
    """

    def __init__(self, out: TextIO, section: str, deadline: float, done: set[str]):
        self._out, self._section, self._deadline, self._done = out, section, deadline, done
        self._longest = 0.0
        self.out_of_memory = False  # whether the last case was

    def afresh(self) -> "Record":
        """The same, but for cases that are measured already: they are run again."""
        return Record(self._out, self._section, self._deadline, set())

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def run(
        self,
        case: str,
        work: Callable[[], Mapping[str, Any]],
        about: Mapping[str, Any] | None = None,
        needs: float | None = None,
        at_first: float = 0.0,
    ) -> dict[str, Any] | None:
        """Runs one case and writes its line.

        Args:
            case: Its name, unique among all sections' cases.
            work: Gives the fields of the line.
            about: Fields that the line has whatever happens.
            needs: Seconds that it takes about; None for as many as the longest case so far took.
            at_first: As many where it is the first.

        Returns:
            The line, or None where it is not "ok".
        """
        self.out_of_memory = False
        if case in self._done:
            return None
        needs = self._longest or at_first if needs is None else needs
        line = {"section": self._section, "case": case, **(about or {})}
        if self.seconds_left < needs:
            reason = f"{max(0.0, self.seconds_left):.0f} s were left, and it takes about {needs:.0f} s"
            self._write({**line, "status": "skipped", "reason": reason})
            return None
        self._write({"section": self._section, "started": case})
        began = time.monotonic()
        line |= self._outcome(work)
        self.out_of_memory = line.get("reason", "").startswith(OUT_OF_MEMORY)
        self._longest = max(self._longest, time.monotonic() - began)
        self._write({**line, "case_seconds": time.monotonic() - began})
        if line["status"] != "ok":
            return None
        self._done.add(case)
        return line

    def section(self, work: Callable[[], None]) -> None:
        """Runs the section itself; what fails outside its cases, such as drawing weights, is a line of its own."""

        def whole() -> dict[str, Any]:
            work()
            return {}

        outcome = self._outcome(whole)
        if outcome["status"] != "ok":
            self._write({"section": self._section, "case": self._section, **outcome})

    def _outcome(self, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The work's fields, or why there are none.

        Whatever goes wrong in one case is what its line says, and the next one runs: no error of a driver, a compiler
        or an allocator can be foreseen here.
        """
        try:
            return {"status": "ok", **work()}
        except Exception as error:
            outcome = {"status": "failed", "reason": reason_of(error)}
        gc.collect()  # the error's frames held the case's arrays
        return outcome

    def _write(self, line: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def reason_of(error: Exception) -> str:
    """Why a case failed, in one line: its kind in front where that tells more than the message."""
    told = one_line(error, REASON)
    if any(sign in f"{type(error).__name__} {error}".lower() for sign in _SIGNS):
        return f"{OUT_OF_MEMORY}: {told}"
    if isinstance(error, ValueError | NotImplementedError):
        return f"refused: {told}"
    return told if told.startswith(type(error).__name__) else f"{type(error).__name__}: {told}"
