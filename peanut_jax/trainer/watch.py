"""The watch over a run: times of the steps, their metrics, and NaNs."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from peanut_jax.trainer.config import Loop, Run
from peanut_jax.trainer.distributed import is_first
from peanut_jax.trainer.guard import leaf_name
from peanut_jax.trainer.programs import AHEAD
from peanut_jax.trainer.progress import Meter, progress
from peanut_jax.trainer.recorder import Recorder
from peanut_jax.trainer.tasks.base import Task
from peanut_jax.training import TrainState


@contextlib.contextmanager
def watching(run: Run, task: Task, folder: Path, start: int, quiet: bool) -> Iterator["Watch"]:
    """A watch that writes into the run's folder and shows a progress bar, both on the first process alone.

    Args:
        start: Steps that were taken before; what was written of later ones is dropped.
        quiet: Show no progress bar.
    """
    total = run.loop.total(len(task.train))
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(Recorder(folder, resume_step=start)) if is_first() else None
        bar = progress(total, start, "training", rate_unit=f"{task.unit}/s", enabled=is_first() and not quiet)
        yield Watch(run.loop, start, run.optimizer.rate(total), recorder, stack.enter_context(bar))


class Watch:
    """Times the steps, reads their metrics in blocks so that the device is not kept waiting, and looks for NaNs."""

    def __init__(self, loop: Loop, start: int, rate: optax.Schedule, recorder: Recorder | None, meter: Meter) -> None:
        self.loop, self.rate, self.recorder, self.meter = loop, rate, recorder, meter
        self.saved = start  # the step of the newest checkpoint, 0 for none
        self.bad = 0  # steps in a row that were not finite
        self.begin()

    def begin(self) -> None:
        """Starts the next block of steps: what came before does not count as step time."""
        self.block: list[tuple[int, Mapping[str, jax.Array]]] = []
        self.units, self.waited, self.since = 0, 0.0, time.perf_counter()

    def waiting(self, fetch: Callable[[], Any]) -> Any:
        """What `fetch` returns; its time counts as waiting for input."""
        began = time.perf_counter()
        found = fetch()
        self.waited += time.perf_counter() - began
        return found

    def took(self, step: int, metrics: Mapping[str, jax.Array], units: int) -> None:
        """A step was sent off; `units` are its tokens or examples."""
        self.block.append((step, metrics))
        self.units += units
        if len(self.block) > AHEAD:  # or the device would hold the batches of a whole block
            jax.block_until_ready(self.block[-1 - AHEAD][1])

    def log(self, state: TrainState) -> None:
        """Waits for the steps of this block, writes down their means, and begins the next block.

        Args:
            state: After the last of them.

        Raises:
            ValueError: a loss or gradient that is not finite, where the run is to stop.
        """
        if not self.block:
            return
        rows = list(zip((step for step, _ in self.block), jax.device_get([m for _, m in self.block]), strict=True))
        seconds = time.perf_counter() - self.since
        self._show(rows, seconds)
        for step, values in rows:
            self._check(step, values, state)
        self.begin()

    def _show(self, rows: Sequence[tuple[int, Mapping[str, np.ndarray]]], seconds: float) -> None:
        """The means of a block of steps that took so many seconds."""
        step, n = rows[-1][0], len(rows)
        kept = [name for name in rows[0][1] if name != "weight"]
        means = {f"train/{name}": float(np.mean([values[name] for _, values in rows])) for name in kept}
        rest = {
            "train/learning_rate": float(self.rate(step - 1)),
            "train/step_seconds": seconds / n,
            "train/per_second": self.units / seconds,
            "train/input_wait": self.waited / seconds,
        }
        self.write(step, means | rest)
        self.meter.update(step, loss=means["train/loss"], rate=self.units / seconds, step_seconds=seconds / n)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics down, on the first process."""
        if self.recorder is not None:
            self.recorder.log(step, values)

    def _check(self, step: int, values: Mapping[str, np.ndarray], state: TrainState) -> None:
        if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
            self.bad = 0
            return
        self.bad += 1
        skips = self.loop.nonfinite == "skip"
        if skips and self.bad <= self.loop.max_skipped:
            return
        worst = leaf_name(state.adapters, int(state.opt_state[0].worst))
        good = f"the last good checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
        advice = "start anew with a lower learning rate"
        advice += "" if skips else ", or --resume with loop.nonfinite=skip"
        raise ValueError(
            f"step {step}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}, {self.bad} such in a row; "
            f"the worst leaf is {worst!r}; {good}: {advice}"
        )
