"""Qwen2, with its fixed biases, and Qwen3, with norms on queries and keys."""

from peanut_jax.messages import short
from peanut_jax.models.config_fields import flag, size
from peanut_jax.models.families.family import Biases, Family, Fields, Windows, window_of

_TYPES = ("full_attention", "sliding_attention")


def _windows(fields: Fields, layers: int) -> Windows:
    """The window is that of the layers that layer_types names, or of all from max_window_layers on."""
    window, used = window_of(fields), flag("use_sliding_window", fields["use_sliding_window"])
    first, types = size("max_window_layers", fields["max_window_layers"], 0), fields.get("layer_types")
    if types is None:
        types = [_TYPES[layer >= first] for layer in range(layers)]
    if not isinstance(types, (list, tuple)) or len(types) != layers or any(one not in _TYPES for one in types):
        raise ValueError(
            f"layer_types must be a list of full_attention or sliding_attention, for each of {layers} layers, got "
            f"{short(types)}"
        )
    return tuple(window if used and one == "sliding_attention" else None for one in types)


def _qwen2_biases(fields: Fields) -> Biases:
    """transformers' class has these, whatever the fields say."""
    return Biases(qkv=True)


def _qwen3_biases(fields: Fields) -> Biases:
    attention = flag("attention_bias", fields["attention_bias"])
    return Biases(qkv=attention, out=attention)


QWEN2 = Family(
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    biases=_qwen2_biases,
    windows=_windows,
)
QWEN3 = Family(
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    biases=_qwen3_biases,
    windows=_windows,
    qk_norm=True,
)
