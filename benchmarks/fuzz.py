"""Damaged inputs of every kind: is each read as it was meant, or refused by one readable error?

    python -m benchmarks.fuzz --cases 20000

A case damages one file of a folder that can be read (`benchmarks.damage`) and reads it. It is bad where what comes out
is neither a result of finite arrays nor a ValueError, NotImplementedError or OSError of at most 500 characters on one
line; where it takes over ten seconds of a processor (sixty by the clock) or a gigabyte; or where a file is changed,
made or lost. Cases are drawn from `--seed` and their number: `--only NUMBER` runs one again, with its traceback. One
JSON line a bad case, and one at the end.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.damage import damaged
from benchmarks.fuzz_runs import runs
from benchmarks.fuzz_subjects import Subject, subjects

EXPECTED = (ValueError, NotImplementedError, OSError)
SECONDS, MEGABYTES, CHARACTERS = 10, 1000, 500


class Hang(BaseException):
    """Raised by the alarm: no reader may catch it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What one case did, and what is wrong with how it ended; None where nothing is."""

    number: int
    subject: str
    damage: str
    outcome: str
    seconds: float
    wrong: str | None = None
    trace: str = ""


def run(cases: range, folder: Path, seed: int = 0, subject: str = "") -> Iterator[Case]:
    """Runs the cases of these numbers on the subjects whose names hold `subject`, which are made in `folder`."""
    whole = folder / "whole"
    made = [one for one in (*subjects(whole), *runs(whole)) if subject in one.name]
    for number in cases:
        draw = random.Random(f"{seed} {number}")
        yield _one(number, draw.choice(made), draw, folder / "case")


def _one(number: int, subject: Subject, draw: random.Random, folder: Path) -> Case:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(subject.folder, folder, symlinks=True)
    name = draw.choice(subject.files)
    content, damage = damaged(draw, folder / name)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    before, memory, began = _state(folder), _megabytes(), time.process_time()
    wrong, outcome, trace = None, "read", ""
    try:
        with _limited(SECONDS):
            result = subject.read(folder)
        wrong = None if _is_finite(result) else "not finite"
    except EXPECTED as error:
        outcome, wrong = type(error).__name__, _unreadable(str(error))
        trace = str(error) if wrong else ""
    except (Exception, Hang) as error:  # what a reader let through is what is looked for
        outcome, wrong, trace = type(error).__name__, f"raw {type(error).__name__}", traceback.format_exc()[-3000:]
    seconds = time.process_time() - began
    if wrong is None and _megabytes() - memory > MEGABYTES:
        wrong = f"{_megabytes() - memory:.0f} MB"
    if wrong is None and outcome != "read" and _state(folder) != before:
        wrong = "files changed"
    return Case(number, subject.name, f"{name}: {damage}", outcome, seconds, wrong, trace)


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"over {seconds} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 6 * seconds)}
    earlier = {number: signal.signal(number, stop) for number in timers}
    for timer, after in timers.values():
        signal.setitimer(timer, after)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _unreadable(message: str) -> str | None:
    if len(message) > CHARACTERS:
        return f"an error of {len(message)} characters"
    if not message.strip() or "\n" in message:
        return "an error of no line or of several"
    return None


def _is_finite(result: Any) -> bool:
    arrays = [leaf for leaf in jax.tree.leaves(result) if hasattr(leaf, "dtype")]
    return all(bool(jnp.isfinite(one).all()) for one in arrays if jnp.issubdtype(one.dtype, jnp.floating))


def _state(folder: Path) -> dict[str, str]:
    """Every file and folder, with a digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subject", default="", metavar="NAME", help="subjects whose names hold this, alone")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone, with its traceback")
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    cases = range(args.cases) if args.only is None else range(args.only, args.only + 1)
    count: collections.Counter[str] = collections.Counter()
    bad, slowest, began = 0, 0.0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for case in run(cases, Path(folder), args.seed, args.subject):
            count[f"{case.subject}: {case.outcome}"] += 1
            slowest = max(slowest, case.seconds)
            if case.wrong is not None or args.only is not None:
                bad += case.wrong is not None
                print(json.dumps(dataclasses.asdict(case)), flush=True)
    summary = {"cases": len(cases), "bad": bad, "slowest_seconds": slowest, "seconds": time.perf_counter() - began}
    print(json.dumps(summary | {"outcomes": dict(sorted(count.items()))}))
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
