"""The watch over a run: times of the steps, their metrics, NaNs, and which checkpoints are good."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from peanut_jax.run_checkpoints import Checkpoints
from peanut_jax.trainer.config import Loop, Run
from peanut_jax.trainer.distributed import is_first
from peanut_jax.trainer.guard import leaf_name, not_finite
from peanut_jax.trainer.programs import AHEAD
from peanut_jax.trainer.progress import Meter, progress
from peanut_jax.trainer.recorder import Recorder
from peanut_jax.trainer.tasks.base import Task
from peanut_jax.training import TrainState

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def watching(
    run: Run, task: Task, folder: Path, state: TrainState, checkpoints: Checkpoints, quiet: bool
) -> Iterator["Watch"]:
    """A watch that writes into the run's folder and shows a progress bar, both on the first process alone.

    Args:
        state: That the run goes on from; what was written of later steps is dropped.
        quiet: Show no progress bar.
    """
    total, start = run.loop.total(len(task.train)), int(state.step)
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(Recorder(folder, resume_step=start)) if is_first() else None
        bar = progress(total, start, "training", rate_unit=f"{task.unit}/s", enabled=is_first() and not quiet)
        yield Watch(run.loop, state, run.optimizer.rate(total), recorder, stack.enter_context(bar), checkpoints)


class Watch:
    """Times the steps, reads their metrics in blocks so that the device is not kept waiting, and looks for NaNs.

    A checkpoint is good once a loss of its adapters was finite: that of the next step, or of an evaluation.
    """

    def __init__(
        self,
        loop: Loop,
        state: TrainState,
        rate: optax.Schedule,
        recorder: Recorder | None,
        meter: Meter,
        checkpoints: Checkpoints,
    ) -> None:
        self.loop, self.rate, self.recorder, self.meter, self.checkpoints = loop, rate, recorder, meter, checkpoints
        self.bad = int(state.opt_state[0].streak)  # steps in a row that were not finite
        self.owed = False  # whether a checkpoint was put off until a step is finite again
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

    def evaluated(self, step: int, found: Mapping[str, float]) -> None:
        """Writes down an evaluation; one that is not finite is told at once."""
        self.write(step, {f"eval/{name}": value for name, value in found.items()})
        if not is_finite(found):
            figures = ", ".join(f"{name} {value:g}" for name, value in found.items())
            logger.warning("the evaluation after step %d is not finite: %s", step, figures)

    def may_save(self, state: TrainState, found: Mapping[str, float] | None, *, last: bool) -> bool:
        """Whether a checkpoint of this state may be written. In a streak it is put off: the adapters stand still.

        Args:
            state: After the last step of the last block.
            found: Its evaluation, if there was one.
            last: Whether no step comes after it, whose loss would tell whether it is good.

        Raises:
            ValueError: adapters or moments that are not finite; the last state of a run, within a streak.
        """
        step = int(state.step)
        if leaf := not_finite(state):
            raise ValueError(f"step {step} left {leaf!r} with numbers that are not finite; {self._way_on()}")
        self.owed = self.bad > 0 and not is_finite(found)
        if self.owed and last:
            raise ValueError(
                f"the run ends at step {step} with {self.bad} steps in a row whose loss or gradient was not finite, so "
                f"that its adapter may be of no use; {self._way_on()}"
            )
        return not self.owed

    def _check(self, step: int, values: Mapping[str, np.ndarray], state: TrainState) -> None:
        if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
            self.bad = 0
            self.checkpoints.confirm()  # the newest one was saved before this block of steps
            return
        self.bad += 1
        if self.loop.nonfinite == "skip" and self.bad <= self.loop.max_skipped:
            return
        worst = leaf_name(state.adapters, int(state.opt_state[0].worst))
        raise ValueError(
            f"step {step}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}, {self.bad} such in a row; "
            f"the worst leaf is {worst!r}; {self._way_on()}"
        )

    def _way_on(self) -> str:
        """Which checkpoint is good, and what can be done."""
        good, steps = self.checkpoints.good(), self.checkpoints.steps()
        later = [step for step in steps if good is None or step > good]
        if not steps:
            known = "there is no checkpoint yet"
        elif good is None:
            known = f"no checkpoint is known to be good: no step after step {later[0]} was finite"
        else:
            known = f"the last good checkpoint is of step {good}"
            known += f" (to go back to it, remove {later[0]} in checkpoints/)" if later else ""
        skip = "" if self.loop.nonfinite == "skip" else ", or --resume with loop.nonfinite=skip"
        return f"{known}; start anew with a lower learning rate{skip}"


def is_finite(found: Mapping[str, float] | None) -> bool:
    """Whether there was an evaluation, and each of its metrics is a finite number."""
    return found is not None and all(math.isfinite(value) for value in found.values())
