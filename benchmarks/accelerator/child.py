"""The process of one or more sections: `python -m benchmarks.accelerator.child CONTEXT SECONDS SECTION...`."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TextIO

from benchmarks.accelerator.context import Context, loads
from benchmarks.accelerator.record import Record

# Kept from the limit at which the process is ended, so that the last line gets out.
RESERVE = 2.0


def work_of(section: str) -> Callable[[Record, Context], None]:
    """What a section does. Only what it needs is imported: torch and jax never meet in one process."""
    kind, _, rest = section.partition("/")
    if kind == "torch":
        from benchmarks.accelerator import torch_step

        return torch_step.run
    if kind in ("step", "remat", "roads"):
        from benchmarks.accelerator import step

        fields = {"remat": "remat", "roads": "attention"}
        return partial(step.run, name=rest) if kind == "step" else partial(step.sweep, field=fields[kind])
    if kind in ("merge", "load"):
        from benchmarks.accelerator import files

        return {"merge": files.run_merge, "load": files.run_load}[kind]
    if kind == "profile":
        from benchmarks.accelerator import trace

        return trace.run
    if kind == "environment":
        from benchmarks.accelerator import environment

        return environment.run
    if kind == "attention":
        from benchmarks.accelerator import attention

        return attention.run
    from benchmarks.accelerator import decode

    return decode.run


def run(section: str, record: Record, context: Context) -> None:
    work_of(section)(record, context)


def own_stdout() -> TextIO:
    """The pipe to the parent. What libraries print from now on goes to the log."""
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return pipe


def main() -> None:
    context, seconds, sections = loads(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    deadline, out, done = time.monotonic() + seconds - RESERVE, own_stdout(), set(context.done)
    for section in sections:
        record = Record(out, section, deadline, done)
        record.section(partial(run, section, record, context))


if __name__ == "__main__":
    main()
