"""What the quickstart found, as a table for the terminal, a picture and JSON."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich.table import Table

MEMORY_SOURCE = "arguments + temporaries + outputs of the compiled step"
# Okabe and Ito's colours, told apart with any colour vision; the dashes mark what is no PEANuT.
_LINES = (
    ("#D55E00", "-"),
    ("#CC79A7", "-"),
    ("#0072B2", "--"),
    ("#56B4E9", "--"),
    ("#009E73", "--"),
    ("#999999", ":"),
    ("#000000", ":"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One method over all seeds.

    Attributes:
        method: Its name.
        trainable_parameters: Number of those of the adapter and the saved modules together.
        learning_rate: Peak rate.
        saved_learning_rate: Peak rate of the new head; None for `learning_rate`.
        step_seconds: Time of a compiled train step, from `timing.seconds_in_turns`.
        step_bytes: Device memory of a training step; see `MEMORY_SOURCE`.
        eval_steps: Optimizer steps taken at each evaluation.
        test_accuracy: Shares in 0..1, one row a seed, one column an evaluation.
    """

    method: str
    trainable_parameters: int
    learning_rate: float
    saved_learning_rate: float | None
    step_seconds: float
    step_bytes: int | None
    eval_steps: list[int]
    test_accuracy: list[list[float]]

    @property
    def final(self) -> list[float]:
        """Test accuracy after the last step, by seed: no best step is picked."""
        return [row[-1] for row in self.test_accuracy]

    @property
    def mean(self) -> float:
        return statistics.mean(self.final)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for a single seed."""
        return statistics.stdev(self.final) if len(self.final) > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that is written down of a run.

    Attributes:
        versions: Package -> version.
        device: Kind of the device, as JAX names it.
        device_peak_bytes: The device's own counter at the end, over all that the run did; None where it has none.
        settings: How long and how often was trained, as plain values.
        pretrained_test_accuracy: Accuracy of the pretrained model on the digits 0-4.
        results: One a method.
        merged_method: The method whose adapter was merged.
        merged_largest_logit_difference: Between the merged checkpoint and the adapted model, on the test pictures.
        seconds: Time of the whole quickstart, compilation included.
    """

    versions: dict[str, str]
    device: str
    device_peak_bytes: int | None
    settings: dict[str, Any]
    pretrained_test_accuracy: float
    results: Sequence[Result]
    merged_method: str
    merged_largest_logit_difference: float
    seconds: float


def write_json(report: Report, path: Path) -> None:
    """The report as it is, with mean and spread of every method."""
    content = dataclasses.asdict(report) | {"step_bytes_source": MEMORY_SOURCE}
    for row, result in zip(content["results"], report.results, strict=True):
        row |= {"test_accuracy_mean": result.mean, "test_accuracy_std": result.std}
    path.write_text(json.dumps(content, indent=2) + "\n")


def table(report: Report) -> Table:
    """The results for a terminal of 80 columns."""
    n_seeds = len(report.results[0].final)
    grid = Table(
        box=box.SIMPLE_HEAD,
        title=f"Digits 0-4 -> 5-9, {report.device}",
        caption=f"accuracy: mean ± sample standard deviation over {n_seeds} seeds, after the last step\n"
        f"memory: {MEMORY_SOURCE}",
    )
    grid.add_column("method")
    for heading in ("trainable\nparameters", "test\naccuracy (%)", "step\ntime (ms)", "peak device\nmemory (MB)"):
        grid.add_column(heading, justify="right", vertical="bottom")
    for result in report.results:
        grid.add_row(
            result.method,
            f"{result.trainable_parameters:,}",
            _percent(result),
            f"{1e3 * result.step_seconds:.1f}",
            "unknown" if result.step_bytes is None else f"{result.step_bytes / 1e6:.1f}",
        )
    return grid


def plot(report: Report, path: Path) -> None:
    """Learning curves: the mean over the seeds, and a band from the lowest to the highest seed."""
    plt.switch_backend("Agg")  # no display needed
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for i, result in enumerate(report.results):
        colour, dashes = _LINES[i % len(_LINES)]
        curves = 100 * np.array(result.test_accuracy)
        label = f"{result.method}  ({result.trainable_parameters:,})"
        axes.plot(result.eval_steps, curves.mean(0), color=colour, linestyle=dashes, linewidth=1.8, label=label)
        axes.fill_between(result.eval_steps, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("test accuracy (%)")
    n_seeds = len(report.results[0].final)
    axes.set_title(
        "A ViT pretrained on the digits 0-4, adapted to 5-9\n"
        f"line: mean over {n_seeds} seeds; band: from the lowest to the highest seed",
        fontsize=10,
    )
    axes.legend(title="method  (trainable parameters)", frameon=False, fontsize=9, loc="lower right")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _percent(result: Result) -> str:
    spread = "" if result.std is None else f" ± {100 * result.std:.1f}"
    return f"{100 * result.mean:.1f}{spread}"
