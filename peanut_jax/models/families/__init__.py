"""The families of models that the decoder runs: a new one is a file here and a row in `FAMILIES`.

Its model type also goes into the row of `peanut_jax.architectures` whose targets and sharding rules it shares.
"""

from collections.abc import Mapping

from peanut_jax.models.families.family import Family
from peanut_jax.models.families.llama import LLAMA
from peanut_jax.models.families.mistral import MISTRAL
from peanut_jax.models.families.qwen import QWEN2, QWEN3

# HF's model type -> its family.
FAMILIES: Mapping[str, Family] = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
