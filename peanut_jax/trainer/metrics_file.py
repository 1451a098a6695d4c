"""`metrics.jsonl`: one JSON object a line, with the step, the time and the metrics."""

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peanut_jax.files.atomic import write_text
from peanut_jax.files.untrusted import parse_json

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_NOT_FINITE = ("nan", "inf", "-inf")


def line(step: int, metrics: Mapping[str, float]) -> str:
    """The line of one step, written now. JSON has no number for NaN and infinity: they become strings."""
    values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    return json.dumps({"step": step, "time": time.time()} | values, allow_nan=False) + "\n"


def read_metrics(folder: Path) -> list[dict[str, int | float]]:
    """The rows of `metrics.jsonl` in a run's folder, in the order written.

    A last line that a kill cut short is left out, and so is, with a warning, any other that is damaged.
    """
    lines, _ = _whole_lines(folder / METRICS)
    return [{name: value if name == "step" else float(value) for name, value in row.items()} for _, row in lines]


def drop_after(folder: Path, step: int) -> None:
    """Rewrites a folder's `metrics.jsonl`, if there is one, without what is damaged or later than `step`.

    A file with damage is kept as `damaged-metrics.jsonl`.
    """
    path = folder / METRICS
    if path.exists():
        lines, damaged = _whole_lines(path)
        if damaged:
            shutil.copy2(path, folder / f"damaged-{METRICS}")
        write_text(path, "".join(f"{text}\n" for text, row in lines if row["step"] <= step))


def _whole_lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Text and content of each line that is not damaged, and how many are, besides a last one that was cut short."""
    lines = path.read_bytes().split(b"\n")  # no other line end: a metric's name may hold one
    found: list[tuple[str, dict[str, Any]]] = []
    damaged: dict[int, str] = {}
    for number, encoded in enumerate(lines, start=1):
        try:
            text = encoded.decode()
            found.append((text, _row(text)))
        except ValueError as error:
            damaged[number] = str(error)[:120]
    damaged.pop(len(lines), None)  # what follows the last line's end: nothing, or a line that was cut short
    if damaged:
        first, cause = next(iter(damaged.items()))
        logger.warning(
            "%d of %d lines of %s are damaged and left out, the first is line %d: %s",
            len(damaged), len(lines) - 1, path, first, cause,
        )  # fmt: skip
    return found, len(damaged)


def _row(text: str) -> dict[str, Any]:
    """The content of a line.

    Raises:
        ValueError: it is not an object with a step and numbers.
    """
    row = parse_json(text, "the line")
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 53:
        raise ValueError("it has no step")
    for name, value in row.items():
        if not (isinstance(value, (int, float)) or value in _NOT_FINITE):
            raise ValueError(f"{name!r} is not a number")
        if isinstance(value, int) and abs(value) >= 1 << 1023:
            raise ValueError(f"{name!r} is too large a number")
    return row
