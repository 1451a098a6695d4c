"""Orbax's manager of a run's checkpoints, and which of them it keeps: the newest, the best and the last good one."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from peanut_jax.messages import one_line
from peanut_jax.run_checkpoint_leaves import UNREADABLE

# Orbax's own note of a checkpoint, of times and handlers: nothing in it is read here.
_ORBAX_NOTE = "_CHECKPOINT_METADATA"


class Keep:
    """Orbax's preservation policy. Its own, as orbax's opens no folder with a damaged metric.

    Attributes:
        latest: Number of the newest ones.
        sign: 1 where a higher score is better, -1 where a lower one is.
        scores: Step -> score, None where it has none.
        good: Step of the newest one that is known to be good; None where there is none.
    """

    def __init__(self, latest: int, sign: int):
        self.latest, self.sign = latest, sign
        self.scores: dict[int, float | None] = {}
        self.good: int | None = None

    def ranked(self, steps: Sequence[int]) -> list[int]:
        """The steps that have a score, the best first and of equals the newest."""
        scores = {step: score for step in steps if (score := self.scores.get(step)) is not None}
        return sorted(scores, key=lambda step: (self.sign * scores[step], step), reverse=True)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each checkpoint, as orbax asks it."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.latest :], *self.ranked(steps)[:1], self.good}
        return [step in kept for step in steps]


def open_manager(folder: Path, keep: Keep) -> ocp.CheckpointManager:
    """Orbax's manager, which stops at a damaged note of its own: there all of those notes are put out of its way.

    Raises:
        OSError, ValueError: the folder cannot be made or read.
    """
    options = ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True)
    found, cause = None, ""
    with _without_orbax_notes():
        try:
            found = ocp.CheckpointManager(folder, options=options)
        except UNREADABLE as error:
            cause = one_line(error)
        if everywhere(found is not None):
            return found
        notes = list(folder.glob(f"*/{_ORBAX_NOTE}"))
        if not notes:
            raise OSError(cause or "another process cannot open it")
        if jax.process_index() == 0:
            for note in notes:
                note.replace(note.with_name(f"damaged{_ORBAX_NOTE}"))
        multihost_utils.sync_global_devices("peanut_jax.run_checkpoints: orbax's notes renamed")
        return ocp.CheckpointManager(folder, options=options)


@contextlib.contextmanager
def _without_orbax_notes() -> Iterator[None]:
    """Leaves out what orbax logs of its notes: their whole content where one is damaged."""

    def others(record: logging.LogRecord) -> bool:
        return _ORBAX_NOTE not in record.getMessage()

    absl = logging.getLogger("absl")
    absl.addFilter(others)
    try:
        yield
    finally:
        absl.removeFilter(others)


def everywhere(fine: bool) -> bool:
    """Whether it is so on every process; they ask together."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))
