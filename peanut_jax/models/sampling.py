"""Greedy and sampled continuations.

References:
    transformers 4.57, `generation/utils.py` (`_sample`) and `generation/logits_process.py`.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from peanut_jax.models.cache import Cache, widened, wider
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.decoding import Prompts, Rules, among, read_prompts, reader, to_the_end
from peanut_jax.models.generation_config import Sampling
from peanut_jax.models.repetition import Said, penalised, said_in, said_too


@flax.struct.dataclass
class Draw:
    """How tokens are drawn, as values; see `Sampling`.

    Attributes:
        top_k: At least the vocabulary's size keeps all.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    key: PRNGKeyArray


@flax.struct.dataclass
class _State:
    """Between two tokens.

    Attributes:
        length: New tokens so far.
        tokens: The new tokens, then zeros.
        lengths: Number of new tokens of each row, its end included.
        done: Rows that have ended.
        more: Whether any row goes on.
        said: Tokens that are penalised.
        cache: After all tokens but the last.
    """

    length: Int[Array, ""]
    tokens: Int[Array, "rows new"]
    lengths: Int[Array, " rows"]
    done: Bool[Array, " rows"]
    more: Bool[Array, ""]
    said: Said
    cache: Cache


def draw_of(sampling: Sampling, key: PRNGKeyArray, vocab: int) -> Draw:
    """The values of a `Sampling`."""
    top_k = vocab if sampling.top_k is None else min(sampling.top_k, vocab)
    return Draw(jnp.float32(sampling.temperature), jnp.int32(top_k), jnp.float32(sampling.top_p), key)


def sample(
    model: Decoder, prompts: Prompts, rules: Rules, draw: Draw | None, sizes: list[int]
) -> tuple[Int[Array, "rows new"], Int[Array, " rows"]]:
    """Greedy or sampled continuations, and their lengths.

    Args:
        draw: None is greedy.
        sizes: From `decoding.stages`.
    """
    state = _start(model, prompts, rules, draw, slots=sizes[0])
    state = to_the_end(state, sizes, _widened, lambda state: _go_on(model, prompts, rules, draw, state))
    return state.tokens, state.lengths


@partial(jax.jit, static_argnames=("model", "slots"))
def _start(model: Decoder, prompts: Prompts, rules: Rules, draw: Draw | None, *, slots: int) -> _State:
    """After the prompts and the first token."""
    rows, prompt = prompts.tokens.shape
    logits, cache = read_prompts(model, prompts, slots)
    said = None if rules.penalty is None else said_in(prompts.tokens, prompts.real, logits.shape[-1])
    tokens, lengths = jnp.zeros((rows, slots - prompt), jnp.int32), jnp.zeros(rows, jnp.int32)
    state = _State(jnp.int32(0), tokens, lengths, ~prompts.wanted, jnp.bool_(True), said, cache)
    return _appended(state, logits, cache, rules, draw)


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def _go_on(model: Decoder, prompts: Prompts, rules: Rules, draw: Draw | None, state: _State) -> _State:
    """Token by token, until no row goes on or there is no place left."""
    read = reader(model, prompts)

    def body(state: _State) -> _State:
        token = lax.dynamic_index_in_dim(state.tokens, state.length - 1, axis=1, keepdims=False)
        return _appended(state, *read(token, state.cache), rules, draw)

    return lax.while_loop(lambda state: state.more & (state.length < state.tokens.shape[1]), body, state)


def _appended(state: _State, logits: Array, cache: Cache, rules: Rules, draw: Draw | None) -> _State:
    """With one more token a row."""
    token = choose(penalised(logits, state.said, rules.penalty), draw, state.length)
    done, length = state.done | among(token, rules.ends), state.length + 1
    return _State(
        length=length,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.length)),
        lengths=state.lengths + ~state.done,
        done=done,
        more=(length < rules.limit) & ~done.all(),
        said=said_too(state.said, token),
        cache=cache,
    )


def _widened(state: _State, slots: int) -> _State:
    new = slots - state.cache.positions.shape[1] + state.tokens.shape[1]
    return state.replace(tokens=wider(state.tokens, new, 1), cache=widened(state.cache, slots))  # type: ignore[attr-defined]


def choose(logits: Float[Array, "rows vocab"], draw: Draw | None, length: Int[Array, ""]) -> Int[Array, " rows"]:
    """The next token of each row: the likeliest, or one that is drawn."""
    if draw is None:
        return _likeliest(logits)
    key = jax.random.fold_in(draw.key, length)
    return jax.random.categorical(key, filtered(logits, draw.temperature, draw.top_k, draw.top_p)).astype(jnp.int32)


def _likeliest(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """The first of the largest, or of a row that is not a number token 0: on CPU in a third of argmax's time."""
    vocab = logits.shape[-1]
    found = jnp.where(logits == logits.max(-1, keepdims=True), jnp.arange(vocab, dtype=jnp.int32), vocab).min(-1)
    return jnp.where(found < vocab, found, 0)


def filtered(
    logits: Float[Array, "rows vocab"],
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Float[Array, "rows vocab"]:
    """Logits after temperature, top-k and top-p; tokens that are left out are at minus infinity."""
    logits = logits / temperature
    asked = (top_k < logits.shape[-1]) | (jnp.asarray(top_p) < 1)
    return lax.cond(asked, _filtered, lambda logits, top_k, top_p: logits, logits, top_k, top_p)


def _filtered(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Without a sort, which of a large vocabulary takes longer than the model."""
    order = _order(logits)
    kept = order >= _least(order, jnp.ones_like(logits, jnp.int32), top_k)
    chances = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf))
    kept &= order >= _least(order, chances, jnp.where(top_p < 1, top_p, jnp.inf))
    return jnp.where(kept, logits, -jnp.inf)


def _order(x: Float[Array, "rows vocab"]) -> UInt32[Array, "rows vocab"]:
    """Integers in the same order."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _least(order: UInt32[Array, "rows vocab"], weights: Array, target: Array) -> UInt32[Array, "rows 1"]:
    """The largest number such that the weights of those not below it reach the target; 0 where all of them do not."""

    def bit(i: Array, found: Array) -> Array:
        higher = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.where(order >= higher, weights, 0).sum(-1, keepdims=True) >= target
        return jnp.where(reached, higher, found)

    return lax.fori_loop(0, 32, bit, jnp.zeros_like(order[:, :1]))
