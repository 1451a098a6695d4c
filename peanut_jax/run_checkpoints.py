"""Checkpoints of one training run: adapters, optimizer state, step and PRNG key, never the base parameters.

Orbax writes them in the background, each whole or not at all. A note beside the arrays holds the shape, dtype and
checksum of every leaf: a damaged checkpoint is told from a whole one, and from one of another structure.
"""

import contextlib
import errno
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from peanut_jax.files.atomic import close_after
from peanut_jax.messages import one_line
from peanut_jax.run_checkpoint_about import (
    ABOUT,
    check_about,
    differences,
    listed,
    plain,
    read_about,
    write_about,
)
from peanut_jax.run_checkpoint_keep import Keep, everywhere, open_manager
from peanut_jax.run_checkpoint_leaves import (
    ARRAYS,
    NOTE,
    UNREADABLE,
    check_leaves,
    descriptions,
    host_copy,
    named,
    placed,
    read_arrays,
    read_note,
    sealed,
)
from peanut_jax.training import TrainState

__all__ = ["ABOUT", "Checkpoints", "differences", "read_about"]

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run in one folder; a context manager that ends with `close`.

    With several processes each makes its own and all call every method together, on a folder that all see.

    Examples:
        >>> from peanut_jax.run_checkpoints import Checkpoints
        >>> params, tx = {"query": {"kernel": jnp.ones((4, 6))}}, optax.adamw(1e-3)
        >>> adapters = pj.init(jax.random.key(0), params, pj.PeanutConfig(r=2, target_modules=["query"]))
        >>> state = pj.TrainState.create(adapters, tx, jax.random.key(1))
        >>> with Checkpoints("runs/1", {"config": "r=2"}, best="loss") as checkpoints:
        ...     state, record = checkpoints.restore(state) or (state, {"position": 0})
        ...     checkpoints.save(state, {"position": record["position"] + 1}, {"loss": 0.5})
        ...     checkpoints.restore(state)[1]
        {'position': 1}
    """

    def __init__(
        self,
        folder: str | Path,
        about: Mapping[str, Any],
        *,
        keep_last: int = 2,
        best: str | None = None,
        best_mode: str = "min",
    ):
        """Opens or creates the folder, and removes what a killed save left in it.

        Args:
            about: What this run is, as nested mappings for JSON: its config, the base's fingerprint. The first save
                writes it to about.json, and every later run in this folder must say the same.
            keep_last: Newest checkpoints to keep, at least 1; 2, so that one damaged checkpoint leaves another. The
                last that was confirmed is kept besides: see `confirm`.
            best: A metric; the checkpoint with its best value is kept too.
            best_mode: Whether "min" or "max" of `best` is the best.

        Raises:
            ValueError: a bad argument; another `about` than the folder's, naming the fields that differ.
            OSError: a folder that cannot be read or made.
        """
        if not isinstance(keep_last, int) or keep_last < 1:
            raise ValueError(f"keep_last must be an integer of at least 1, got {keep_last!r}")
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be 'min' or 'max', got {best_mode!r}")
        self.folder = Path(folder).absolute()
        self._about = plain(about, "about")
        self._best = best
        check_about(self.folder, self._about)
        self._keep = Keep(keep_last, -1 if best_mode == "min" else 1)
        with self._reporting("open"):
            self._manager = open_manager(self.folder, self._keep)
        self._load_notes()

    def save(
        self,
        state: TrainState,
        record: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        good: bool = False,
    ) -> None:
        """Saves the state under its step, in the background; waits only for the save before it.

        The state is copied before this returns, so that a train step may donate it. A step that is saved already is
        left as it is.

        Args:
            record: What the loop needs to go on besides the state, for JSON: data position, best metric.
            metrics: This step's; without them, or where `best` is not finite, it cannot become the best.
            good: Whether the state is known to be good already; otherwise `confirm` says so later.

        Raises:
            ValueError: a record that is not JSON; metrics without `best`; a step older than the newest that is saved.
            OSError: this save or the one before it could not be written; the older checkpoints are whole.
        """
        if metrics is not None and self._best is not None and self._best not in metrics:
            raise ValueError(f"metrics must hold best={self._best!r}, got {sorted(metrics)}")
        self.wait()
        step, latest = int(state.step), self._manager.latest_step()
        if step in self._manager.all_steps():
            return
        if latest is not None and step < latest:
            raise ValueError(f"{self.folder} holds step {latest}, newer than step {step}; save to another folder")
        leaves = named(state)
        self._keep.good = step if good else self._keep.good
        note = _note(leaves, record, metrics, self._keep.good)
        with self._reporting("save in"):
            write_about(self.folder, self._about)
            arrays = ocp.args.PyTreeSave({name: host_copy(leaf) for name, leaf in leaves.items()})
            self._keep.scores[step] = self._score(note)
            self._manager.save(
                step, args=ocp.args.Composite(**{ARRAYS: arrays, NOTE: ocp.args.JsonSave(note)}), force=True
            )

    def confirm(self) -> None:
        """Says that the newest checkpoint is good, such as when a step after it had a finite loss.

        It is kept until a newer one is known to be good; the next save writes down which one it is.
        """
        latest = self._manager.latest_step()
        self._keep.good = self._keep.good if latest is None else latest

    def good(self) -> int | None:
        """The step of the last checkpoint that is known to be good; None where there is none."""
        return self._keep.good if self._keep.good in self.steps() else None

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and its record; None where there is none.

        A damaged one is passed over with a warning and renamed to `damaged-<step>`, so that its step can be saved anew.

        Args:
            like: Gives structure, shapes, dtypes and shardings, as arrays or jax.ShapeDtypeStruct; the devices need not
                be those of the run that saved. An array that is not committed to a device is restored as one.

        Raises:
            ValueError: a checkpoint of other leaves than `like`, naming them; every checkpoint is damaged.
        """
        return self._restore(self.steps()[::-1], like)

    def restore_best(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """As `restore`, for the checkpoint with the best metric, and after a damaged one the next best.

        Raises:
            ValueError: as `restore`; these checkpoints were opened without `best`.
        """
        if self._best is None:
            raise ValueError(f"{self.folder} was opened without best=, so no checkpoint is the best")
        return self._restore(self._keep.ranked(self.steps()), like)

    def steps(self) -> list[int]:
        """The steps that are saved, oldest first."""
        self.wait()
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            OSError: it could not be written.
        """
        with self._reporting("save in"):
            try:
                self._manager.wait_until_finished()
            except Exception:
                # The manager has dropped the steps that this save would have replaced from its list; they are on disk.
                self._manager.reload()
                raise

    def close(self) -> None:
        """Waits, and lets go of the threads.

        Raises:
            OSError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        close_after(self.close, kind, logger.error)

    def _restore(self, steps: Sequence[int], like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        steps = _of_first_process(steps)
        damaged: dict[int, str] = {}
        for step in steps:
            found, cause = self._read(step, named(like))
            if everywhere(found is not None):
                self._set_aside(damaged, step)
                arrays, record = found  # type: ignore[misc]
                return placed(arrays, like), record
            damaged[step] = cause or "another process cannot read it"
        if steps:
            causes = listed([f"{step}: {cause}" for step, cause in damaged.items()], 300)
            raise ValueError(f"every checkpoint in {self.folder} is damaged ({causes}); start in another folder")
        return None

    def _read(self, step: int, like: Mapping[str, Any]) -> tuple[tuple[dict[str, np.ndarray], dict] | None, str]:
        """Arrays and record of a step, or None and why it is damaged. No process waits for another in here."""
        path = self.folder / str(step)
        try:
            note = read_note(path)
        except UNREADABLE as error:
            return None, one_line(error, 120)
        check_leaves(note["leaves"], like, path)
        try:
            return (read_arrays(path, note["leaves"]), note["record"]), ""
        except UNREADABLE as error:
            return None, one_line(error, 120)

    def _set_aside(self, damaged: Mapping[int, str], used: int) -> None:
        if not damaged:
            return
        for step, cause in damaged.items():
            logger.warning(
                "checkpoint of step %d in %s is damaged (%s); step %d is used instead", step, self.folder, cause, used
            )
            if jax.process_index() == 0:
                aside = self.folder / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
        multihost_utils.sync_global_devices("peanut_jax.run_checkpoints: damaged checkpoints renamed")
        self._manager.reload()

    def _load_notes(self) -> None:
        """The scores, and which checkpoint is known to be good."""
        good: set[int] = set()
        steps = self._manager.all_steps()
        for step in steps:
            # A damaged note has no score; `restore` is where it is reported.
            with contextlib.suppress(*UNREADABLE):
                note = read_note(self.folder / str(step))
                self._keep.scores[step] = self._score(note)
                good.add(note.get("good", -1))  # which notes of earlier versions lack
        self._keep.good = max(good.intersection(steps), default=None)

    def _score(self, note: Mapping[str, Any]) -> float | None:
        value = (note["metrics"] or {}).get(self._best)
        return value if value is not None and math.isfinite(value) else None

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore calls a full disk a ValueError
            # In tensorstore's message, after all that it was writing.
            full = (text for text in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) if text in str(error))
            raise OSError(f"cannot {what} {self.folder}: {next(full, None) or one_line(error)}") from error


def _note(
    leaves: Mapping[str, Any], record: Mapping[str, Any], metrics: Mapping[str, float] | None, good: int | None
) -> dict[str, Any]:
    """What lies beside the arrays of a checkpoint; `good` is the step that is known to be good by now."""
    return sealed(
        {
            "leaves": descriptions(leaves),
            "record": plain(record, "record"),
            "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
            "good": good,
        }
    )


def _of_first_process(steps: Sequence[int]) -> list[int]:
    """Process 0's steps: each process lists the folder by itself, and a shared file system may lag."""
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(steps), np.int32)))
    padded = np.resize(np.asarray([*steps, 0], np.int32), count)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tolist()
