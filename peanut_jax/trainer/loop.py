"""The loop: from a config to a folder that holds an adapter, its curves, and the checkpoints to go on from."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import peanut_jax as pj
from peanut_jax.run_checkpoints import Checkpoints, differences, read_about
from peanut_jax.sharding import (
    batch_sharding,
    check_batch,
    constrain,
    init_state,
    make_mesh,
    mesh_of,
    sharded_train_step,
)
from peanut_jax.trainer import tasks
from peanut_jax.trainer.config import Run
from peanut_jax.trainer.data import batch_shapes, batches, identity, in_order
from peanut_jax.trainer.distributed import is_first, on_first, several
from peanut_jax.trainer.guard import guard, guarded, leaf_name
from peanut_jax.trainer.recorder import Meter, Recorder, plot_curves, progress
from peanut_jax.trainer.run_folder import describe, note_resume, open_run, write_run
from peanut_jax.training import TrainState

CHECKPOINTS, ADAPTER, BEST = "checkpoints", "adapter", "best"
_AHEAD = 2  # steps that are sent off before the first of them is done


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        step: The last that was taken.
        total: Of the config.
        early: Whether `patience` ended it.
        signal: The name of the one that stopped it; it can be resumed.
    """

    step: int
    total: int
    early: bool = False
    signal: str | None = None

    @property
    def complete(self) -> bool:
        """Whether there is nothing to resume."""
        return self.early or self.step == self.total


def train(run: Run, folder: Path, *, resume: bool = False) -> Outcome:
    """Trains into `folder`, or goes on with the run that is there.

    Returns:
        Where it ended: after the last step, or early by `patience` or a signal, with everything saved.

    Raises:
        ValueError, FileNotFoundError: a config, model, data or folder that does not fit; a resume with another config
            or base; a loss or gradient that is not finite; data that ends early.
        OSError: a checkpoint that could not be written.
    """
    with contextlib.ExitStack() as stack:
        mesh = make_mesh(run.mesh)
        check_batch(run.loop.batch_size, mesh, run.loop.accumulate_steps)
        on_first(lambda: _open(run, folder, stack, resume))
        task = tasks.build(run.task, mesh, run.rules, run.loop.seed)
        data = {name: identity(rows) for name in ("train", "evaluation") if (rows := getattr(task, name)) is not None}
        about = {"config": run.identity(), "base": pj.fingerprint(task.params, run.adapter), "data": data}
        checkpoints = stack.enter_context(
            Checkpoints(
                folder / CHECKPOINTS, about, keep_last=run.loop.keep_last,
                best=run.loop.best if task.evaluation else None, best_mode=run.loop.best_mode,
            )
        )  # fmt: skip
        outcome, state = _fit(run, task, folder, checkpoints, stack, resume)
        if outcome.complete:
            _finish(run, task, folder, checkpoints, state)
        return outcome


def _open(run: Run, folder: Path, stack: contextlib.ExitStack, resume: bool) -> None:
    """Takes the run's folder, on the first process; what was trained there must be of the same config."""
    stack.enter_context(open_run(folder, resume=resume))
    about = read_about(folder / CHECKPOINTS)
    if about is None:
        write_run(folder, describe(run.as_json()))
    elif different := list(differences(about["config"], run.identity(), "config")):
        raise ValueError(f"{folder} holds another run (there, here): {'; '.join(different)}")


def _fit(
    run: Run, task: tasks.Task, folder: Path, checkpoints: Checkpoints, stack: contextlib.ExitStack, resume: bool
) -> tuple[Outcome, TrainState]:
    loop, total = run.loop, run.loop.total(len(task.train))
    tx = guard(run.optimizer.transformation(total))
    state = init_state(jax.random.key(loop.seed), task.params, run.adapter, tx)
    record: dict[str, Any] = {"best": None, "since_best": 0, "done": False}
    if resume:
        state, record = checkpoints.restore(state) or (state, record)
        on_first(lambda: note_resume(folder, int(state.step)))
    if record["done"]:
        return Outcome(int(state.step), total, early=int(state.step) < total), state
    sharding = batch_sharding(mesh_of(task.params))
    compiled = _compiled(run, task, tx, state, sharding)
    evaluate = _evaluator(run, task, sharding)

    start = int(state.step)
    recorder = stack.enter_context(Recorder(folder, resume_step=start)) if is_first() else None
    meter = stack.enter_context(progress(total, start, "training", rate_unit=f"{task.unit}/s", enabled=is_first()))
    asked = stack.enter_context(_signalled())
    watch = _Watch(run, start, run.optimizer.rate(total), recorder, meter)
    source = batches(task.train, batch_size=loop.batch_size, seed=loop.seed, start=start, stop=total, sharding=sharding)
    step, signal_name = start, None
    while step < total and signal_name is None and not record["done"]:
        batch = watch.waiting(lambda: next(source, None))
        if batch is not None:
            state, metrics = compiled(state, task.params, batch)
            step += 1
            watch.took(step, metrics, task.count(batch))
            signal_name = asked(step)
        last = step == total or batch is None or signal_name is not None
        judge = evaluate and (step == total or (loop.eval_every and step % loop.eval_every == 0))
        save = last or judge or step % loop.save_every == 0
        if save or step % loop.log_every == 0:
            watch.log(state)  # before anything is saved: it looks for NaNs
        found = evaluate(state) if evaluate and judge else None
        if found:
            watch.write(step, {f"eval/{name}": value for name, value in found.items()})
            _judge(record, found, run)
        if save:
            record["done"] = record["done"] or step == total
            checkpoints.save(state, record, found)
            watch.saved = step
            watch.begin()
        if batch is None:
            raise ValueError(f"the data ended after step {step} of {total}; the checkpoint of that step is saved")
    return Outcome(step, total, early=record["done"] and step < total, signal=signal_name), state


def _compiled(
    run: Run, task: tasks.Task, tx: optax.GradientTransformation, state: TrainState, sharding: NamedSharding
) -> jax.stages.Compiled:
    """The train step, compiled before the first batch is there."""
    step = sharded_train_step(
        guarded(task.loss_fn), tx, run.adapter, state, task.params, accumulate_steps=run.loop.accumulate_steps
    )
    return step.lower(state, task.params, batch_shapes(task.train, run.loop.batch_size, sharding)).compile()


def _evaluator(run: Run, task: tasks.Task, sharding: NamedSharding) -> Callable[[TrainState], dict[str, float]] | None:
    """state -> the means over the evaluation data."""
    if task.evaluation is None:
        return None
    rows, size = task.evaluation, run.loop.batch_size
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    sums = jax.jit(pj.adapt(constrain(task.sums, task.params), run.adapter), out_shardings=everywhere)

    def evaluate(state: TrainState) -> dict[str, float]:
        parts = [
            sums(state.adapters, task.params, batch) for batch in in_order(rows, batch_size=size, sharding=sharding)
        ]
        totals = jax.tree.map(lambda *values: float(np.sum(jax.device_get(values), dtype=np.float64)), *parts)
        weight = totals.pop("weight")
        return {name: value / weight for name, value in totals.items()}

    return evaluate


def _judge(record: dict[str, Any], found: Mapping[str, float], run: Run) -> None:
    """Whether this evaluation is the best so far, and whether patience is at its end."""
    value, sign = found[run.loop.best], -1 if run.loop.best_mode == "min" else 1
    best = record["best"]
    if not math.isnan(value) and (best is None or sign * value > sign * best):
        record |= {"best": value, "since_best": 0}
    else:
        record["since_best"] += 1
    record["done"] = run.loop.patience is not None and record["since_best"] >= run.loop.patience


class _Watch:
    """Times the steps, reads their metrics in blocks so that the device is not kept waiting, and looks for NaNs."""

    def __init__(self, run: Run, start: int, rate: optax.Schedule, recorder: Recorder | None, meter: Meter) -> None:
        self.loop, self.rate, self.recorder, self.meter = run.loop, rate, recorder, meter
        self.saved = start  # the step of the newest checkpoint, 0 for none
        self.bad = 0  # steps in a row that were not finite
        self.begin()

    def begin(self) -> None:
        """Starts the next block: what came before does not count as step time."""
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
        if len(self.block) > _AHEAD:  # or the device would hold the batches of a whole block
            jax.block_until_ready(self.block[-1 - _AHEAD][1])

    def log(self, state: TrainState) -> None:
        """Waits for the steps of this block and writes down their means.

        Args:
            state: After the last of them.

        Raises:
            ValueError: a loss or gradient that is not finite, where the run is to stop.
        """
        if not self.block:
            return
        steps, metrics = zip(*self.block, strict=True)
        rows = list(zip(steps, jax.device_get(metrics), strict=True))
        seconds = time.perf_counter() - self.since
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
        for step, values in rows:
            self._check(step, values, state)
        self.begin()

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


@contextlib.contextmanager
def _signalled() -> Iterator[Callable[[int], str | None]]:
    """`asked(step)`: the name of a signal to stop that came, and after the same step on every process; else None."""
    if several():
        # The processes agree on a step through jax.distributed, which has its own handler for SIGTERM.
        earlier = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        try:
            yield lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        finally:
            signal.signal(signal.SIGINT, earlier)
        return
    came: list[str] = []
    handlers: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, handlers[number])  # a second one ends the process as ever

    handlers.update({number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)})
    try:
        yield lambda step: came[0] if came else None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _finish(run: Run, task: tasks.Task, folder: Path, checkpoints: Checkpoints, state: TrainState) -> None:
    """The adapter after the last step, the best one, and the picture."""
    pj.save_adapter(folder / ADAPTER, state.adapters, run.adapter, task.params)
    if task.evaluation is not None and (found := checkpoints.restore_best(state)):
        pj.save_adapter(folder / BEST, found[0].adapters, run.adapter, task.params)
    on_first(lambda: plot_curves(folder))
