"""Mistral: one window for all layers."""

from peanut_jax.models.families.family import Family, Fields, Windows, window_of


def _windows(fields: Fields, layers: int) -> Windows:
    return (window_of(fields),) * layers


MISTRAL = Family(
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, "eos_token_id": 2},
    windows=_windows,
)
