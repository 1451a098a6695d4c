"""A run's metrics as a picture."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peanut_jax.trainer.metrics_file import METRICS, read_metrics

CURVES = "curves.png"
_MANY_POINTS = 60  # more than these are drawn thin, with a smoothed line over them
# Okabe and Ito's colours, told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_EVAL_STYLES = ((_ORANGE, "o"), (_BLUE, "s"), (_GREEN, "^"), (_PURPLE, "D"), ("#56B4E9", "v"), ("#000000", "x"))


class _Curve(NamedTuple):
    """One metric; what was not finite is NaN, which leaves a gap."""

    steps: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]


_Curves = Mapping[str, _Curve]


def plot_curves(folder: Path) -> Path:
    """Draws `metrics.jsonl` as `curves.png`: losses, other evaluations, learning rate and gradient norm.

    Args:
        folder: The run's. Metrics that were never logged get no panel.

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


def _curves(rows: list[dict[str, int | float]]) -> _Curves:
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
        label = name.removeprefix("eval/").replace("$", r"\$")  # no formula
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
