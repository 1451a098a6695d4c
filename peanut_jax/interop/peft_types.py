"""How HF PEFT writes each method: one row of `TYPES`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from peanut_jax.messages import short
from peanut_jax.methods.base import Method
from peanut_jax.methods.dora import DoraConfig
from peanut_jax.methods.lora import LoraConfig
from peanut_jax.methods.peanut import PeanutConfig
from peanut_jax.methods.subset import SubsetConfig


@dataclasses.dataclass(frozen=True)
class PeftType:
    """One method's form in an adapter directory.

    Attributes:
        name: Its peft_type.
        method: Its config.
        tensors: Leaf of theta -> the tensor's name behind the module's; "{i}" numbers the leaf's first axis.
        fixed: Fields of the config that this form fixes, so that the file does not hold them.
        marks: Fields of the file by which it is told from others of the same peft_type; False where absent.
        is_lora: Whether the file has the fields of PEFT's LoRA: lora_alpha for the scaling, patterns, use_rslora.
        known_to_peft: Whether HF PEFT 0.21.2 loads it. It refuses the others by their peft_type, and would compute
            another function.
    """

    name: str
    method: type[Method]
    tensors: Mapping[str, str]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    marks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_lora: bool = False
    known_to_peft: bool = True

    def patterns(self) -> dict[str, re.Pattern[str]]:
        """Leaf -> expression of its tensors behind the prefix, with the groups `module` and perhaps `i`."""
        return {
            leaf: re.compile(r"(?P<module>.+)\." + re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)"))
            for leaf, name in self.tensors.items()
        }


_PEANUT = {
    "a": "peanut_A.weight",
    "b": "peanut_B.weight",
    "encoders": "peanut_encoders.{i}.weight",
    "decoders": "peanut_decoders.{i}.weight",
}
_LORA = {"a": "lora_A.weight", "b": "lora_B.weight"}
_NONLINEAR_LORA = {leaf: f"nonlinear_{name}" for leaf, name in _LORA.items()}

TYPES: tuple[PeftType, ...] = (
    PeftType("PEANUT", PeanutConfig, _PEANUT, {"orientation": "output"}),
    PeftType("LORA", LoraConfig, _LORA, {"act_fn": "linear"}, {"use_dora": False}, is_lora=True),
    PeftType("LORA", DoraConfig, {**_LORA, "magnitude": "lora_magnitude_vector"}, {}, {"use_dora": True}, is_lora=True),
    PeftType("PEANUT_INPUT", PeanutConfig, _PEANUT, {"orientation": "input"}, known_to_peft=False),
    PeftType("NONLINEAR_LORA", LoraConfig, _NONLINEAR_LORA, known_to_peft=False),
    PeftType("SUBSET", SubsetConfig, {}, known_to_peft=False),
)


def type_of(config: Method) -> PeftType:
    """The row of a config.

    Raises:
        NotImplementedError: a method without one.
    """
    for row in TYPES:
        if type(config) is row.method and all(getattr(config, name) == value for name, value in row.fixed.items()):
            return row
    raise NotImplementedError(
        f"{type(config).__name__} cannot be written as an adapter directory (interop/peft_types.py has what can): merge"
    )


def type_named(fields: Mapping[str, Any]) -> PeftType:
    """The row that the fields of an `adapter_config.json` mean.

    Raises:
        ValueError: another peft_type.
    """
    name = fields.get("peft_type")
    for row in TYPES:
        if row.name == name and all(bool(fields.get(mark)) == value for mark, value in row.marks.items()):
            return row
    known = ", ".join(dict.fromkeys(row.name for row in TYPES))
    raise ValueError(f"peft_type must be one of {known}, got {short(name)}")
