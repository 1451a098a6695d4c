"""A run's metrics, written down: as JSON lines and for TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tensorboardX import SummaryWriter

from peanut_jax.trainer.metrics_file import METRICS, drop_after, line

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
        self._lines = (folder / METRICS).open("a")
        self._tensorboard = SummaryWriter(
            str(folder / TENSORBOARD),
            purge_step=resume_step + 1,
            max_queue=0,  # without bound: a full queue blocks for ever once its thread met a full disk
            flush_secs=_FLUSH_EVERY_S,
            # tensorboardX names files by the second, and overwrites one of the same name.
            filename_suffix=f".{time.time_ns()}",
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes down the scalars of one step, NaN and infinity included. The line outlives a killed process."""
        values = {name: float(value) for name, value in metrics.items()}
        self._lines.write(line(step, values))
        self._lines.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is pending. A recorder that was closed takes no more."""
        self._lines.close()
        self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
