"""The shapes that are measured, as the fields of their published `config.json`: one table for every benchmark.

Weights are random wherever these are used: what a step costs depends on its shapes, not on its values.
"""

from collections.abc import Mapping
from typing import Any

from peanut_jax.models.decoder_config import DecoderConfig, from_hf

# Rotary frequencies of Llama 3.1 and 3.2.
_LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

# Column -> field of config.json, for what all rows have.
_COLUMNS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
    "rope_theta",
)

_ROWS: Mapping[str, tuple[Any, ...]] = {
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False, 8192, 5e5),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 128, 32000, False, 4096, 1e4),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256, True, 131072, 5e5),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True, 131072, 5e5),
    # For a run on CPU: grouped heads, a tied head.
    "toy": (64, 160, 2, 4, 2, 16, 512, True, 512, 1e4),
}
_ROPE_SCALING: Mapping[str, Mapping[str, Any]] = {
    "llama-3.2-3b": {**_LLAMA3_ROPE, "factor": 32.0},
    "llama-3.2-1b": {**_LLAMA3_ROPE, "factor": 32.0},
}

NAMES = tuple(_ROWS)
# The targets of the paper's LLM runs, which HF PEFT's names are too.
FIVE_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# Every linear layer but the head: PEFT's "all-linear", and "*_proj" of NeMo's recipe.
ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fields(name: str, **changes: Any) -> dict[str, Any]:
    """The fields of `config.json`, as transformers' LlamaConfig takes them too.

    Args:
        name: One of `NAMES`.
        changes: Fields that are to differ, such as `num_hidden_layers=2`.

    Raises:
        ValueError: a name that is not in the table.
    """
    if name not in _ROWS:
        raise ValueError(f"shapes are known for {', '.join(NAMES)}; got {name!r}")
    known = dict(zip(_COLUMNS, _ROWS[name], strict=True))
    common = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    scaling = {"rope_scaling": dict(_ROPE_SCALING[name])} if name in _ROPE_SCALING else {}
    return {**common, **known, **scaling, **changes}


def decoder_config(name: str, *, changes: Mapping[str, Any] | None = None, **overrides: Any) -> DecoderConfig:
    """The decoder's config of these shapes.

    Args:
        changes: Fields of `config.json` that are to differ.
        overrides: Fields of `DecoderConfig`, such as `remat="dots"`.
    """
    return from_hf(fields(name, **(changes or {})), **overrides)
