"""The measured lines as a page of tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.accelerator.flops import FORMULAS
from benchmarks.accelerator.published import GOALS, PUBLISHED, Lines
from benchmarks.accelerator.sizes import TOY

GIB = 1 << 30
Line = Mapping[str, Any]
# Heading and how a cell is made of a line.
Column = tuple[str, Callable[[Line], Any]]


def page(lines: Lines) -> str:
    """Markdown: the device, goals, and a table for each kind of case; then what failed or was skipped, with reasons."""
    device = next((line for line in lines if line["case"] == "device" and line["status"] == "ok"), None)
    parts = ["# What the accelerator does", *_device(device, lines)]
    toy = device is not None and device["sizes"] == TOY.name
    if device is not None and not toy:
        parts += _goals(lines)
    for title, note, wanted, columns in _TABLES:
        rows = [line for line in lines if line["status"] == "ok" and wanted(line)]
        if rows:
            parts += [f"## {title}", *([note] if note else []), _table(columns, rows)]
    parts += _ratios(lines) + _missing(lines)
    return "\n\n".join(parts) + "\n"


def _device(device: Line | None, lines: Lines) -> list[str]:
    if device is None:
        return ["No device could be measured; `log.txt` says why."]
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items() if version)
    memory = device["memory_bytes"]
    about = [
        f"{device['devices']} x {device['device']} ({device['backend']}), of which one is measured",
        f"{memory / GIB:.1f} GiB for jax" if memory else "memory not told",
        device["driver"],
        f"{device['cores']} cores, Python {device['python']}, {versions}",
        "; ".join(f"{name}={value}" for name, value in device["flags"].items()) or "no flags",
    ]
    kind = f"**Sizes: {device['sizes']}**, chosen by {device['sizes_chosen_by']}."
    if device["sizes"] == TOY.name:
        kind += " Toy sizes say that the command works; no figure below says anything of the device's speed."
    products = [line for line in lines if line["case"].startswith("matmul") and line["status"] == "ok"]
    copies = [line for line in lines if line["case"] == "copy" and line["status"] == "ok"]
    rates = [f"{line['case']} {line['tflops']:.4g} TFLOP/s" for line in products]
    rates += [f"copy {line['gb_per_second']:,.4g} GB/s, read and written" for line in copies]
    return [kind, "\n".join(f"- {part}" for part in about if part), f"Measured: {'; '.join(rates) or 'nothing'}."]


def _goals(lines: Lines) -> list[str]:
    said = {True: "yes", False: "no", None: "not measured"}
    rows = []
    for goal in GOALS:
        value = goal.measured(lines)
        bound = ("at least " if goal.at_least else "at most ") + goal.form.format(goal.goal)
        rows.append((goal.what, "" if value is None else goal.form.format(value), bound, said[goal.met(lines)]))
    published = _cells(("setting", "published", "source"), PUBLISHED)
    return ["## Goals", _cells(("what", "measured", "goal", "met"), rows), "Published:", published]


def _ratios(lines: Lines) -> list[str]:
    rows = [
        (line["case"].removesuffix(" ratios"), line["over"], name, f"{ratio:.3f}")
        for line in lines
        if line["status"] == "ok" and "seconds_over_first" in line
        for name, ratio in line["seconds_over_first"].items()
        if name != line["over"]
    ]
    note = "Steps of one process in turn; medians of neighbours' ratios."
    return ["## Seconds beside LoRA's", note, _cells(("setting", "over", "method", "ratio"), rows)] if rows else []


def _missing(lines: Lines) -> list[str]:
    rows = [(line["case"], line["status"], line["reason"]) for line in lines if line["status"] != "ok"]
    return ["## Failed or skipped", _cells(("case", "", "reason"), rows)] if rows else []


def _table(columns: Sequence[Column], lines: Lines) -> str:
    return _cells([heading for heading, _ in columns], [[cell(line) for _, cell in columns] for line in lines])


def _cells(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def row(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"

    return "\n".join([row(headings), f"|{'---|' * len(headings)}", *map(row, rows)])


def _number(field: str, form: str, scale: float = 1.0) -> Callable[[Line], str]:
    """A cell with one of the line's numbers; empty where it has none."""
    return lambda line: "" if line.get(field) is None else form.format(line[field] * scale)


def _text(field: str) -> Callable[[Line], Any]:
    return lambda line: line.get(field, "")


def _kind(*sections: str) -> Callable[[Line], bool]:
    return lambda line: line["section"].partition("/")[0] in sections and "median_seconds" in line


_STEP: tuple[Column, ...] = (
    ("setting", lambda line: f"{line['shapes']}, {line['rows']} x {line['seq']:,}"),
    ("method", lambda line: f"{line['method']}, r {line['rank']}"),
    ("remat", _text("remat")),
    ("attention", _text("attention")),
    ("ms a step", _number("median_seconds", "{:.1f}", 1e3)),
    ("tokens/s", _number("tokens_per_second", "{:,.0f}")),
    ("base TFLOP/s", _number("base_tflops", "{:.4g}")),
    ("of peak", _number("base_of_peak", "{:.1%}")),
    ("model TFLOP/s", _number("model_tflops", "{:.4g}")),
    ("NeMo's", _number("nemo_tflops", "{:.4g}")),
    ("temporaries, GiB", _number("temp_bytes", "{:.2f}", 1 / GIB)),
    ("peak, GiB", _number("peak_bytes_of_process", "{:.2f}", 1 / GIB)),
    ("compile, s", _number("compile_seconds", "{:.1f}")),
)
_STEP_NOTE = (
    "Medians of repeated steps, after a warm-up; each is an optimizer step, AdamW, no dropout, no padding. The peak is "
    "that of the process until then, so a later method's includes the earlier ones'. "
    + "; ".join(f"{k.replace('_tflops', '')}: {v}" for k, v in FORMULAS.items())
    + "."
)
_TORCH: tuple[Column, ...] = (
    *_STEP[:2],
    *_STEP[3:6],
    ("peak, GiB", _number("peak_bytes", "{:.2f}", 1 / GIB)),
)
_ATTENTION: tuple[Column, ...] = (
    ("setting", _text("setting")),
    ("road", _text("road")),
    ("ms", _number("median_seconds", "{:.2f}", 1e3)),
    ("TFLOP/s", _number("tflops", "{:.4g}")),
    ("of peak", _number("of_peak", "{:.1%}")),
    ("temporaries, GiB", _number("temp_bytes", "{:.2f}", 1 / GIB)),
    ("gradient from the first's", _number("gradient_from_first_road", "{:.1e}")),
)
_DECODE: tuple[Column, ...] = (
    ("setting", lambda line: f"{line['shapes']}, {line['prompt']} + {line['new']} tokens, {line['layers']}"),
    ("adapters", _text("adapters")),
    ("batch", _text("batch")),
    ("tokens/s", _number("tokens_per_second", "{:,.0f}")),
    ("ms a token", _number("seconds_a_token_decoding", "{:.3f}", 1e3)),
    ("ms before", _number("seconds_before_decoding", "{:.1f}", 1e3)),
    ("first call, s", _number("first_seconds", "{:.1f}")),
)
_FILES: tuple[Column, ...] = (
    ("what", _text("case")),
    ("seconds", lambda line: f"{line.get('seconds', line.get('median_seconds')):.3g}"),
    ("GB/s", _number("gb_per_second", "{:.3g}")),
)
_TABLES: tuple[tuple[str, str, Callable[[Line], bool], tuple[Column, ...]], ...] = (
    ("Train steps", _STEP_NOTE, _kind("step", "remat", "roads"), _STEP),
    (
        "The same in HF PEFT",
        "As PEFT's own comparison runs them: bfloat16, adapters in float32, no compile, no gradient checkpointing.",
        _kind("torch"),
        _TORCH,
    ),
    (
        "Decoding",
        "Greedy. `mixed`: four adapters, PEANuT and LoRA, in turn over the rows. `before`: what does not grow with the "
        "new tokens: the prompt, and starting.",
        lambda line: line["section"] == "decode",
        _DECODE,
    ),
    (
        "Attention alone",
        "Forward and backward of one layer that is 64 wide: attention with its rotary embedding, of causal rows.",
        _kind("attention"),
        _ATTENTION,
    ),
    (
        "Merging and loading",
        "On the device: kernels read and written. On disk: the checkpoint's bytes.",
        lambda line: line["section"] in ("merge", "load"),
        _FILES,
    ),
)
