"""What to adapt and how: frozen, validated configurations.

Field names and meanings are HF PEFT's (peft 0.21.2, `peft/tuners/peanut/config.py`), so that a PEFT
`adapter_config.json` maps one to one. `orientation` and `dropout` are ours.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence

from peanut_jax.methods.activations import ACTIVATIONS

ALL_LINEAR = "all-linear"
ORIENTATIONS = ("output", "input")
# The heads that HF PEFT trains and saves on its own for a task (peft/peft_model.py, PeftModelFor*).
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which kernels an adapter reads, and the size and weight of its update.

    Args:
        r: Hidden units of the tweaker, and so the largest rank of the update. It may exceed the kernel's shorter
            side: allowed because Prop. 3.2 of the paper needs 2r hidden units, but the rank of the update is then
            bounded by the kernel.
        scaling: Multiplies the update as it is (there is no division by r).
        target_modules: Module names (`"query"` matches a module of that name or any `....query`), or a string: a
            regular expression that must match the whole dotted module path, or `"all-linear"` for every dense layer
            but the output head. `None` takes the architecture's default (`architectures.ARCHITECTURES`).
        exclude_modules: Same language; modules to leave out.
        modules_to_save: Modules trained in full and saved with the adapter, such as a new classifier.
        layers_to_transform: Layer index or indices to adapt; all by default. On an `nn.scan` stack, rows of the stack.
        layers_pattern: Name(s) of the module that holds the layers, when it is not the first one with an index.
        dropout: Rate in [0, 1) applied to the input of the adapter path, in training only (paper tables 9, 10).
        base_model_name_or_path: Recorded with the adapter; not read here.
        task_type: HF PEFT's task name; a classification or question answering task adds its head to the saved modules.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    r: int = 32
    scaling: float = 1.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    dropout: float = 0.0
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        _check_int("r", self.r, minimum=1)
        if self.r > 2**31 - 1:
            raise ValueError("r must be below 2^31")
        if not _is_real(self.scaling) or not 0 < self.scaling <= sys.float_info.max:
            raise ValueError(f"scaling must be a finite number above 0, got {self.scaling!r}")
        if not _is_real(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.task_type is not None and self.task_type not in list(TASK_HEADS):
            raise ValueError(f"task_type must be one of {sorted(TASK_HEADS)} or None, got {self.task_type!r}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lower() != ALL_LINEAR:
                _check_regex(name, value)
            else:
                self._freeze(name, value, str)
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save must be a list of names, got the string {self.modules_to_save!r}")
        self._freeze("modules_to_save", self.modules_to_save, str)
        self._freeze("layers_pattern", self.layers_pattern, str)
        for pattern in (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            _check_regex("layers_pattern", pattern)
        self._freeze("layers_to_transform", self.layers_to_transform, int)
        layers = self.layers_to_transform
        for index in (layers,) if isinstance(layers, int) else layers or ():
            _check_int("layers_to_transform", index, minimum=0)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform: say which layers to adapt"
            )

    def _freeze(self, name: str, value: object, kind: type) -> None:
        """Turns a list field into a tuple, so that a config hashes and can be a static argument of jit."""
        if value is None or isinstance(value, str) or (kind is int and _is_int(value)):
            return
        if not isinstance(value, (list, tuple, set, frozenset)):
            raise ValueError(f"{name} must be a list, got {value!r}")
        items = tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
        if not items or not all(isinstance(item, kind) for item in items):
            raise ValueError(f"{name} must be a list of one or more {kind.__name__}, got {value!r}")
        object.__setattr__(self, name, items)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeanutConfig(AdapterConfig):
    """PEANuT: W = W0 + scaling * f(W0; theta), with f a small network that reads the frozen kernel itself.

    Args:
        depth: Encoder/decoder pairs between A and B. The paper's depth counts layers: its 2, 4, 6 are 0, 1, 2 here.
        act_fn: The nonlinearity, a key of `activations.ACTIVATIONS`. `"linear"` with depth 0 is multiplicative LoRA.
        orientation: `"output"` reads the rows of W0 [d_in, d_out] (HF PEFT, the authors' vision and NLU code);
            `"input"` applies the same network to W0^T (the authors' LLM code).
        init_weights: True starts from B = 0, an exact no-op; False draws B too.

    See `AdapterConfig` for the other fields.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Example:
        >>> PeanutConfig(r=8, depth=1, target_modules=["query", "value"]).depth
        1

    References:
        arXiv:2410.01870v3, sections 3.1 and 3.2; `peft/tuners/peanut/config.py` of huggingface/peft 0.21.2.
    """

    depth: int = 0
    act_fn: str = "relu"
    init_weights: bool = True
    orientation: str = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int("depth", self.depth, minimum=0)
        _check_activation(self.act_fn)
        if self.orientation not in ORIENTATIONS:
            raise ValueError(f"orientation must be one of {ORIENTATIONS}, got {self.orientation!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """LoRA (dW = scaling * A @ B), and with an activation the paper's nonlinear LoRA (dW = scaling * act(A) @ B).

    The baselines of the paper's table 5, on the same road as PEANuT so that a comparison differs in `factors` alone.

    Args:
        act_fn: `"linear"` for LoRA, any other activation for nonlinear LoRA.

    See `AdapterConfig` for the other fields. `scaling` is LoRA's alpha / r.

    References:
        arXiv:2106.09685, section 4.1; arXiv:2410.01870v3, table 5.
    """

    act_fn: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_activation(self.act_fn)


Config = PeanutConfig | LoraConfig


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _check_activation(name: str) -> None:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"act_fn must be one of {sorted(ACTIVATIONS)}, got {name!r}")


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} is a string, so a regular expression, and {pattern!r} is none: {error}") from error
