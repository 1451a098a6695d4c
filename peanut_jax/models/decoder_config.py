"""What a Llama, Mistral, Qwen2 or Qwen3 checkpoint's `config.json` means, and which of them the decoder runs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peanut_jax.files.hub import find, without_config
from peanut_jax.files.untrusted import read_json
from peanut_jax.messages import reading, short
from peanut_jax.models.config_fields import SIZES, flag, number, size
from peanut_jax.models.families import FAMILIES
from peanut_jax.models.families.family import Family, Fields
from peanut_jax.models.generation_config import Generation, read_generation
from peanut_jax.models.rope import Rope, read_rope

REMAT_POLICIES = ("none", "dots", "attention", "full")  # each keeps less than the one before
ATTENTIONS = ("auto", "splash", "cudnn", "chunked", "xla")

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Fields that make it another function, unless they have one of these values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's shape. Names are those of HF's config.json.

    Attributes:
        head_dim: Width of a head; heads * head_dim need not be hidden_size.
        windows: Per layer, how many keys back a query sees, itself included; None for all.
        qkv_bias, out_bias, mlp_bias: Biases of the dense layers.
        qk_norm: RMSNorm on the heads of queries and keys (Qwen3).
        remat: What the backward pass recomputes: nothing ("none": all activations are kept), everything but matrix
            products and attention ("dots"), the MLP's products too ("attention"), or each whole layer ("full").
        scan_layers: One `nn.scan` stack: a compile time that hardly grows with the layers, for training. False gives
            every layer its own parameters, `model/layers/0/...`: faster generation, where slicing a stack costs as much
            as reading a layer's weights.
        attention: A kernel, "splash" (TPUs) or "cudnn" (NVIDIA GPUs); XLA by blocks ("chunked") or at once ("xla"); or
            "auto": the device's kernel where it takes the shapes and dtype, else XLA, by blocks in long rows.
        generation: Which tokens end a continuation, and how the checkpoint's authors draw them.
        unroll: Layers of `nn.scan` per iteration; with num_hidden_layers there is no loop, and XLA counts every layer.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    remat: str = "full"
    unroll: int = 1
    scan_layers: bool = True
    attention: str = "auto"
    generation: Generation = dataclasses.field(default_factory=Generation)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in SIZES:
                size(field.name, getattr(self, field.name))
            elif field.type is bool:
                flag(field.name, getattr(self, field.name))
        if not isinstance(self.rms_norm_eps, float) or not 0 <= self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps must be a number in [0, 1), got {short(self.rms_norm_eps)}")
        windows = self.windows
        if not isinstance(windows, tuple) or len(windows) != self.num_hidden_layers:
            raise ValueError(
                f"windows must be a tuple with one of {self.num_hidden_layers} layers each, got {short(windows)}"
            )
        for window in windows:
            if window is not None:
                size("sliding_window", window)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {REMAT_POLICIES}, got {short(self.remat)}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {short(self.attention)}")
        if not isinstance(self.rope, Rope) or not isinstance(self.generation, Generation):
            raise ValueError(f"rope and generation must be a Rope and a Generation, got {short(self.rope)}")


def read_config(source: str, revision: str | None = None, **overrides: Any) -> DecoderConfig:
    """The config of a folder, a hub repository or a file.

    Args:
        overrides: Fields of `DecoderConfig` to set, such as `remat="dots"`.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: as `from_hf`.
    """
    path = Path(source) if Path(source).is_file() else find(source, "config.json", revision)
    if path is None:
        raise FileNotFoundError(without_config(source))
    with reading(path):
        return from_hf(read_json(path), **overrides)


def runs(source: str) -> bool:
    """Whether a folder or hub repository holds a model of the decoder's."""
    path = find(source, "config.json", None)
    model_type = None if path is None else read_json(path).get("model_type")
    return isinstance(model_type, str) and model_type in FAMILIES


def from_hf(fields: Mapping[str, Any], **overrides: Any) -> DecoderConfig:
    """The config that the fields of a config.json mean.

    Raises:
        ValueError: another architecture, a missing field, one that the decoder does not support, by name.
    """
    model_type, family = _family(fields)
    _check_supported(fields)
    known = _with_defaults(fields, family)
    heads, head_dim, layers = _sizes(known)
    _check_overrides(overrides)
    rope, windows, biases = read_rope(known), family.windows(known, layers), family.biases(known)
    return DecoderConfig(
        **{
            "model_type": model_type,
            **{name: known[name] for name in (*_REQUIRED, "max_position_embeddings")},
            "num_key_value_heads": known.get("num_key_value_heads", heads),
            "head_dim": head_dim,
            "rms_norm_eps": number("rms_norm_eps", known.get("rms_norm_eps", 1e-6), "in [0, 1)", 0, 1),
            "rope": rope,
            "windows": windows,
            "qkv_bias": biases.qkv,
            "out_bias": biases.out,
            "mlp_bias": biases.mlp,
            "qk_norm": family.qk_norm,
            "tie_word_embeddings": flag("tie_word_embeddings", known.get("tie_word_embeddings", False)),
            "generation": read_generation(known, size("vocab_size", known["vocab_size"])),
            **overrides,
        }
    )


def _family(fields: Fields) -> tuple[str, Family]:
    """The model type and its family."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type {short(model_type)} is not one that the decoder runs: {', '.join(FAMILIES)}. Encoders and T5 "
            "load with peanut_jax.models.hf.load"
        )
    return model_type, FAMILIES[model_type]


def _check_supported(fields: Fields) -> None:
    if missing := [name for name in _REQUIRED if fields.get(name) is None]:
        raise ValueError(f"{missing[0]} is missing")
    for name, allowed in _NEUTRAL.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(
                f"{name}={short(fields[name])} is not supported: the model would be another function without it "
                f"(supported: {', '.join(map(repr, allowed))})"
            )


def _with_defaults(fields: Fields, family: Family) -> dict[str, Any]:
    """The fields, and the family's defaults for those that are left out or null."""
    known = {**family.defaults, **{name: value for name, value in fields.items() if value is not None}}
    # For these null is a value: no window, no token that ends, and as many heads as queries have.
    for name in ("sliding_window", "eos_token_id"):
        if name in fields and fields[name] is None:
            known[name] = None
    if "num_key_value_heads" in fields and fields["num_key_value_heads"] is None:
        known.pop("num_key_value_heads", None)
    return known


def _sizes(known: Fields) -> tuple[int, int, int]:
    """Heads, their width and layers, checked before anything is computed from them."""
    names = ("num_attention_heads", "hidden_size", "num_hidden_layers")
    heads, width, layers = (size(name, known[name]) for name in names)
    if known.get("head_dim") is not None:
        return heads, size("head_dim", known["head_dim"]), layers
    if width % heads:
        raise ValueError(f"hidden_size={width} must be a multiple of num_attention_heads={heads} without a head_dim")
    return heads, width // heads, layers


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    names = {field.name for field in dataclasses.fields(DecoderConfig)}
    if unknown := sorted(overrides.keys() - names):
        raise ValueError(f"{unknown[0]!r} is no field of DecoderConfig; fields: {', '.join(sorted(names))}")
