"""What a run is made of: typed, validated once, with one place for each default."""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import optax

from peanut_jax.methods.base import Method
from peanut_jax.models.decoder_config import REMAT_POLICIES
from peanut_jax.sharding import Rules

SCHEDULES = ("cosine", "linear", "constant")
NONFINITE = ("stop", "skip")
DTYPES = ("bfloat16", "float32")
# Fields of the loop that may change when a run is resumed.
_FREE_OF_LOOP = ("log_every", "save_every", "keep_last", "nonfinite", "max_skipped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling:
    """A decoder on prompts and responses; the loss is on the responses.

    Attributes:
        model: Folder or hub name of a Llama, Mistral or Qwen checkpoint with its tokenizer.
        train, evaluation: Data: a .json, .jsonl or .csv file, or a hub name as `NAME:SPLIT` or `NAME/CONFIG:SPLIT`.
        prompt, response: Their columns. None as `prompt` for plain text in `response`.
        seq_len: Tokens of a row; examples are packed into rows, and one that is longer is cut.
        dtype: Of the base and the activations.
        remat: As `DecoderConfig.remat`.
    """

    METRICS: ClassVar = ("loss",)

    model: str
    train: str
    evaluation: str | None = None
    prompt: str | None = "prompt"
    response: str = "response"
    seq_len: int = 1024
    dtype: str = "bfloat16"
    remat: str = "full"

    def __post_init__(self) -> None:
        _check_int("task.seq_len", self.seq_len, 2)
        _check_choice("task.dtype", self.dtype, DTYPES)
        _check_choice("task.remat", self.remat, REMAT_POLICIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """A transformers Flax encoder with a new head on a text or a pair of texts.

    Attributes:
        model: Folder or hub name.
        train, evaluation: As for `LanguageModelling`; .tsv too.
        text, text_pair, label: Columns; labels are integers from 0.
        num_labels: Classes.
        max_tokens: Of an example; longer ones are cut.
        dtype: Of the base and the activations.
    """

    METRICS: ClassVar = ("loss", "accuracy")

    model: str
    train: str
    evaluation: str | None = None
    text: str = "sentence"
    text_pair: str | None = None
    label: str = "label"
    num_labels: int = 2
    max_tokens: int = 128
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_int("task.num_labels", self.num_labels, 2)
        _check_int("task.max_tokens", self.max_tokens, 2)
        _check_choice("task.dtype", self.dtype, DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW.

    Attributes:
        learning_rate: Peak.
        schedule: To 0 along a cosine or a line after the warm-up, or constant.
        warmup_steps: Steps in which the rate rises from 0 along a line.
        max_grad_norm: Clips the gradient's global norm; None does not.
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        _check_int("optimizer.warmup_steps", self.warmup_steps, 0)
        for name in ("learning_rate", "eps", *(["max_grad_norm"] if self.max_grad_norm is not None else [])):
            _check_number(f"optimizer.{name}", getattr(self, name), above=0)
        for name, top in (("b1", 1), ("b2", 1), ("weight_decay", math.inf)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < top:
                raise ValueError(f"optimizer.{name} must be a number of at least 0 and below {top}, got {value!r}")

    def rate(self, steps: int) -> optax.Schedule:
        """Step -> learning rate, for a run of `steps` optimizer steps.

        Raises:
            ValueError: a warm-up as long as the run.
        """
        if self.warmup_steps >= steps:
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps} must be below the {steps} steps of the run")
        left = steps - self.warmup_steps
        after = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, left),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, left),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        if not self.warmup_steps:
            return after
        rise = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([rise, after], [self.warmup_steps])

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run, clipping included."""
        adamw = optax.adamw(self.rate(steps), b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)
        return (
            adamw if self.max_grad_norm is None else optax.chain(optax.clip_by_global_norm(self.max_grad_norm), adamw)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """How long to train, and what happens on the way.

    Attributes:
        steps, epochs: Optimizer steps, or passes over the data (a part of one too); give one of them.
        batch_size: Rows of an optimizer step, over all devices and microbatches.
        accumulate_steps: Microbatches of a step.
        log_every: Steps between two lines of metrics.
        eval_every: Steps between two evaluations; None evaluates after the last step alone.
        save_every: Steps between two checkpoints.
        keep_last: Newest checkpoints that are kept, besides the best.
        best: The evaluation's metric by which the best checkpoint is chosen.
        best_mode: Whether its "min" or "max" is the best.
        patience: Stops after this many evaluations without a better one; None does not.
        nonfinite: What a loss or gradient with a NaN or an infinity does: "stop" ends the run, "skip" leaves the
            adapters as they are for this step, and ends the run after `max_skipped` in a row.
        seed: Of the adapters, dropout and the order of the data.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    accumulate_steps: int = 1
    log_every: int = 10
    eval_every: int | None = None
    save_every: int = 100
    keep_last: int = 2
    best: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    patience: int | None = None
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give one of loop.steps and loop.epochs, got {self.steps} and {self.epochs}")
        if self.epochs is not None:
            _check_number("loop.epochs", self.epochs, above=0)
        counts = ("batch_size", "accumulate_steps", "log_every", "save_every", "keep_last", "max_skipped")
        for name in (
            *counts,
            *(name for name in ("steps", "eval_every", "patience") if getattr(self, name) is not None),
        ):
            _check_int(f"loop.{name}", getattr(self, name), 1)
        _check_int("loop.seed", self.seed, 0)
        _check_choice("loop.best_mode", self.best_mode, ("min", "max"))
        _check_choice("loop.nonfinite", self.nonfinite, NONFINITE)
        if self.batch_size % self.accumulate_steps:
            raise ValueError(
                f"loop.batch_size={self.batch_size} does not divide by accumulate_steps={self.accumulate_steps}"
            )

    def total(self, rows: int) -> int:
        """Optimizer steps of a run over `rows` rows."""
        return self.steps if self.steps is not None else max(1, math.ceil((self.epochs or 0) * rows / self.batch_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A training run.

    Attributes:
        mesh: As for `sharding.make_mesh`.
        rules: How the base is cut, as for `sharding.param_shardings`; None takes the architecture's table.
    """

    task: LanguageModelling | Classification
    adapter: Method
    loop: Loop
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: str = "data=-1"
    rules: Rules | None = None

    def __post_init__(self) -> None:
        if isinstance(self.task, Classification) and not (self.adapter.task_type or self.adapter.modules_to_save):
            raise ValueError(
                "adapter.task_type is None: the new head would stay as it was drawn. Set task_type='SEQ_CLS', or name "
                "the head in modules_to_save"
            )
        _check_choice("loop.best", self.loop.best, self.task.METRICS)
        if self.loop.patience is not None and not (self.task.evaluation and self.loop.eval_every):
            raise ValueError(f"loop.patience={self.loop.patience} needs task.evaluation data and loop.eval_every")

    def as_json(self) -> dict[str, Any]:
        """Every field, with the kinds of task and adapter, as JSON gives it back."""
        kinds = {"task": type(self.task).__name__, "adapter": type(self.adapter).__name__}
        content = dataclasses.asdict(self)
        content["rules"] = self.rules and [[pattern, str(spec)] for pattern, spec in self.rules]
        return json.loads(json.dumps({**content, **{n: {"kind": kind, **content[n]} for n, kind in kinds.items()}}))

    def identity(self) -> dict[str, Any]:
        """The fields that a resume must share: all but those that say how, and not what, is computed."""
        content = {name: value for name, value in self.as_json().items() if name not in ("mesh", "rules")}
        return {**content, "loop": {name: v for name, v in content["loop"].items() if name not in _FREE_OF_LOOP}}


def read(path: Path, changes: Sequence[str] = ()) -> Run:
    """The `config` of a Python file, with changes such as "loop.steps=100".

    Raises:
        ValueError: no such file, no `config` in it; a change that names no field, or is no JSON value.
    """
    if not path.is_file():
        raise ValueError(f"there is no config file {path}")
    spec = importlib.util.spec_from_file_location("peanut_run_config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} must be a Python file that builds `config`")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = getattr(module, "config", None)
    if not isinstance(run, Run):
        raise ValueError(f"{path} must define `config`, a peanut_jax.trainer.config.Run, found {type(run).__name__}")
    return _changed(run, changes)


def _changed(run: Run, changes: Sequence[str]) -> Run:
    """The run with all changes made at once, since fields may only make sense together."""
    parts: dict[str, dict[str, Any]] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        part, dot, field = name.rpartition(".")
        holder = getattr(run, part, None) if dot else run
        known = dataclasses.is_dataclass(holder) and field in vars(holder)
        if not equals or not known or dataclasses.is_dataclass(getattr(holder, field)):
            raise ValueError(f"--set takes a field of the config, such as loop.steps=100, got {change!r}")
        parts.setdefault(part, {})[field] = _value(text)
    own: Any = parts.pop("", {})
    whole: Any = {part: dataclasses.replace(getattr(run, part), **fields) for part, fields in parts.items()}
    return dataclasses.replace(run, **whole, **own)


def _value(text: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check_int(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _check_number(name: str, value: Any, above: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value < math.inf:
        raise ValueError(f"{name} must be a finite number above {above}, got {value!r}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
