"""The methods of the quickstart, trained from each seed by the trainer's loop, and timed side by side."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

import peanut_jax as pj
from peanut_jax.methods.base import Method
from peanut_jax.sharding import batch_sharding, make_mesh, mesh_of
from peanut_jax.trainer import Loop, Optimizer, Run, train
from peanut_jax.trainer.data import batches
from peanut_jax.trainer.metrics_file import read_metrics
from peanut_jax.trainer.programs import Programs, compile_programs, evaluate, first_state
from peanut_jax.trainer.tasks.base import Task
from train import report
from train.digits import Digits
from train.methods import Entry
from train.timing import planned_bytes, seconds_in_turns, stepper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how often to train."""

    seeds: tuple[int, ...]
    pretrain: Loop
    adapt: Loop


def run_of(
    task: Digits, config: Method, loop: Loop, learning_rate: float, saved_learning_rate: float | None = None
) -> Run:
    """A run with Adam that warms up for a tenth of the steps, then decays along a cosine to 0."""
    assert loop.steps is not None  # not epochs
    optimizer = Optimizer(
        learning_rate=learning_rate,
        saved_learning_rate=saved_learning_rate,
        warmup_steps=loop.steps // 10,
        max_grad_norm=None,
    )
    return Run(task=task, adapter=config, optimizer=optimizer, loop=loop)


def accuracies(folder: Path) -> dict[int, float]:
    """Step -> test accuracy, at each evaluation of a run."""
    return {int(row["step"]): row["eval/accuracy"] for row in read_metrics(folder) if "eval/accuracy" in row}


class Trained(NamedTuple):
    """A method after its training.

    Attributes:
        programs: What all seeds ran.
        state: The state before the first step of the last seed.
        task: The task of the last seed.
        folders: The runs' folders, one a seed.
        test_accuracy: Step -> test accuracy, one a seed; at step 0 before any training.
    """

    entry: Entry
    programs: Programs
    state: pj.TrainState
    task: Task
    folders: list[Path]
    test_accuracy: list[dict[int, float]]


def train_method(
    entry: Entry, checkpoint: Path, base_name: str, folder: Path, settings: Settings, progress: Progress
) -> Trained:
    """Trains one method from every seed, with programs that are compiled once.

    Args:
        checkpoint: The folder of the pretrained model.
        base_name: What the adapters record as their base.
        folder: Takes the runs, each in a folder of its own.
    """
    bar = progress.add_task(entry.name, total=len(settings.seeds))
    config = dataclasses.replace(entry.config, base_model_name_or_path=base_name)
    programs: Programs | None = None
    folders, curves = [], []
    for seed in settings.seeds:
        loop = dataclasses.replace(settings.adapt, seed=seed)
        digits = Digits(model=str(checkpoint))
        run = run_of(digits, config, loop, entry.learning_rate, entry.saved_learning_rate)
        task = digits.build(make_mesh(run.mesh), run.rules, seed)
        state = first_state(run, task)
        programs = programs or compile_programs(run, task, state)
        assert task.evaluation is not None
        start = evaluate(programs, state.adapters, task.params, task.evaluation, loop.batch_size)
        folders.append(folder / re.sub(r"\W+", "-", entry.name.lower()) / f"seed-{seed}")
        train(run, folders[-1], task=task, programs=programs, quiet=True)
        curves.append({0: start["accuracy"]} | accuracies(folders[-1]))
        progress.advance(bar)
    assert programs is not None  # there is a seed
    return Trained(entry, programs, state, task, folders, curves)


def step_seconds(trained: Sequence[Trained], batch_size: int) -> list[float]:
    """The time of a train step of each method."""

    def stepper_of(one: Trained) -> Callable[[], None]:
        sharding = batch_sharding(mesh_of(one.task.params))
        batch = next(batches(one.task.train, batch_size=batch_size, seed=0, start=0, stop=1, sharding=sharding))
        return stepper(one.programs.step, one.state, one.task.params, batch)

    return seconds_in_turns([stepper_of(one) for one in trained])


def result_of(trained: Trained, seconds: float) -> report.Result:
    """The method's row of the report, with the time of a step in seconds."""
    entry = trained.entry
    return report.Result(
        method=entry.name,
        trainable_parameters=pj.count(trained.state.adapters),
        learning_rate=entry.learning_rate,
        saved_learning_rate=entry.saved_learning_rate,
        step_seconds=seconds,
        step_bytes=planned_bytes(trained.programs.step),
        eval_steps=list(trained.test_accuracy[0]),
        test_accuracy=[list(curve.values()) for curve in trained.test_accuracy],
    )
