"""`metrics.jsonl`: one JSON object a line, with the step, the time and the metrics."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peanut_jax.files.atomic import write_text

METRICS = "metrics.jsonl"


def line(step: int, metrics: Mapping[str, float]) -> str:
    """The line of one step, written now. JSON has no number for NaN and infinity: they become strings."""
    values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    return json.dumps({"step": step, "time": time.time()} | values, allow_nan=False) + "\n"


def read_metrics(folder: Path) -> list[dict[str, int | float]]:
    """The rows of `metrics.jsonl` in a run's folder, in the order written.

    A last line that a kill cut short is left out.

    Raises:
        ValueError: a line before the last is damaged.
    """
    return [{name: value if name == "step" else float(value) for name, value in row.items()} for row in _rows(folder)]


def drop_after(folder: Path, step: int) -> None:
    """Rewrites a folder's `metrics.jsonl`, if there is one, without what is later than `step`.

    Raises:
        ValueError: as `read_metrics`; then the file stays as it is.
    """
    path = folder / METRICS
    if path.exists():
        kept = [row for row in _rows(folder) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    lines = path.read_text().splitlines()
    rows = []
    for number, text in enumerate(lines, start=1):
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
    return rows
