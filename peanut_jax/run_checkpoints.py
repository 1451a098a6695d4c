"""Checkpoints of one training run: adapters, optimizer state, step and PRNG key, never the base parameters.

Orbax writes them in the background, each whole or not at all. A note beside the arrays holds the shape, dtype and
checksum of every leaf: a damaged checkpoint is told from a whole one, and from one of another structure.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from peanut_jax.run_checkpoint_about import ABOUT, check_about, differences, plain, read_about, write_about
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

    Example:
        with Checkpoints("runs/1", {"config": asdict(config)}, best="loss") as checkpoints:
            state, record = checkpoints.restore(state) or (state, {"position": 0})
            ...
            checkpoints.save(state, {"position": position}, {"loss": loss})
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
            keep_last: Newest checkpoints to keep, at least 1; 2, so that one damaged checkpoint leaves another.
            best: A metric; the checkpoint with its best value is kept too.
            best_mode: Whether "min" or "max" of `best` is the best.

        Raises:
            ValueError: a bad argument; another `about` than the folder's, naming every field that differs.
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
        with self._reporting("open"):
            keep = _Keep(keep_last, -1 if best_mode == "min" else 1)
            options = ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._keep = keep
        self._load_scores()

    def save(self, state: TrainState, record: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Saves the state under its step, in the background; waits only for the save before it.

        The state is copied before this returns, so that a train step may donate it. A step that is saved already is
        left as it is.

        Args:
            record: What the loop needs to go on besides the state, for JSON: data position, best metric.
            metrics: This step's; without them, or where `best` is NaN, it cannot become the best.

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
        note = _note(leaves, record, metrics)
        with self._reporting("save in"):
            write_about(self.folder, self._about)
            arrays = ocp.args.PyTreeSave({name: host_copy(leaf) for name, leaf in leaves.items()})
            self._keep.scores[step] = self._score(note)
            self._manager.save(
                step, args=ocp.args.Composite(**{ARRAYS: arrays, NOTE: ocp.args.JsonSave(note)}), force=True
            )

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
        try:
            self.close()
        except OSError as error:
            # The error that ended the block is the one to be seen.
            if kind is None:
                raise
            logger.error("%s", error)

    def _restore(self, steps: Sequence[int], like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        steps = _of_first_process(steps)
        damaged: dict[int, str] = {}
        for step in steps:
            found, cause = self._read(step, named(like))
            if _everywhere(found is not None):
                self._set_aside(damaged, step)
                arrays, record = found  # type: ignore[misc]
                return placed(arrays, like), record
            damaged[step] = cause or "another process cannot read it"
        if steps:
            causes = "; ".join(f"{step}: {cause}" for step, cause in damaged.items())
            raise ValueError(f"every checkpoint in {self.folder} is damaged ({causes}); start in another folder")
        return None

    def _read(self, step: int, like: Mapping[str, Any]) -> tuple[tuple[dict[str, np.ndarray], dict] | None, str]:
        """Arrays and record of a step, or None and why it is damaged. No process waits for another in here."""
        path = self.folder / str(step)
        try:
            note = read_note(path)
        except UNREADABLE as error:
            return None, _one_line(error)
        check_leaves(note["leaves"], like, path)
        try:
            return (read_arrays(path, note["leaves"]), note["record"]), ""
        except UNREADABLE as error:
            return None, _one_line(error)

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

    def _load_scores(self) -> None:
        for step in self._manager.all_steps():
            # A damaged note has no score; `restore` is where it is reported.
            with contextlib.suppress(*UNREADABLE):
                self._keep.scores[step] = self._score(read_note(self.folder / str(step)))

    def _score(self, note: Mapping[str, Any]) -> float | None:
        value = (note["metrics"] or {}).get(self._best)
        return None if value is None or math.isnan(value) else value

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore calls a full disk a ValueError
            raise OSError(f"cannot {what} {self.folder}: {_one_line(error)}") from error


class _Keep:
    """Orbax's preservation policy: the newest and the best. Its own, as orbax's opens no folder with a damaged metric.

    Attributes:
        latest: How many of the newest.
        sign: 1 where a higher score is better, -1 where a lower one is.
        scores: Step -> score, None where it has none.
    """

    def __init__(self, latest: int, sign: int):
        self.latest, self.sign = latest, sign
        self.scores: dict[int, float | None] = {}

    def ranked(self, steps: Sequence[int]) -> list[int]:
        """The steps that have a score, the best first and of equals the newest."""
        scores = {step: score for step in steps if (score := self.scores.get(step)) is not None}
        return sorted(scores, key=lambda step: (self.sign * scores[step], step), reverse=True)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each checkpoint, as orbax asks it."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.latest :], *self.ranked(steps)[:1]}
        return [step in kept for step in steps]


def _note(leaves: Mapping[str, Any], record: Mapping[str, Any], metrics: Mapping[str, float] | None) -> dict[str, Any]:
    """What lies beside the arrays of a checkpoint."""
    return sealed(
        {
            "leaves": descriptions(leaves),
            "record": plain(record, "record"),
            "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
        }
    )


def _everywhere(intact: bool) -> bool:
    return bool(np.all(multihost_utils.process_allgather(np.asarray(intact))))


def _of_first_process(steps: Sequence[int]) -> list[int]:
    """Process 0's steps: each process lists the folder by itself, and a shared file system may lag."""
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(steps), np.int32)))
    padded = np.resize(np.asarray([*steps, 0], np.int32), count)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tolist()


def _one_line(error: BaseException, limit: int = 300) -> str:
    """Type and message, less the middle of a long one: tensorstore puts the cause at the end."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
