"""What to adapt and how: a config is a method, and the only place that knows its mathematics.

Field names and meanings are HF PEFT's (peft 0.21.2, `peft/tuners/*/config.py`), so that a PEFT `adapter_config.json`
maps one to one. `orientation`, `dropout` of a PEANuT and `kernel_axes` are ours.
"""

import abc
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from peanut_jax.matrices import Matrix
from peanut_jax.messages import short
from peanut_jax.methods import fields
from peanut_jax.patterns import check_pattern
from peanut_jax.updates import KernelUpdate

ALL_LINEAR = "all-linear"
# What a `layers_pattern` is put into: it names the module that holds the layers, and the layer's number follows.
LAYERS_FORM = r"(?:|.*?\.)(?:{})\.(?P<layer>\d+)\..*"
# The heads that HF PEFT trains and saves on its own for a task (peft/peft_model.py, PeftModelFor*).
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}

# Leaf -> array: what is trained for one kernel.
Theta = dict[str, Array]
# (key, shape with the stack's axes, kernel) -> the array that training starts from.
Start = Callable[[PRNGKeyArray, tuple[int, ...], Matrix], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which modules an adapter changes, and which it trains in full.

    Args:
        target_modules: Module names (`"query"` matches a module of that name or any `....query`), or a string: a
            regular expression that must match the whole dotted module path, or `"all-linear"` for every dense layer
            but the output head. `None` takes the architecture's default (`architectures.ARCHITECTURES`). The module of
            a bare top-level `nn.Dense` has the name "".
        exclude_modules: Same language; modules to leave out.
        modules_to_save: Modules trained in full and saved with the adapter, such as a new classifier.
        layers_to_transform: Layer index or indices to adapt; all by default. On an `nn.scan` stack, rows of the stack.
        layers_pattern: Name(s) of the module that holds the layers, when it is not the first one with an index.
        dropout: Rate in [0, 1) applied to the input of the adapter path, in training only (paper tables 9, 10).
        base_model_name_or_path: Recorded with the adapter; by default what the library's loaders loaded.
        task_type: HF PEFT's task name; a classification or question answering task adds its head to the saved modules.
        kernel_axes: From `peanut_jax.kernel_axes`, for a model with `nn.DenseGeneral` kernels that have no bias.

    Raises:
        ValueError: naming the field, the value and what is allowed.
        TypeError: a field that there is not, with the closest that there is.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    dropout: float = 0.0
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    kernel_axes: Mapping[str, tuple[int, int]] | Sequence[tuple[str, tuple[int, int]]] | None = None

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuses fields that there are not: HF's other spellings deserve more than Python's own message."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = cls.HINTS.get(name) or (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}")
                raise TypeError(f"{cls.__name__} has no field {name!r}: {hint}")
        return super().__new__(cls)

    ADAPTS_KERNELS: ClassVar[bool] = True
    # Field of another library -> what to write here.
    HINTS: ClassVar[Mapping[str, str]] = {
        "lora_alpha": "set scaling = lora_alpha / r",
        "lora_dropout": "it is called dropout here",
        "rank": "it is called r here",
    }

    def __post_init__(self) -> None:
        self._set("dropout", fields.rate("dropout", self.dropout))
        if self.task_type is not None and self.task_type not in list(TASK_HEADS):
            raise ValueError(f"task_type must be one of {sorted(TASK_HEADS)} or None, got {short(self.task_type)}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lower() != ALL_LINEAR:
                check_pattern(name, value)
            self._set(name, fields.names(name, value))
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save must be a list of names, got the string {short(self.modules_to_save)}")
        for name in ("modules_to_save", "layers_pattern"):
            self._set(name, fields.names(name, getattr(self, name)))
        for pattern in (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            check_pattern("layers_pattern", pattern, LAYERS_FORM)
        self._set("layers_to_transform", fields.layers("layers_to_transform", self.layers_to_transform))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={short(self.layers_pattern)} needs layers_to_transform: say which layers to adapt"
            )
        fields.text("base_model_name_or_path", self.base_model_name_or_path)
        self._set("kernel_axes", fields.kernel_axes("kernel_axes", self.kernel_axes))

    def _set(self, name: str, value: Any) -> None:
        """Replaces a field by its checked value, while the config is made."""
        object.__setattr__(self, name, value)


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], kernel: Matrix) -> Array:
    """Uniform in +-1/sqrt(fan_in), fan_in being the axis before the last.

    References:
        `torch.nn.init.kaiming_uniform_(a=sqrt(5))` in `PeanutLayer.reset_peanut_parameters` of peft 0.21.2.
    """
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def zeros(key: PRNGKeyArray, shape: tuple[int, ...], kernel: Matrix) -> Array:
    """Zeros, so that an update that is a product with it is exactly 0."""
    return jnp.zeros(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One trained array of a kernel's theta.

    Attributes:
        axes: What each axis is, in words: "in" and "out" are the kernel's sides, any other word the config's field of
            that name, such as "r". They say the array's shape, how it is sharded, and its fan-in.
        start: What training starts from.
    """

    axes: tuple[str, ...]
    start: Start = uniform


class Method(AdapterConfig, abc.ABC):
    """A config that says what becomes of each kernel. Subclass it in a file of its own; nothing else asks which it is.

    Attributes:
        NAME: What people call it.
        READS_BASE: Whether the update is a function of the frozen kernel too, and so belongs to one base alone.
    """

    NAME: ClassVar[str]
    READS_BASE: ClassVar[bool] = True

    @abc.abstractmethod
    def leaves(self) -> dict[str, Leaf]:
        """Name -> leaf of what is trained for one kernel, in the order in which their keys are drawn."""

    @abc.abstractmethod
    def update(
        self,
        theta: Mapping[str, Float[Array, "..."]],
        kernel: Matrix,
        bias: Float[Array, "*stack d_out"] | None = None,
    ) -> KernelUpdate:
        """The update that theta means for a frozen kernel; zero arrays where theta is at its start.

        Args:
            theta: Name -> float32 array with the kernel's stack axes leading.
            kernel: W0 [*stack, d_in, d_out].
            bias: The bias of the kernel's module, where it has one.
        """

    def shapes(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each leaf for one [d_in, d_out] kernel, without the stack's axes."""
        sides = {"in": d_in, "out": d_out}
        return {
            name: tuple(sides[word] if word in sides else getattr(self, word) for word in leaf.axes)
            for name, leaf in self.leaves().items()
        }

    def start(self, key: PRNGKeyArray, kernel: Matrix) -> Theta:
        """Draws theta for a kernel [*stack, d_in, d_out]; `key` is consumed whole."""
        leaves, shapes = self.leaves(), self.shapes(*kernel.shape[-2:])
        keys = jax.random.split(key, len(leaves))
        stack = kernel.shape[:-2]
        return {
            name: leaf.start(one, stack + shapes[name], kernel)
            for one, (name, leaf) in zip(keys, leaves.items(), strict=True)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankMethod(Method):
    """What the methods with a rank share.

    Args:
        r: Rank of the update at most (hidden units of PEANuT's network). It may exceed the kernel's shorter side:
            Prop. 3.2 of the paper needs 2r hidden units, but the rank of the update is then bounded by the kernel.
        scaling: Multiplies the update as it is (there is no division by r).

    See `AdapterConfig` for the other fields.
    """

    r: int = 32
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("r", fields.integer("r", self.r, minimum=1))
        self._set("scaling", fields.scale("scaling", self.scaling))


def checked(config: Any) -> Method:
    """`config`, once it is a method.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(config, Method):
        raise ValueError(f"config must be a method such as PeanutConfig(r=8) or LoraConfig(r=8), got {_named(config)}")
    return config


def _named(value: Any) -> str:
    return value.__name__ + " itself, not an instance" if isinstance(value, type) else type(value).__name__
