"""Published figures and this project's goals, beside which what is measured stands."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Lines = Sequence[Mapping[str, Any]]

# (setting, figure, source)
PUBLISHED: tuple[tuple[str, str, str], ...] = (
    (
        "Llama-3-8B, LoRA r 16 on all seven projections, dropout 0.1, 2 x 4,096 tokens, 16 of them a step, one H100",
        "12,473 tokens/s, 402 TFLOP/s by NeMo's formula",
        "NVIDIA-NeMo/Automodel, docs/performance-summary and llm_benchmark/llama3_1/llama3_1_8b_peft_benchmark.yaml",
    ),
    (
        "Llama-3.2-3B, r 32 on q and v, 4 rows of 210 tokens on average and at most 768, one L40S, 5,000 steps",
        "LoRA 942 s, PEANuT of depth 0 1,339 s: 1.42",
        "huggingface/peft, method_comparison/MetaMathQA, results of 2026-07-15",
    ),
    ("one H200, bfloat16 dense", "989 TFLOP/s, 4.8 TB/s", "NVIDIA's data sheet"),
)


@dataclasses.dataclass(frozen=True)
class Goal:
    """Something measured and the figure that it is to reach.

    Attributes:
        measured: From the lines; None where they do not tell.
        at_least: Whether more is better.
    """

    what: str
    measured: Callable[[Lines], float | None]
    goal: float
    form: str
    at_least: bool = True

    def met(self, lines: Lines) -> bool | None:
        value = self.measured(lines)
        return None if value is None else (value >= self.goal if self.at_least else value <= self.goal)


def _steps(lines: Lines, **wanted: Any) -> list[Mapping[str, Any]]:
    """Our own steps that ran and have these fields."""
    return [
        line
        for line in lines
        if line["status"] == "ok" and "tokens_per_second" in line and not line["case"].startswith("torch")
        if all(line.get(name) == value for name, value in wanted.items())
    ]


def _best(field: str, **wanted: Any) -> Callable[[Lines], float | None]:
    def measured(lines: Lines) -> float | None:
        return max((line[field] for line in _steps(lines, **wanted) if line[field] is not None), default=None)

    return measured


def _ratio(step: str, method: str) -> Callable[[Lines], float | None]:
    def measured(lines: Lines) -> float | None:
        for line in lines:
            if line["status"] == "ok" and line["case"] == f"{step} ratios":
                return line["seconds_over_first"].get(method)
        return None

    return measured


def _over_peft(step: str) -> Callable[[Lines], float | None]:
    def measured(lines: Lines) -> float | None:
        ours = _best("tokens_per_second", step=step, method="peanut-0")(lines)
        case = f"torch {step} peanut-0"
        theirs = [line for line in lines if line["case"] == case and line["status"] == "ok"]
        return ours / theirs[0]["tokens_per_second"] if ours is not None and theirs else None

    return measured


GOALS: tuple[Goal, ...] = (
    Goal(
        "Llama-3-8B, 2 x 4,096, PEANuT depth 0, tokens/s",
        _best("tokens_per_second", step="llama-3-8b", method="peanut-0"),
        14_000,
        "{:,.0f}",
    ),
    Goal(
        "Llama-2-7B, 16 x 256, PEANuT depth 0, share of the measured peak (4 FLOPs a parameter and token)",
        _best("base_of_peak", step="llama-2-7b", method="peanut-0"),
        0.55,
        "{:.1%}",
    ),
    Goal("Llama-3.2-3B, 4 x 768, PEANuT depth 0 over PEFT's, tokens/s", _over_peft("llama-3.2-3b"), 2.0, "{:.2f}"),
    Goal("the same, 4 x 256", _over_peft("llama-3.2-3b-short"), 2.0, "{:.2f}"),
    *(
        Goal(
            f"{step}: PEANuT of depth {depth} over LoRA, seconds",
            _ratio(step, f"peanut-{depth}"),
            1.03,
            "{:.3f}",
            False,
        )
        for step in ("llama-3-8b", "llama-2-7b", "llama-3.2-3b")
        for depth in ((0, 2) if step != "llama-3.2-3b" else (0,))
    ),
)
