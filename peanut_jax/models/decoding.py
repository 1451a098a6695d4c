"""What greedy decoding, sampling and beam search share: prompts, what ends a continuation, and its stages.

A continuation is made in stages, each a compiled loop over a cache of one size that runs until the cache is full, or no
row goes on. The next stage's cache has up to twice the room. So time and memory follow the tokens that are there, not
those that would be allowed, and continuations of any length share the stages' programs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from peanut_jax.models.cache import Cache, empty_cache
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.serving import Served, adapted, repeated

# The first stage's slots.
SMALLEST_STAGE = 64


@flax.struct.dataclass
class Prompts:
    """What a continuation starts from.

    Attributes:
        params: The model's variables.
        tokens, real: Prompts padded on the left, and where they are not padding.
        wanted: False for what only fills the batch up.
        served: Adapters that are applied unmerged.
    """

    params: PyTree
    tokens: Int[Array, "prompts seq"]
    real: Bool[Array, "prompts seq"]
    wanted: Bool[Array, " prompts"]
    served: Served


@flax.struct.dataclass
class Rules:
    """What ends a continuation and what bears on its tokens: values alone, so that others compile nothing.

    Attributes:
        limit: The most new tokens.
        ends: Tokens that end it, filled up with -1.
        penalty: What repeated tokens' scores are divided by; None penalises none.
    """

    limit: Int[Array, ""]
    ends: Int[Array, " ends"]
    penalty: Float[Array, ""] | None


def read_prompts(model: Decoder, prompts: Prompts, slots: int, copies: int = 1) -> tuple[Array, Cache]:
    """The logits after each prompt [prompts, vocab], and the cache.

    Args:
        slots: Tokens that a row's cache holds, those of the prompt included.
        copies: Rows of the cache that each prompt fills, one after the other.
    """
    cache = empty_cache(model.config, copies * len(prompts.tokens), slots, model.dtype)
    return adapted(model, "prompt", prompts.served)(prompts.params, prompts.tokens, prompts.real, cache)


def reader(model: Decoder, prompts: Prompts, copies: int = 1) -> Callable[[Array, Cache], tuple[Array, Cache]]:
    """The function that reads one more token a row: (token [rows], cache) -> (logits [rows, vocab], cache)."""
    step = adapted(model, "step", repeated(prompts.served, copies))
    return lambda token, cache: step(prompts.params, token, cache)


def among(token: Int[Array, "*batch"], ends: Int[Array, " ends"]) -> Bool[Array, "*batch"]:
    """Whether each token ends a sequence."""
    return (token[..., None] == ends).any(-1)


def stages(prompt: int, room: int) -> list[int]:
    """Slots of each stage's cache, up to `room`: powers of two, and from 512 on the halves between."""
    sizes, size = [], SMALLEST_STAGE
    while 9 * size < 8 * room:
        if size > prompt:
            sizes.append(size)
        power = 1 << (size.bit_length() - 1)
        size = size * 3 // 2 if size == power >= 512 else 2 * power
    return [*sizes, max(room, SMALLEST_STAGE)]


def to_the_end(state: Any, sizes: Sequence[int], widen: Callable[[Any, int], Any], go_on: Callable[[Any], Any]) -> Any:
    """The state after the last stage that is needed; `state.more` says whether any row goes on.

    Args:
        sizes: From `stages`; the state has the first.
        widen: (state, slots) -> the state with so many slots.
        go_on: (state) -> the state with its slots full, or at its end.
    """
    for place, slots in enumerate(sizes):
        if not bool(state.more):
            break
        state = go_on(widen(state, slots) if place else state)
    return state
