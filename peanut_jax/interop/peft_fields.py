"""The fields of an adapter_config.json: from a config of ours, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from peanut_jax.files.untrusted import OBJECT, typed
from peanut_jax.interop.peft_types import PeftType, type_named
from peanut_jax.messages import short
from peanut_jax.methods.base import TASK_HEADS, Method
from peanut_jax.patterns import matching

# Fields of PEFT 0.21.2's configs that say how a base is found or training starts, and nothing about the function.
_BOOKKEEPING = {
    "auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "runtime_config",
}  # fmt: skip

_LORA_BOOKKEEPING = {
    "megatron_config", "megatron_core", "qalora_group_size", "fan_in_fan_out", "ensure_weight_tying", "eva_config",
    # Read by _lora_scaling, own_fields and config_of.
    "init_lora_weights", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
}  # fmt: skip

# Fields of ours that say how a Flax tree is read, which the shapes of an adapter's tensors tell too.
_NOT_IN_FILES = {"kernel_axes"}

# Of a rank or an alpha: beyond it no scaling fits float32.
_LARGEST = 2.0**128

# LoRA initialisations that leave the base's weights as they are; the others train on another base than the one on disk.
_PLAIN_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def config_of(fields: Mapping[str, Any]) -> Method:
    """The config that the fields of an `adapter_config.json` mean.

    Raises:
        ValueError: another peft_type, an unknown field that is set, a bad value.
    """
    row = type_named(fields)
    own = {field.name for field in dataclasses.fields(row.method)} - _NOT_IN_FILES
    given = {name: value for name, value in fields.items() if name in own}
    _check_known(fields, own | _BOOKKEEPING | row.marks.keys() | (_LORA_BOOKKEEPING if row.is_lora else set()))
    if row.is_lora:
        if fields.get("init_lora_weights") not in _PLAIN_LORA_INITS:
            raise ValueError(
                f"init_lora_weights={short(fields['init_lora_weights'])} trains on a changed base; convert the adapter "
                "in PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        given["dropout"] = fields.get("lora_dropout", given.get("dropout", 0.0))
        given["scaling"] = _lora_scaling(fields, fields.get("r"), fields.get("lora_alpha", 8))
    nullable = {field.name for field in dataclasses.fields(row.method) if field.default is None}
    given = {name: value for name, value in given.items() if value not in (None, []) or name not in nullable}
    config = row.method(**{**given, **row.fixed})
    heads = TASK_HEADS.get(config.task_type or "", ())  # which PEFT writes among the saved modules
    named = tuple(name for name in config.modules_to_save or () if name not in heads)
    return dataclasses.replace(config, modules_to_save=named or None)


def _check_known(fields: Mapping[str, Any], known: set[str]) -> None:
    for name, value in fields.items():
        if name not in known and value not in (None, False, [], {}, "none"):
            given = f"{short(name, 40)[1:-1]}={short(value)}"
            raise ValueError(f"{given} is not supported: the adapter would be another function without it")


def fields_of(config: Method, row: PeftType) -> dict[str, Any]:
    """The fields of `adapter_config.json`."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    fields |= {"peft_type": row.name, "inference_mode": True, "auto_mapping": None, "revision": None}
    for name in (*row.fixed, *_NOT_IN_FILES):
        del fields[name]
    dropout = fields.pop("dropout")
    if row.is_lora:
        alpha = fields["r"] * fields.pop("scaling")
        fields |= {
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            **row.marks,
        }
    elif dropout:
        fields["dropout"] = dropout
    return fields


def _lora_scaling(fields: Mapping[str, Any], r: Any, alpha: Any) -> float:
    for name, value in (("r", r), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST:
            raise ValueError(f"{name} must be a number above 0, got {short(value)}")
    return alpha / r**0.5 if fields.get("use_rslora") else alpha / r


def own_fields(modules: Sequence[str], config: Method, fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rank and scaling of the modules for which LoRA's patterns make them other than the config's.

    Raises:
        ValueError: patterns that are not regular expressions, or values that are not ranks and alphas.
    """
    if "lora_alpha" not in fields:
        return {}
    default = {"r": getattr(config, "r", None), "scaling": getattr(config, "scaling", None)}
    ranks = _by_pattern("rank_pattern", fields, modules)
    alphas = _by_pattern("alpha_pattern", fields, modules)
    found = {}
    for module in ranks.keys() | alphas.keys():
        r, alpha = ranks.get(module, default["r"]), alphas.get(module, fields["lora_alpha"])
        own = {"r": r, "scaling": _lora_scaling(fields, r, alpha)}
        if own != default:
            found[module] = own
    return found


def _by_pattern(name: str, fields: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Module -> value of the first pattern that matches the end of its name (peft 0.21.2, `get_pattern_key`)."""
    patterns = typed(fields, name, OBJECT, {})
    found = matching(name, list(patterns), modules, r"(?:|.*\.)(?:{})") if patterns else {}
    values = list(patterns.values())
    return {module: values[number] for module, (number, _) in found.items()}
