"""What training one method needs, compiled once and shared by all seeds, and the run of one seed."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import peanut_jax as pj
from train.digits import Pictures, Task, batches

LogitsFn = Callable[[PyTree, Array], Array]
LossFn = Callable[[PyTree, Pictures, PRNGKeyArray | None], Array]


class Trainer(NamedTuple):
    """One method as pure functions; all that differs between seeds is passed in.

    Attributes:
        start: (key, params) -> the state before the first step.
        step: (state, params, batch) -> (state, metrics); `params` is the checkpoint. For `compile_step`.
        logits: Jitted, (state, params, images) -> logits.
        trainable: state -> number of trainable parameters.
    """

    start: Callable[[PRNGKeyArray, PyTree], Any]
    step: Callable[[Any, PyTree, Pictures], tuple[Any, dict[str, Array]]]
    logits: Callable[[Any, PyTree, Array], Array]
    trainable: Callable[[Any], int]


class Run(NamedTuple):
    """One seed of one method: its last state, and the test accuracy at every evaluation."""

    state: Any
    eval_steps: list[int]
    accuracies: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to train, and how often to test; the same for every method."""

    n_steps: int
    batch_size: int
    eval_every_steps: int


class PlainState(NamedTuple):
    """The state of training without an adapter: a whole model."""

    params: PyTree
    opt_state: optax.OptState


def plain_trainer(
    logits_fn: LogitsFn, loss_fn: LossFn, tx: optax.GradientTransformation, trained: tuple[str, ...]
) -> Trainer:
    """Trains a copy of the model in the usual way; `trained` names the top-level modules that `tx` does not freeze.

    `loss_fn` gets no key: the models of the quickstart have no dropout.
    """

    def start(key: PRNGKeyArray, params: PyTree) -> PlainState:
        params = jax.tree.map(jnp.array, params)  # a copy: the step donates its state
        return PlainState(params, tx.init(params))

    def step(state: PlainState, params: PyTree, batch: Pictures):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, None)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return PlainState(optax.apply_updates(state.params, updates), opt_state), {"loss": loss}

    return Trainer(
        start=start,
        step=step,
        logits=jax.jit(lambda state, params, images: logits_fn(state.params, images)),
        trainable=lambda state: pj.count({name: state.params[name] for name in trained}),
    )


def compile_step(trainer: Trainer, params: PyTree, task: Task, batch_size: int) -> jax.stages.Compiled:
    """The compiled training step, which donates its state."""
    batch = next(batches(task.train, seed=0, batch_size=batch_size, n_steps=1))
    state = trainer.start(jax.random.key(0), params)
    return jax.jit(trainer.step, donate_argnums=0).lower(state, params, batch).compile()


def planned_bytes(step: jax.stages.Compiled) -> int | None:
    """The device memory that the compiler planned for a step; None where a backend does not tell.

    Arguments + temporaries + outputs, with donated buffers once. A device's own peak counter cannot tell methods apart
    that run in one process: it never goes down.
    """
    plan = step.memory_analysis()
    if plan is None:
        return None
    arguments_and_outputs = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return arguments_and_outputs + plan.temp_size_in_bytes


def fit(
    trainer: Trainer,
    step: jax.stages.Compiled,
    params: PyTree,
    task: Task,
    plan: Plan,
    seed: int,
    advance: Callable[[], None],
) -> Run:
    """Trains one seed. The seed alone decides the batches, so that every method sees the same ones."""
    run = Run(trainer.start(jax.random.key(seed), params), [], [])
    state = run.state

    def evaluate(n_done: int) -> None:
        run.eval_steps.append(n_done)
        run.accuracies.append(accuracy(trainer.logits(state, params, task.test.images), task.test.labels))

    for n_done, batch in enumerate(batches(task.train, seed, plan.batch_size, plan.n_steps)):
        if n_done % plan.eval_every_steps == 0:
            evaluate(n_done)
        state, _ = jax.block_until_ready(step(state, params, batch))
        advance()
    evaluate(plan.n_steps)
    return run._replace(state=state)


def stepper(
    trainer: Trainer, step: jax.stages.Compiled, params: PyTree, task: Task, batch_size: int
) -> Callable[[], None]:
    """A function that takes one training step and waits for it; for `seconds_in_turns`."""
    batch = next(batches(task.train, seed=0, batch_size=batch_size, n_steps=1))
    state = trainer.start(jax.random.key(0), params)

    def take() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, params, batch))

    return take


def seconds_in_turns(steppers: Sequence[Callable[[], None]], n_rounds: int = 40) -> list[float]:
    """The median time of each, taken in turns: what else the machine does then slows all of them alike."""

    def seconds(take: Callable[[], None]) -> float:
        started = time.perf_counter()
        take()
        return time.perf_counter() - started

    for take in steppers:
        take()
    rounds = [[seconds(take) for take in steppers] for _ in range(n_rounds)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def accuracy(logits: Float[Array, "n labels"], labels: Array) -> float:
    """The share of pictures whose largest logit is their label's."""
    return float(jnp.mean(jnp.argmax(logits, axis=-1) == labels))
