"""The loop: from a config to a folder that holds an adapter, its curves, and the checkpoints to go on from."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peanut_jax as pj
from peanut_jax.run_checkpoints import Checkpoints
from peanut_jax.sharding import batch_sharding, check_batch, make_mesh, mesh_of
from peanut_jax.trainer.config import Run
from peanut_jax.trainer.curves import plot_curves
from peanut_jax.trainer.data import batches
from peanut_jax.trainer.distributed import is_first, on_first
from peanut_jax.trainer.guard import not_finite
from peanut_jax.trainer.identity import (
    CHECKPOINTS,
    check_config,
    check_identity,
    identify,
    keep_identity,
    kept_identity,
    tell_new_length,
)
from peanut_jax.trainer.judging import FRESH, due, is_over, judged
from peanut_jax.trainer.programs import Programs, compile_programs, evaluate, first_state
from peanut_jax.trainer.progress import show
from peanut_jax.trainer.reading import Origin
from peanut_jax.trainer.remat import keep_policy, kept_policy
from peanut_jax.trainer.run_folder import IDENTITY, SOURCE, describe, note_resume, open_run, update_run, write_run
from peanut_jax.trainer.signals import signalled
from peanut_jax.trainer.tasks.base import Task
from peanut_jax.trainer.watch import Watch, is_finite, watching
from peanut_jax.training import TrainState

logger = logging.getLogger(__name__)

ADAPTER, BEST = "adapter", "best"


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        step: The last that was taken.
        total: Steps of the whole run.
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


def train(
    run: Run,
    folder: Path,
    *,
    resume: bool = False,
    task: Task | None = None,
    programs: Programs | None = None,
    quiet: bool = False,
    origin: Origin | None = None,
) -> Outcome:
    """Trains into `folder`, or goes on with the run that is there.

    Args:
        run: What to train.
        folder: New or empty, or that of the run to resume.
        resume: Go on from the newest checkpoint in `folder`.
        task: What `run.task.build` gave; None builds it.
        programs: From `compile_programs`, for this run or one with another seed; None compiles them.
        quiet: Show no progress.
        origin: Where `run` came from, from `reading.read_for`; kept in run.json, for `--resume` to read it again.

    Returns:
        Where it ended: after the last step, or early by `patience` or a signal, with everything saved.

    Raises:
        ValueError, FileNotFoundError: a config, model, data or folder that does not fit; a resume with another config,
            base or data, by name; a loss or gradient that is not finite; data that ends early.
        OSError: a checkpoint that could not be written.
    """
    with contextlib.ExitStack() as stack:
        mesh = make_mesh(run.mesh)
        check_batch(run.loop.batch_size, mesh, run.loop.accumulate_steps)
        on_first(lambda: _open(run, folder, stack, resume))
        if programs is not None:
            programs.check(run)
        task = task or run.task.build(mesh, run.rules, run.loop.seed)
        here, state = identify(run, task), first_state(run, task)
        if programs is None and not resume:
            programs = compile_programs(run, task, state)
        # Late: a start that fails before this leaves the folder as it was.
        on_first(lambda: _claim(run, folder, origin))
        checkpoints = stack.enter_context(_checkpoints(run, task, folder, here))

        def note(step: int) -> None:
            if resume:
                tell_new_length(folder, run, step)
            update_run(folder, run.as_json(), **{IDENTITY: here}, **_source(origin))
            if resume:
                note_resume(folder, step)

        outcome, state = _fit(run, task, state, folder, checkpoints, stack, resume, programs, quiet, note)
        if outcome.complete:
            _finish(run, task, folder, checkpoints, state)
        return outcome


def _open(run: Run, folder: Path, stack: contextlib.ExitStack, resume: bool) -> None:
    """Takes the run's folder, on the first process; what was trained there must be of the same config."""
    stack.enter_context(open_run(folder, resume=resume))
    if (there := kept_identity(folder, tell=True)) is not None:
        check_config(there, run, folder)


def _claim(run: Run, folder: Path, origin: Origin | None) -> None:
    """Writes run.json, on the first process; over that of a run which saved nothing."""
    if kept_identity(folder) is None:
        write_run(folder, {**describe(run.as_json()), **_source(origin)})


def _checkpoints(run: Run, task: Task, folder: Path, here: Mapping[str, Any]) -> Checkpoints:
    """The run's checkpoints, which must be of the same config, base and data as the run `here`."""
    if (there := kept_identity(folder)) is not None:
        check_identity(there, here, run, task, folder)
    on_first(lambda: keep_identity(folder, here))
    return Checkpoints(
        folder / CHECKPOINTS, here, keep_last=run.loop.keep_last,
        best=run.loop.best if task.evaluation else None, best_mode=run.best_mode,
    )  # fmt: skip


def _source(origin: Origin | None) -> dict[str, Any]:
    return {} if origin is None else {SOURCE: origin._asdict()}


def _fit(
    run: Run,
    task: Task,
    state: TrainState,
    folder: Path,
    checkpoints: Checkpoints,
    stack: contextlib.ExitStack,
    resume: bool,
    programs: Programs | None,
    quiet: bool,
    note: Callable[[int], None],
) -> tuple[Outcome, TrainState]:
    """Starts or resumes, and takes the steps. What `stack` is given stays open until the run is finished.

    Args:
        note: Writes down, on the first process, that the run goes on after a step.
    """
    total = run.loop.total(len(task.train))
    record = dict(FRESH)
    if resume:
        state, record = checkpoints.restore(state) or (state, record)
        if leaf := not_finite(state):
            raise ValueError(
                f"the checkpoint of step {int(state.step)} in {folder / CHECKPOINTS} holds numbers that are not "
                f"finite, in {leaf!r}: remove {int(state.step)} there to go on from an older one, or start anew"
            )
    start = int(state.step)
    record["done"] = is_over(record, run.loop, start, total)
    on_first(lambda: note(start))
    if record["done"]:
        return Outcome(start, total, early=start < total), state
    programs = programs or compile_programs(run, task, state, kept_policy(folder, run))
    _keep_remat(programs, run, folder, quiet)
    watch = stack.enter_context(watching(run, task, folder, state, checkpoints, quiet))
    asked = stack.enter_context(signalled())
    return _steps(run, task, state, record, programs, checkpoints, watch, asked)


def _keep_remat(programs: Programs, run: Run, folder: Path, quiet: bool) -> None:
    """Writes down which remat policy was chosen, and shows it, on the first process."""
    if programs.remat is not None:
        policy, reason = programs.remat
        on_first(lambda: keep_policy(folder, run, policy))
        if is_first() and not quiet:
            show(f"train: remat {policy}: {reason}")


def _steps(
    run: Run,
    task: Task,
    state: TrainState,
    record: dict[str, Any],
    programs: Programs,
    checkpoints: Checkpoints,
    watch: Watch,
    asked: Callable[[int], str | None],
) -> tuple[Outcome, TrainState]:
    loop, params, total = run.loop, task.params, run.loop.total(len(task.train))
    step, signal_name = int(state.step), None
    source = batches(
        task.train, batch_size=loop.batch_size, seed=loop.seed, start=step, stop=total,
        sharding=batch_sharding(mesh_of(params)),
    )  # fmt: skip
    while step < total and signal_name is None and not record["done"]:
        batch = watch.waiting(lambda: next(source, None))
        if batch is not None:
            state, metrics = programs.step(state, params, batch)
            step += 1
            watch.took(step, metrics, task.count(batch))
            signal_name = asked(step)
        ending = batch is None or signal_name is not None
        now = due(loop, step, total, evaluates=task.evaluation is not None, ending=ending, owed=watch.owed)
        found = None
        if now.log:
            watch.log(state)  # before anything is saved: it looks for NaNs
        if now.evaluate and task.evaluation is not None:
            found = evaluate(programs, state.adapters, params, task.evaluation, loop.batch_size)
            watch.evaluated(step, found)
            record = judged(record, found, run)
        if now.save:
            record["done"] = record["done"] or step == total
            if watch.may_save(state, found, last=record["done"]) or ending:
                checkpoints.save(state, record, found, good=is_finite(found))
            watch.begin()
        if batch is None:
            raise ValueError(f"the data ended after step {step} of {total}; the checkpoint of that step is saved")
    return Outcome(step, total, early=record["done"] and step < total, signal=signal_name), state


def _finish(run: Run, task: Task, folder: Path, checkpoints: Checkpoints, state: TrainState) -> None:
    """The adapter after the last step, the best one, and the picture."""
    config = run.adapter
    if config.base_model_name_or_path is None:
        config = dataclasses.replace(config, base_model_name_or_path=run.task.model)
    pj.save_adapter(folder / ADAPTER, state.adapters, config, task.params, overwrite=True)
    if task.evaluation is not None and (found := checkpoints.restore_best(state)):
        pj.save_adapter(folder / BEST, found[0].adapters, config, task.params, overwrite=True)
    on_first(lambda: _draw(folder))


def _draw(folder: Path) -> None:
    """The picture; metrics that were lost are no reason for a run to fail at its end."""
    try:
        plot_curves(folder)
    except (ValueError, FileNotFoundError) as error:
        logger.warning("no curves were drawn: %s", error)
