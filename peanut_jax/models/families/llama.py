"""Llama 2, 3, 3.1 and 3.2."""

from peanut_jax.models.config_fields import flag
from peanut_jax.models.families.family import Biases, Family, Fields


def _biases(fields: Fields) -> Biases:
    attention = flag("attention_bias", fields["attention_bias"])
    return Biases(qkv=attention, out=attention, mlp=flag("mlp_bias", fields["mlp_bias"]))


LLAMA = Family(
    defaults={"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False, "eos_token_id": 2},
    biases=_biases,
)
