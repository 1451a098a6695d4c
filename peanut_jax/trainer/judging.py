"""When a run logs, evaluates and saves, and whether an evaluation is the best so far."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from peanut_jax.trainer.config import Loop, Run

# What a checkpoint holds besides the state: the best value of `loop.best`, the evaluations since then, and whether the
# run is over.
FRESH: Mapping[str, Any] = {"best": None, "since_best": 0, "done": False}


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool


def due(loop: Loop, step: int, total: int, *, evaluates: bool, ending: bool, owed: bool = False) -> Due:
    """What is to be done after `step` of `total` steps.

    Args:
        evaluates: Whether there are data to evaluate on.
        ending: Whether a signal or the end of the data makes this the last step.
        owed: Whether a checkpoint was put off.
    """
    evaluate = evaluates and (step == total or (loop.eval_every is not None and step % loop.eval_every == 0))
    save = ending or owed or step == total or evaluate or step % loop.save_every == 0
    return Due(log=save or step % loop.log_every == 0, evaluate=evaluate, save=save)


def judged(record: Mapping[str, Any], found: Mapping[str, float], run: Run) -> dict[str, Any]:
    """The record after an evaluation: whether it is the best so far, and whether patience is at its end."""
    value, sign = found[run.loop.best], -1 if run.best_mode == "min" else 1
    best, since_best = record["best"], record["since_best"] + 1
    if math.isfinite(value) and (best is None or sign * value > sign * best):
        best, since_best = value, 0
    return {"best": best, "since_best": since_best, "done": _impatient(since_best, run.loop)}


def is_over(record: Mapping[str, Any], loop: Loop, step: int, total: int) -> bool:
    """Whether a run that goes on after `step` has nothing to do: more steps than at its start may be asked for.

    Raises:
        ValueError: a run of fewer steps than were taken.
    """
    if step > total:
        raise ValueError(f"step {step} is taken already, and the run is to have {total}: give it at least {step} steps")
    return step == total or _impatient(record["since_best"], loop)


def _impatient(since_best: int, loop: Loop) -> bool:
    return loop.patience is not None and since_best >= loop.patience
