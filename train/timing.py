"""Time and memory of compiled train steps."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from peanut_jax.training import TrainState


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


def stepper(step: jax.stages.Compiled, state: TrainState, params: PyTree, batch: PyTree) -> Callable[[], None]:
    """A function that takes one train step, from where the one before ended, and waits for it."""
    state = jax.tree.map(jnp.copy, state)  # the step donates its state

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
