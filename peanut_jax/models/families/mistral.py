"""Mistral: one window for all layers."""

from peanut_jax.models.families.family import Family, Fields, Windows


def _windows(fields: Fields, layers: int) -> Windows:
    return (fields["sliding_window"],) * layers


MISTRAL = Family(
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    windows=_windows,
)
