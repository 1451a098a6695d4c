"""What a training run leaves to look at: metrics as JSON lines and for TensorBoard, curves, and a progress bar."""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from tensorboardX import SummaryWriter

METRICS, CURVES, TENSORBOARD = "metrics.jsonl", "curves.png", "tensorboard"
_FLUSH_EVERY_S = 10
_MANY_POINTS = 60  # more than these are drawn thin, with a smoothed line over them
# Okabe and Ito's colours, told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_EVAL_STYLES = ((_ORANGE, "o"), (_BLUE, "s"), (_GREEN, "^"), (_PURPLE, "D"), ("#56B4E9", "v"), ("#000000", "x"))


class Recorder:
    """Writes a run's metrics to `metrics.jsonl` and, the same, to `tensorboard/`; a context manager.

    Args:
        folder: Of the run.
        resume_step: The last step whose effect is in the state that training starts from. What an earlier process
            wrote of later steps is dropped, for those steps are taken again.

    Raises:
        ValueError: if an earlier `metrics.jsonl` is damaged before its last line.

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
        path = folder / METRICS
        _drop_after(path, resume_step)
        self._lines = path.open("a")
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
        row = {"step": step, "time": time.time()} | {name: _to_json(value) for name, value in values.items()}
        self._lines.write(json.dumps(row, allow_nan=False) + "\n")
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


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`, in the order written; a last line that a kill cut short is left out.

    Raises:
        ValueError: if a line before the last is damaged.
    """
    return [{name: value if name == "step" else float(value) for name, value in row.items()} for row in _rows(folder)]


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
    return rows


def _drop_after(path: Path, step: int) -> None:
    """Rewrites a `metrics.jsonl`, if there is one, without what is later than `step`."""
    if not path.exists():
        return
    kept = [row for row in _rows(path.parent) if row["step"] <= step]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
    scratch.replace(path)


def _to_json(value: float) -> float | str:
    """JSON has no number for NaN and infinity: they become the strings that `float` reads."""
    return value if math.isfinite(value) else str(value)


class _Curve(NamedTuple):
    """One metric; what was not finite is NaN, which leaves a gap."""

    steps: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]


_Curves = Mapping[str, _Curve]


def plot_curves(folder: Path) -> Path:
    """Draws `metrics.jsonl` as `curves.png`: losses, other evaluations, learning rate and gradient norm.

    Args:
        folder: Of the run. Metrics that were never logged get no panel.

    Returns:
        The picture's path.

    Raises:
        ValueError: if there is nothing to draw.
    """
    curves = _curves(read_metrics(folder))
    panels = [
        (draw, wanted)
        for draw, is_wanted in _PANELS
        if (wanted := {name: curve for name, curve in curves.items() if is_wanted(name)})
    ]
    if not panels:
        raise ValueError(f"{folder / METRICS} holds no metric to draw")
    figure = Figure(figsize=(8, 0.7 + 2.7 * len(panels)), layout="constrained")  # no pyplot: needs no display
    figure.suptitle(folder.resolve().name, fontsize=11, parse_math=False)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, (draw, wanted) in zip(axes, panels, strict=True):
        draw(ax, wanted)
        ax.grid(alpha=0.25)
        ax.spines["top"].set_visible(False)
    axes[-1].set_xlabel("optimizer steps")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    steps = {step for curve in curves.values() for step in curve.steps}
    if len(steps) == 1:  # matplotlib would show fractions of a step
        axes[-1].set_xlim(min(steps) - 1, max(steps) + 1)
    figure.savefig(folder / CURVES, dpi=110)
    return folder / CURVES


def _curves(rows: list[dict[str, float]]) -> _Curves:
    curves = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        steps, values = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=float).T
        curves[name] = _Curve(steps, np.where(np.isfinite(values), values, np.nan))
    return curves


def _draw_losses(axes: Axes, curves: _Curves) -> None:
    if curve := curves.get("train/loss"):
        _draw_train(axes, curve, _BLUE, "train")
        lost = np.isnan(curve.values)
        if lost.any():  # along the lower edge, so that a run that diverged does not look unfinished
            edge = axes.get_xaxis_transform()
            marks = curve.steps[lost], np.zeros(lost.sum())
            axes.plot(*marks, "|", color=_BLUE, markersize=12, transform=edge, label="train, not finite")
    if curve := curves.get("eval/loss"):
        axes.plot(*curve, color=_ORANGE, marker="o", markersize=4, linewidth=1.8, label="eval")
    axes.set_ylabel("loss")
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _draw_evals(axes: Axes, curves: _Curves) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        colour, marker = _EVAL_STYLES[i % len(_EVAL_STYLES)]
        label = name.removeprefix("eval/")
        axes.plot(*curve, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label)
    values = np.concatenate([curve.values for curve in curves.values()])
    values = values[np.isfinite(values)]
    if values.size and 0 < 50 * values.min() < values.max():  # a perplexity would flatten an accuracy
        axes.set_yscale("log")
    axes.set_ylabel("other evaluations")
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _draw_optimizer(axes: Axes, curves: _Curves) -> None:
    """The learning rate, and on an axis of its own to the right, the gradient norm."""
    rate, norm = curves.get("train/learning_rate"), curves.get("train/grad_norm")
    if rate:
        (line,) = axes.plot(*rate, color=_GREEN, linewidth=1.8, marker=_marker(rate, "s"), markersize=7)
        line.set(fillstyle="none", markeredgewidth=1.5)  # hollow: the norm may lie on the same spot
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.set_ylabel("learning rate", color=_GREEN)
    if norm:
        right = axes.twinx() if rate else axes
        if np.nanmax(norm.values, initial=0) > 0:
            right.set_yscale("log", nonpositive="mask")
        _draw_train(right, norm, _PURPLE, "gradient norm")
        right.set_ylabel("gradient norm (log scale)", color=_PURPLE)
        right.spines["top"].set_visible(False)
        right.legend(frameon=False, fontsize=9)


_PANELS: tuple[tuple[Callable[[Axes, _Curves], None], Callable[[str], bool]], ...] = (
    (_draw_losses, lambda name: name in ("train/loss", "eval/loss")),
    (_draw_evals, lambda name: name.startswith("eval/") and name != "eval/loss"),
    (_draw_optimizer, lambda name: name in ("train/learning_rate", "train/grad_norm")),
)


def _draw_train(axes: Axes, curve: _Curve, colour: str, label: str) -> None:
    """A metric of every logged step: as it is, or where that is a thicket, thin under its moving average."""
    n = len(curve.steps)
    if n <= _MANY_POINTS:
        axes.plot(*curve, color=colour, linewidth=1.8, marker=_marker(curve), markersize=4, label=label)
        return
    width = n // 30
    axes.plot(*curve, color=colour, linewidth=0.7, alpha=0.4)
    smooth = _moving_average(curve.values, width)
    axes.plot(curve.steps, smooth, color=colour, linewidth=1.8, label=f"{label} (mean over {width} points)")


def _marker(curve: _Curve, shape: str = "o") -> str:
    """Points where there are few: a line through one point, or between gaps, cannot be seen."""
    return shape if len(curve.steps) <= _MANY_POINTS else ""


def _moving_average(values: Float[np.ndarray, " n"], width: int) -> Float[np.ndarray, " n"]:
    """The mean over `width` neighbours, those that are NaN left out."""
    finite = np.isfinite(values)
    window = np.ones(width)
    total = np.convolve(np.where(finite, values, 0), window, "same")
    count = np.convolve(finite, window, "same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meter:
    """Takes a training loop's figures and shows them.

    Attributes:
        total: Steps of the whole run.
        rate_unit: What `rate` counts.
        show: Called with the step, the figures, and the time that is left.
    """

    total: int
    rate_unit: str
    show: Callable[[int, str, str], None]

    def update(self, step: int, *, loss: float, rate: float, step_seconds: float) -> None:
        """Shows that `step` steps are done.

        Args:
            step: Of the whole run, those before a resume included.
            loss: Of this step.
            rate: Tokens or examples a second.
            step_seconds: Of one step, from which the time left is reckoned: evaluations come on top.
        """
        left = datetime.timedelta(seconds=round((self.total - step) * step_seconds))
        figures = f"loss {float(loss):.4g}  {rate:,.0f} {self.rate_unit}  {1e3 * step_seconds:.1f} ms"
        self.show(step, figures, f"ETA {left}")


@contextlib.contextmanager
def progress(
    total: int, completed: int, description: str, *, rate_unit: str = "tokens/s", enabled: bool = True
) -> Iterator[Meter]:
    """A progress bar on stderr, the figures below it; where that is no terminal, a line for every update.

    Args:
        total: Steps of the whole run.
        completed: Those of them that were done before, by the run that is resumed.
        description: In front of the bar.
        rate_unit: What the rate counts.
        enabled: False shows nothing, for processes other than the first.

    Yields:
        The meter to update.
    """
    console = Console(stderr=True)
    meter = functools.partial(Meter, total=total, rate_unit=rate_unit)
    if not enabled:
        yield meter(show=lambda *_: None)
    elif not console.is_interactive:
        yield meter(show=functools.partial(_print_line, time.monotonic(), f"{description} {{}}/{total}"))
    else:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
        bar = Progress(*columns, *times, expand=True)
        task = bar.add_task(description, total=total, completed=completed, left="")
        below = Text()  # a line of its own: all on one would leave no bar in 80 columns
        with Live(Group(bar, below), console=console):
            yield meter(show=functools.partial(_move, bar, task, below))


def _move(bar: Progress, task: TaskID, below: Text, step: int, figures: str, left: str) -> None:
    bar.update(task, completed=step, left=left)
    below.plain = figures


def _print_line(started: float, heading: str, step: int, figures: str, left: str) -> None:
    elapsed = datetime.timedelta(seconds=round(time.monotonic() - started))
    print(f"{heading.format(step)}  {figures}  elapsed {elapsed}  {left}", file=sys.stderr, flush=True)
