"""What is compiled for a run: its train step, and the sums of its evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

import peanut_jax as pj
from peanut_jax.sharding import batch_sharding, constrain, init_state, mesh_of, sharded_train_step
from peanut_jax.trainer.config import Run
from peanut_jax.trainer.data import batch_shapes, in_order
from peanut_jax.trainer.guard import guard, guarded
from peanut_jax.trainer.remat import first_fitting
from peanut_jax.trainer.rows import Rows
from peanut_jax.trainer.tasks.base import Task
from peanut_jax.training import LossFn, TrainState

AHEAD = 2  # batches that are sent off before the first of them is done


class Programs(NamedTuple):
    """The compiled parts of a run, which runs that differ in their seeds alone can share.

    Attributes:
        step: (state, params, batch) -> (state, metrics); the state is donated.
        sums: (adapters, params, batch) -> sums of each metric over the batch, and `weight`.
        run: What they were compiled for.
        remat: The policy that was chosen, and why; None where there was nothing to choose.
    """

    step: jax.stages.Compiled
    sums: Callable[[PyTree, PyTree, Any], dict[str, jax.Array]]
    run: Run
    remat: tuple[str, str] | None = None

    def check(self, run: Run) -> None:
        """Refuses a run that these were not compiled for.

        Raises:
            ValueError: naming the parts of the run that differ.
        """
        loop = dataclasses.replace(run.loop, seed=self.run.loop.seed)
        there, here = vars(self.run), vars(dataclasses.replace(run, loop=loop))
        if different := [name for name in here if there[name] != here[name]]:
            raise ValueError(
                f"the programs were compiled for another {', '.join(different)}: compile them for this run"
            )


def optimizer(run: Run, task: Task) -> optax.GradientTransformation:
    """The run's optimizer, which stands still where a gradient is not finite."""
    return guard(run.optimizer.transformation(run.loop.total(len(task.train))))


def first_state(run: Run, task: Task) -> TrainState:
    """The state before the first step, on the mesh of the task's params."""
    return init_state(jax.random.key(run.loop.seed), task.params, run.adapter, optimizer(run, task))


def compile_programs(run: Run, task: Task, state: TrainState, remat: str | None = None) -> Programs:
    """Compiles the train step for the shapes of `state` and of the task's rows; `sums` compiles when first called.

    Args:
        remat: Which of `task.remats` to take; None for the first whose step fits the devices.
    """
    sharding = batch_sharding(mesh_of(task.params))
    batch = batch_shapes(task.train, run.loop.batch_size, sharding)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    sums = jax.jit(pj.adapt(constrain(task.sums, task.params), run.adapter), out_shardings=everywhere)

    def compile_step(loss_fn: LossFn) -> jax.stages.Compiled:
        step = sharded_train_step(
            guarded(loss_fn), optimizer(run, task), run.adapter, state, task.params,
            accumulate_steps=run.loop.accumulate_steps,
        )  # fmt: skip
        return step.lower(state, task.params, batch).compile()

    if not task.remats:
        return Programs(compile_step(task.loss_fn), sums, run)
    if remat is not None and remat in task.remats:
        return Programs(compile_step(task.remats[remat]), sums, run, (remat, "as before on these devices"))
    found = first_fitting(task.remats, compile_step, mesh_of(task.params))
    return Programs(found.step, sums, run, (found.policy, found.reason))


def evaluate(programs: Programs, adapters: PyTree, params: PyTree, rows: Rows, batch_size: int) -> dict[str, float]:
    """The mean of each metric over all rows, by the weights of their labels."""
    parts: list[dict[str, jax.Array]] = []
    for batch in in_order(rows, batch_size=batch_size, sharding=batch_sharding(mesh_of(params))):
        parts.append(programs.sums(adapters, params, batch))
        if len(parts) > AHEAD:  # or the device would hold the batches of the whole evaluation
            jax.block_until_ready(parts[-1 - AHEAD])
    totals = jax.tree.map(lambda *values: float(np.sum(jax.device_get(values), dtype=np.float64)), *parts)
    weight = totals.pop("weight")
    return {name: value / weight for name, value in totals.items()}
