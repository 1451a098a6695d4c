"""Wall-clock comparison on a noisy machine: alternate the candidates in one process, quote medians and ratios."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def alternate(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each step, in turn; a step must block until its work is done. One warm-up each."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def stepping(step: Callable, state: Any, *args: Any) -> Callable[[], None]:
    """A call of `step(state, *args) -> (state, metrics)` for `alternate`, which goes on from the state before."""
    holder = [state]

    def run() -> None:
        holder[0], metrics = step(holder[0], *args)
        jax.block_until_ready((holder[0], metrics))

    return run


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """The median of the ratios of neighbouring repeats, which slow drifts of the machine leave alone."""
    return float(np.median(np.asarray(seconds) / np.asarray(reference)))


def repeated(step: Callable[[], object], *, seconds: float, least: int = 3, most: int = 30) -> list[float]:
    """Seconds of each repeat of one step, which must block until its work is done.

    Args:
        seconds: After this long no further repeat begins, once there are `least`; the first, a warm-up, is not counted.
    """
    step()
    taken: list[float] = []
    while len(taken) < least or (sum(taken) < seconds and len(taken) < most):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return taken
