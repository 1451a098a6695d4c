"""What a run is made of: typed, validated once, with one place for each default."""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import optax

from peanut_jax.methods.base import Method
from peanut_jax.sharding import Rules
from peanut_jax.trainer.checks import check_choice, check_int, check_positive, check_range
from peanut_jax.trainer.tasks.base import DIRECTIONS, Direction, TaskConfig, directions
from peanut_jax.training import partition

logger = logging.getLogger(__name__)
SCHEDULES = ("cosine", "linear", "constant")
NONFINITE = ("stop", "skip")
# Fields of the loop that may change when a run is resumed.
_FREE_OF_LOOP = ("steps", "epochs", "log_every", "eval_every", "save_every", "keep_last", "nonfinite", "max_skipped")
# Two ways to say one thing: of each pair one is given, and the other is None.
EXCLUSIVE = {"loop.steps": "loop.epochs", "loop.epochs": "loop.steps"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW.

    Attributes:
        learning_rate: Peak rate.
        saved_learning_rate: Peak rate of the saved modules, such as a new head; None for `learning_rate`.
        schedule: "cosine" and "linear" fall to 0 after the warm-up; "constant" stays.
        warmup_steps: Steps in which the rate rises from 0 along a line.
        max_grad_norm: Clips the global norm of the gradient, of adapters and saved modules together; None does not.
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    saved_learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        check_int("optimizer.warmup_steps", self.warmup_steps, 0)
        for name in ("learning_rate", "eps"):
            check_positive(f"optimizer.{name}", getattr(self, name))
        for name in ("max_grad_norm", "saved_learning_rate"):
            if getattr(self, name) is not None:
                check_positive(f"optimizer.{name}", getattr(self, name))
        for name, top in (("b1", 1), ("b2", 1), ("weight_decay", math.inf)):
            check_range(f"optimizer.{name}", getattr(self, name), below=top)

    def rate(self, steps: int) -> optax.Schedule:
        """Step -> learning rate of the adapters, for a run of `steps` optimizer steps.

        Raises:
            ValueError: a warm-up as long as the run.
        """
        return self._schedule(self.learning_rate, steps)

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of `steps` steps, clipping included."""
        tx = self._adamw(self.learning_rate, steps)
        if self.saved_learning_rate is not None:
            tx = partition(adapters=tx, saved=self._adamw(self.saved_learning_rate, steps))
        return tx if self.max_grad_norm is None else optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)

    def _adamw(self, peak: float, steps: int) -> optax.GradientTransformation:
        rate = self._schedule(peak, steps)
        return optax.adamw(rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)

    def _schedule(self, peak: float, steps: int) -> optax.Schedule:
        if self.warmup_steps >= steps:
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps} must be below the {steps} steps of the run")
        left = steps - self.warmup_steps
        after = {
            "cosine": optax.cosine_decay_schedule(peak, left),
            "linear": optax.linear_schedule(peak, 0.0, left),
            "constant": optax.constant_schedule(peak),
        }[self.schedule]
        if not self.warmup_steps:
            return after
        rise = optax.linear_schedule(0.0, peak, self.warmup_steps)
        return optax.join_schedules([rise, after], [self.warmup_steps])


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
        best_mode: Whether its "min" or "max" is the best; None for what the task's METRICS say of it.
        patience: Stops after this many evaluations without a better one; None does not.
        nonfinite: What a loss or gradient with a NaN or an infinity does: "stop" ends the run, "skip" leaves the
            adapters as they are for this step, and ends the run after `max_skipped` in a row.
        seed: Draws the adapters, a new head, dropout and the order of the data.
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
    best_mode: Direction | None = None
    patience: int | None = None
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give one of loop.steps and loop.epochs, got {self.steps} and {self.epochs}")
        if self.epochs is not None:
            check_positive("loop.epochs", self.epochs)
        for name in ("batch_size", "accumulate_steps", "log_every", "save_every", "keep_last", "max_skipped"):
            check_int(f"loop.{name}", getattr(self, name), 1)
        for name in ("steps", "eval_every", "patience"):
            if getattr(self, name) is not None:
                check_int(f"loop.{name}", getattr(self, name), 1)
        check_int("loop.seed", self.seed, 0)
        if self.best_mode is not None:
            check_choice("loop.best_mode", self.best_mode, DIRECTIONS)
        check_choice("loop.nonfinite", self.nonfinite, NONFINITE)
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
        task: `Classification`, `LanguageModelling` or one of your own: see `tasks.base.TaskConfig`.
        adapter: What to adapt, and how.
        mesh: As for `sharding.make_mesh`.
        rules: How the base is sharded, as for `sharding.param_shardings`; None takes the architecture's table.

    Raises:
        ValueError: a task that is not one, an adapter or a loop that does not fit it.
    """

    task: TaskConfig
    adapter: Method
    loop: Loop
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: str = "data=-1"
    rules: Rules | None = None

    def __post_init__(self) -> None:
        if not dataclasses.is_dataclass(self.task) or not isinstance(self.task, TaskConfig):
            raise ValueError(
                "task must be a dataclass with METRICS, model, evaluation, check and build, as "
                f"peanut_jax.trainer.tasks.base.TaskConfig says, got {self.task!r}"
            )
        self.task.check(self.adapter)
        self._check_best()
        if self.loop.patience is not None and not (self.task.evaluation and self.loop.eval_every):
            raise ValueError(f"loop.patience={self.loop.patience} needs task.evaluation data and loop.eval_every")

    @property
    def best_mode(self) -> Direction:
        """Whether "min" or "max" of `loop.best` is the best: what the loop says, or else the task's METRICS."""
        mode = self.loop.best_mode or directions(self.task.METRICS)[self.loop.best]
        assert mode is not None
        return mode

    def _check_best(self) -> None:
        known = directions(self.task.METRICS)
        check_choice("loop.best", self.loop.best, tuple(known))
        own = known[self.loop.best]
        if own is None and self.loop.best_mode is None:
            raise ValueError(
                f"METRICS of {type(self.task).__name__} does not say whether the min or the max of {self.loop.best!r} "
                f'is the best: make it a mapping such as {{"loss": "min", "{self.loop.best}": "max"}}, or set '
                "loop.best_mode"
            )
        if own is not None and self.loop.best_mode not in (None, own):
            logger.warning(
                "loop.best_mode=%r keeps the %s of %r as the best, whose own direction is %r: leave best_mode out for "
                "that", self.loop.best_mode, self.loop.best_mode, self.loop.best, own,
            )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Every field, with the kinds of task and adapter, as JSON gives it back; `loop.best_mode` is never None.

        Raises:
            ValueError: a field that JSON cannot hold.
        """
        kinds = {"task": type(self.task).__name__, "adapter": type(self.adapter).__name__}
        content = dataclasses.asdict(self)
        content["loop"]["best_mode"] = self.best_mode  # as runs of earlier versions have it
        content["rules"] = self.rules and [[pattern, str(spec)] for pattern, spec in self.rules]
        content |= {name: {"kind": kind, **content[name]} for name, kind in kinds.items()}
        try:
            return json.loads(json.dumps(content))
        except TypeError as error:
            raise ValueError(
                f"every field of the config must be one that JSON can hold, for run.json: {error}"
            ) from error

    def identity(self) -> dict[str, Any]:
        """The fields that a resume must share; see `binding`."""
        return binding(self.as_json())


def binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, as `Run.as_json` gives it, that a resume must share.

    All but those that say how, and not what, is computed, and how long.
    """
    content = {name: value for name, value in config.items() if name not in ("mesh", "rules")}
    if isinstance(loop := config.get("loop"), Mapping):
        content["loop"] = {name: value for name, value in loop.items() if name not in _FREE_OF_LOOP}
    return content
