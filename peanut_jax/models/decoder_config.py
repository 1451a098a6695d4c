"""What a Llama, Mistral, Qwen2 or Qwen3 checkpoint's `config.json` means, and which of them the decoder runs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peanut_jax.files.hub import find, read_json

REMAT_POLICIES = ("none", "dots", "full")
ATTENTIONS = ("auto", "cudnn", "xla")

# Model type -> what transformers 4.57 takes for fields that config.json leaves out (models/*/configuration_*.py). Older
# files leave out what was added to the class later.
_MISSING: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128,
        "attention_bias": False,
    },
}  # fmt: skip
MODEL_TYPES = tuple(_MISSING)
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


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: `type` is "default", "linear" or "llama3"; the last three fields are llama3's."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's shape. Names are those of HF's config.json.

    Attributes:
        head_dim: Width of a head; heads * head_dim need not be hidden_size.
        windows: Per layer, how many keys back a query sees, itself included; None for all.
        qkv_bias, out_bias, mlp_bias: Biases of the dense layers.
        qk_norm: RMSNorm on the heads of queries and keys (Qwen3).
        remat: What the backward pass recomputes: nothing ("none": all activations are kept), everything but matrix
            products ("dots"), or each whole layer ("full").
        scan_layers: One `nn.scan` stack: a compile time that hardly grows with the layers, for training. False gives
            every layer its own parameters, `model/layers/0/...`: faster generation, where slicing a stack costs as much
            as reading a layer's weights.
        attention: "cudnn" (fused, NVIDIA GPUs), "xla", or "auto": cuDNN where it can compute the shapes and dtype.
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

    def __post_init__(self) -> None:
        for field in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "unroll"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.rms_norm_eps, float) or not 0 <= self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps must be a number in [0, 1), got {self.rms_norm_eps!r}")
        windows = self.windows
        if not isinstance(windows, tuple) or len(windows) != self.num_hidden_layers:
            raise ValueError(
                f"windows must be a tuple with one of {self.num_hidden_layers} layers each, got {windows!r}"
            )
        if not all(window is None or (isinstance(window, int) and window > 0) for window in windows):
            raise ValueError(f"sliding_window must be an integer of at least 1 or null, got {windows!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {REMAT_POLICIES}, got {self.remat!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {self.attention!r}")


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
        raise FileNotFoundError(f"{source!r} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        return from_hf(read_json(path), **overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def runs(source: str) -> bool:
    """Whether a folder or hub repository holds a model of the decoder's."""
    path = find(source, "config.json", None)
    return path is not None and read_json(path).get("model_type") in MODEL_TYPES


def from_hf(fields: Mapping[str, Any], **overrides: Any) -> DecoderConfig:
    """The config that the fields of a config.json mean.

    Raises:
        ValueError: another architecture, a missing field, one that the decoder does not support, by name.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MISSING:
        raise ValueError(
            f"model_type {model_type!r} is not one that the decoder runs: {', '.join(_MISSING)}. Encoders and T5 load "
            "with peanut_jax.models.hf.load"
        )
    if missing := [name for name in _REQUIRED if fields.get(name) is None]:
        raise ValueError(f"{missing[0]} is missing")
    for name, allowed in _NEUTRAL.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(
                f"{name}={fields[name]!r} is not supported: the model would be another function without it (supported: "
                f"{', '.join(map(repr, allowed))})"
            )
    known = {**_MISSING[model_type], **{name: value for name, value in fields.items() if value is not None}}
    if "sliding_window" in fields and fields["sliding_window"] is None:
        known["sliding_window"] = None
    if "num_key_value_heads" in fields and fields["num_key_value_heads"] is None:
        del known["num_key_value_heads"]
    heads, width, layers = (known[n] for n in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    for name, value in (("num_attention_heads", heads), ("hidden_size", width), ("num_hidden_layers", layers)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if known.get("head_dim") is None and width % heads:
        raise ValueError(f"hidden_size={width} must be a multiple of num_attention_heads={heads} without a head_dim")
    # transformers' Mistral has no biases and Qwen2's are fixed, whatever the fields say.
    bias = model_type in ("llama", "qwen3") and bool(known.get("attention_bias", False))
    names = {field.name for field in dataclasses.fields(DecoderConfig)}
    if unknown := sorted(overrides.keys() - names):
        raise ValueError(f"{unknown[0]!r} is no field of DecoderConfig; fields: {', '.join(sorted(names))}")
    return DecoderConfig(
        **{
            "model_type": model_type,
            **{name: known[name] for name in (*_REQUIRED, "max_position_embeddings")},
            "num_key_value_heads": known.get("num_key_value_heads", heads),
            "head_dim": known.get("head_dim") or width // heads,
            "rms_norm_eps": _float(known.get("rms_norm_eps", 1e-6)),
            "rope": _rope(known),
            "windows": _windows(model_type, known, layers),
            "qkv_bias": True if model_type == "qwen2" else bias,
            "out_bias": False if model_type == "qwen2" else bias,
            "mlp_bias": model_type == "llama" and bool(known.get("mlp_bias", False)),
            "qk_norm": model_type == "qwen3",
            "tie_word_embeddings": bool(known.get("tie_word_embeddings", False)),
            **overrides,
        }
    )


def _float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _rope(known: Mapping[str, Any]) -> Rope:
    """transformers 4 keeps rope_theta beside rope_scaling; 5 puts both into rope_parameters."""
    raw = known.get("rope_parameters") or known.get("rope_scaling") or {}
    if not isinstance(raw, Mapping):
        raise ValueError(f"rope_scaling must be an object, got {raw!r}")
    given = dict(raw)
    if given.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor={given['partial_rotary_factor']!r} is not supported (supported: 1)")
    theta = given.pop("rope_theta", known.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needed:
        raise ValueError(f"rope type {kind!r} is not supported, only {', '.join(needed)}")
    if missing := [name for name in needed[kind] if name not in given]:
        raise ValueError(f"rope type {kind!r} needs {missing[0]}")
    numbers = {"rope_theta": theta, **{name: given[name] for name in needed[kind]}}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return Rope(theta=float(theta), type=kind, **{name: given[name] for name in needed[kind]})


def _windows(model_type: str, known: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Mistral's window is every layer's; Qwen's is that of layer_types, or of layers from max_window_layers on."""
    window = known.get("sliding_window")
    if model_type == "llama" or window is None:
        return (None,) * layers
    if model_type == "mistral":
        return (window,) * layers
    if not known.get("use_sliding_window", False):
        return (None,) * layers
    types = known.get("layer_types")
    if types is None:
        first = known.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    if len(types) != layers or any(one not in ("full_attention", "sliding_attention") for one in types):
        raise ValueError(
            f"layer_types must be full_attention or sliding_attention for each of {layers} layers, got {types}"
        )
    return tuple(window if one == "sliding_attention" else None for one in types)
