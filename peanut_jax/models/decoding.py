"""What greedy decoding, sampling and beam search share: the prompts, the first step and the next ones."""

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from peanut_jax.models.cache import Cache, empty_cache
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.serving import Served, Step, adapted_step


@flax.struct.dataclass
class Prompts:
    """What a continuation starts from.

    Attributes:
        params: The model's variables.
        tokens, real: Prompts padded on the left, and where they are not padding.
        served: Adapters that are applied unmerged.
        limit: The most new tokens.
    """

    params: PyTree
    tokens: Int[Array, "batch prompt"]
    real: Bool[Array, "batch prompt"]
    served: Served
    limit: Int[Array, ""]


def read_prompts(
    model: Decoder, prompts: Prompts, room: int, copies: int = 1
) -> tuple[Step, Float[Array, "rows vocab"], Cache]:
    """The model's step function, and the logits and the cache after the prompts.

    Args:
        room: Tokens that a row's cache holds, those of the prompt included.
        copies: Rows that each prompt becomes, one after the other.
    """
    step = adapted_step(model, prompts.params, prompts.served)
    tokens, real = (jnp.repeat(array, copies, axis=0) for array in (prompts.tokens, prompts.real))
    return step, *step(tokens, real, empty_cache(model.config, len(tokens), room, model.dtype))


def read_token(
    step: Step, token: Int[Array, " rows"], logits: Float[Array, "rows vocab"], cache: Cache, *, wanted: Bool[Array, ""]
) -> tuple[Float[Array, "rows vocab"], Cache]:
    """Logits and cache after one more token a row; as they were where they are not `wanted`."""
    real = jnp.ones((len(token), 1), bool)
    return lax.cond(wanted, lambda: step(token[:, None], real, cache), lambda: (logits, cache))


def among(token: Int[Array, "*batch"], eos: tuple[int, ...]) -> Bool[Array, "*batch"]:
    """Whether each token ends a sequence."""
    return jnp.isin(token, jnp.array(eos, jnp.int32)) if eos else jnp.zeros(token.shape, bool)
