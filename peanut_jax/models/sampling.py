"""Greedy and sampled continuations.

References:
    transformers 4.57, `generation/utils.py` (`_sample`) and `generation/logits_process.py`.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from peanut_jax.models.cache import Cache
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.decoding import Prompts, among, read_prompts, read_token
from peanut_jax.models.generation_config import Sampling


@flax.struct.dataclass
class _State:
    """Between two tokens.

    Attributes:
        length: New tokens so far.
        tokens: The new tokens, then zeros.
        lengths: Number of new tokens of each row, its end included.
        done: Rows that have ended.
        logits, cache: What the last token gave.
    """

    length: Int[Array, ""]
    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    logits: Float[Array, "batch vocab"]
    cache: Cache


@partial(jax.jit, static_argnames=("model", "room", "eos", "sampling"))
def sample(
    model: Decoder,
    prompts: Prompts,
    *,
    room: int,
    eos: tuple[int, ...],
    sampling: Sampling | None,
    key: PRNGKeyArray,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """Greedy or sampled continuations, and their lengths.

    Args:
        room: Tokens that a row's cache holds, those of the prompt included.
        eos: Tokens that end a continuation.
        sampling: None is greedy.
    """
    (batch, prompt), limit = prompts.tokens.shape, prompts.limit
    step, logits, cache = read_prompts(model, prompts, room)

    def more(state: _State) -> Array:
        return (state.length < limit) & ~state.done.all()

    def body(state: _State) -> _State:
        token = choose(state.logits, sampling, jax.random.fold_in(key, state.length))
        length = state.length + 1
        logits, cache = read_token(step, token, state.logits, state.cache, wanted=length < limit)
        return _State(
            length=length,
            tokens=state.tokens.at[:, state.length].set(token),
            lengths=state.lengths + ~state.done,
            done=state.done | among(token, eos),
            logits=logits,
            cache=cache,
        )

    zeros = partial(jnp.zeros, dtype=jnp.int32)
    start = _State(jnp.int32(0), zeros((batch, room - prompt)), zeros(batch), jnp.zeros(batch, bool), logits, cache)
    end = lax.while_loop(more, body, start)
    return end.tokens, end.lengths


def choose(logits: Float[Array, "batch vocab"], sampling: Sampling | None, key: PRNGKeyArray) -> Int[Array, " batch"]:
    """The next token of each row: the likeliest, or one that is drawn."""
    if sampling is None:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.random.categorical(key, filtered(logits, sampling)).astype(jnp.int32)


def filtered(logits: Float[Array, "*batch vocab"], sampling: Sampling) -> Float[Array, "*batch vocab"]:
    """Logits after temperature, top-k and top-p; tokens that are left out are at minus infinity."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        smallest = lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        largest = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(largest), axis=-1) - jax.nn.softmax(largest)
        smallest = jnp.where(before < sampling.top_p, largest, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits
