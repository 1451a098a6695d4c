"""Qwen2, with its fixed biases, and Qwen3, with norms on queries and keys."""

from peanut_jax.models.families.family import Biases, Family, Fields, Windows


def _windows(fields: Fields, layers: int) -> Windows:
    """The window is that of the layers that layer_types names, or of all from max_window_layers on."""
    window = fields["sliding_window"]
    if window is None or not fields.get("use_sliding_window", False):
        return (None,) * layers
    types = fields.get("layer_types")
    if types is None:
        first = fields.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    if len(types) != layers or any(one not in ("full_attention", "sliding_attention") for one in types):
        raise ValueError(
            f"layer_types must be full_attention or sliding_attention for each of {layers} layers, got {types}"
        )
    return tuple(window if one == "sliding_attention" else None for one in types)


def _qwen2_biases(fields: Fields) -> Biases:
    """transformers' class has these, whatever the fields say."""
    return Biases(qkv=True)


def _qwen3_biases(fields: Fields) -> Biases:
    attention = bool(fields["attention_bias"])
    return Biases(qkv=attention, out=attention)


QWEN2 = Family(
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    biases=_qwen2_biases,
    windows=_windows,
)
QWEN3 = Family(
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    biases=_qwen3_biases,
    windows=_windows,
    qk_norm=True,
)
