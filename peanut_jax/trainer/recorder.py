"""A run's metrics, written down: as JSON lines and for TensorBoard."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from peanut_jax.files.atomic import close_after, naming
from peanut_jax.trainer.metrics_file import METRICS, drop_after, line

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
_FLUSH_EVERY_S = 10


class Recorder:
    """Writes a run's metrics to `metrics.jsonl` and, the same, to `tensorboard/`; a context manager.

    Args:
        folder: The run's.
        resume_step: The last step whose effect is in the state that training starts from. What an earlier process
            wrote of later steps is dropped, for those steps are taken again, and so are lines that are damaged.

    Examples:
        >>> from pathlib import Path
        >>> from peanut_jax.trainer.recorder import Recorder
        >>> folder = Path("runs/1")
        >>> folder.mkdir(parents=True)
        >>> with Recorder(folder) as recorder:
        ...     recorder.log(10, {"train/loss": 0.5, "train/learning_rate": 1e-3})
        >>> len((folder / "metrics.jsonl").read_text().splitlines())
        1
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        drop_after(folder, resume_step)
        self._path, self._board_path = folder / METRICS, folder / TENSORBOARD
        self._lines = self._path.open("a")
        self._board_path.mkdir(exist_ok=True)
        # Not SummaryWriter, whose thread a full disk ends with a traceback; files are named by the second, and one of
        # the same name would be overwritten.
        with naming(self._board_path):
            self._board = EventsWriter(str(self._board_path / "events"), f".{time.time_ns()}")
            for start in ({"file_version": "brain.Event:2"}, {"session_log": SessionLog(status=SessionLog.START)}):
                self._board.write_event(Event(step=resume_step + 1, **start))
        self._flushed = time.monotonic()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes down the scalars of one step, NaN and infinity included. The line outlives a killed process.

        Raises:
            OSError: a full disk, with the file.
        """
        values = {name: float(value) for name, value in metrics.items()}
        with naming(self._path):
            self._lines.write(line(step, values))
            self._lines.flush()
        with naming(self._board_path):
            for name, value in values.items():
                self._board.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
            if time.monotonic() - self._flushed > _FLUSH_EVERY_S:
                self._board.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes out what is pending. A recorder that was closed takes no more.

        Raises:
            OSError: as `log`.
        """
        with naming(self._path):
            self._lines.close()
        with naming(self._board_path):
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        close_after(self.close, kind, logger.warning)
