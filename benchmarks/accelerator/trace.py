"""A profile of the main step: which kernels its time goes to."""

import collections
import gzip
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.accelerator.context import Context
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.step import Case, first_that_fits, peanut_of, setting

STEPS, TOP = 3, 40
# Characters of a kernel's name in the summary.
NAME = 110


def run(record: Record, context: Context) -> None:
    """Traces some steps of the swept setting with PEANuT; `trace.xplane.pb.gz` and `profile.txt` in the folder."""
    name = context.sizes.swept
    step, params = setting(context, name)
    method = peanut_of(step)
    kept = context.remat.get(name)
    cases = [Case(name, step, method, policy) for policy in (step.remat if kept is None else (kept,))]
    line, stepper = first_that_fits(record.afresh(), context, cases, params)
    if line is None or stepper is None:
        return

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # of the host nothing is read, and the hook in every Python call costs time

    def trace() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                for _ in range(STEPS):
                    stepper()
            (file,) = Path(folder).rglob("*.xplane.pb")
            with file.open("rb") as source, gzip.open(context.folder / "trace.xplane.pb.gz", "wb") as target:
                shutil.copyfileobj(source, target)
            return summary(file, context.folder / "profile.txt", line["case"])

    record.run("profile", trace, {"step": name, "method": method, "steps": STEPS})


def summary(file: Path, text: Path, title: str) -> dict[str, Any]:
    """Writes the kernels by their time as text, and gives the first of them.

    Raises:
        NotImplementedError: a jax that cannot read what it has written.
    """
    read = getattr(jax.profiler, "ProfileData", None)
    if read is None:
        raise NotImplementedError("this jax has no jax.profiler.ProfileData: open trace.xplane.pb.gz with xprof")
    seconds, counts = collections.defaultdict[str, float](float), collections.Counter[str]()
    data = read.from_file(str(file))
    for kernel, duration in kernels(data):
        seconds[kernel] += duration / 1e9
        counts[kernel] += 1
    if not seconds:
        seen = [f"{plane.name}: {', '.join(line.name for line in plane.lines)}" for plane in data.planes]
        raise LookupError(f"the trace names no kernels; its planes are {'; '.join(seen)}")
    total = sum(seconds.values())
    rows = [
        {
            "kernel": kernel[:NAME],
            "ms_a_step": 1e3 * taken / STEPS,
            "share": taken / total,
            "calls_a_step": counts[kernel] / STEPS,
        }
        for kernel, taken in sorted(seconds.items(), key=lambda item: -item[1])[:TOP]
    ]
    lines = [f"{title}: {1e3 * total / STEPS:.2f} ms of kernels a step, the {len(rows)} longest of {len(seconds)}", ""]
    lines += [f"{'ms a step':>10} {'share':>7} {'calls':>8}  kernel"]
    lines += [f"{r['ms_a_step']:10.3f} {r['share']:7.2%} {r['calls_a_step']:8.1f}  {r['kernel']}" for r in rows]
    text.write_text("\n".join(lines) + "\n")
    return {"ms_of_kernels_a_step": 1e3 * total / STEPS, "kernels": rows[:TOP]}


def kernels(data: Any) -> Iterator[tuple[str, float]]:
    """Name and nanoseconds of everything that ran on the device.

    On a GPU those are the events of its streams, on a TPU the line "XLA Ops", on CPU those of XLA's own threads.
    """
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name.upper()]
    for plane in devices or planes:
        for line in plane.lines:
            name = line.name
            on_cpu = not devices and name.startswith(("tf_XLA", "XLA"))
            if name.startswith("Stream") or (devices and name == "XLA Ops") or on_cpu:
                for event in line.events:
                    if not event.name.startswith("ThunkExecutor"):  # of CPUs: around the kernels
                        yield event.name, event.duration_ns
