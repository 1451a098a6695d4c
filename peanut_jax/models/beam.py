"""Beam search, as transformers does it with early_stopping=False.

Each step keeps the best 2K (or (1 + eos tokens) K) continuations of the K open beams, so that K unfinished ones are
among them; those of the best K that end compete with the finished ones by score. A row stops once no open beam can
beat its worst finished one at the present length.

References:
    transformers 4.57, `generation/utils.py` (`_beam_search`).
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from peanut_jax.models.cache import Cache, change_rows
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.decoding import Prompts, among, read_prompts, read_token

# Stands for minus infinity among sums of log-probabilities.
_NEVER = -1.0e9


@flax.struct.dataclass
class _Open:
    """The beams that may go on, the best first; their scores are log-probabilities."""

    tokens: Int[Array, "batch beams new"]
    scores: Float[Array, "batch beams"]


@flax.struct.dataclass
class _Grown:
    """Continuations of the open beams by one token, the best first.

    Attributes:
        tokens, scores: As for `_Open`.
        parents: The open beam that each continues.
        ends: Whether its last token ends it.
    """

    tokens: Int[Array, "batch kept new"]
    scores: Float[Array, "batch kept"]
    parents: Int[Array, "batch kept"]
    ends: Bool[Array, "batch kept"]


@flax.struct.dataclass
class _Finished:
    """The best beams that have ended, the best first.

    Attributes:
        scores: log-probability / length ** length_penalty.
        lengths: Number of tokens, the end included.
        real: False for a place that no beam has taken yet.
    """

    tokens: Int[Array, "batch beams new"]
    scores: Float[Array, "batch beams"]
    lengths: Int[Array, "batch beams"]
    real: Bool[Array, "batch beams"]


@flax.struct.dataclass
class _State:
    """Between two tokens.

    Attributes:
        length: Number of tokens of each open beam.
        logits, cache: A row for each open beam; those of a prompt stand together.
        improvable: Rows whose open beams may still beat a finished one.
        all_ended: Whether every continuation of the last step ended.
    """

    length: Int[Array, ""]
    logits: Float[Array, "rows vocab"]
    cache: Cache
    open: _Open
    finished: _Finished
    improvable: Bool[Array, "batch 1"]
    all_ended: Bool[Array, ""]


@partial(jax.jit, static_argnames=("model", "room", "eos", "num_beams", "length_penalty"))
def beam_search(
    model: Decoder,
    prompts: Prompts,
    *,
    room: int,
    eos: tuple[int, ...],
    num_beams: int,
    length_penalty: float,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """The best finished beam of each row, and its length.

    Args:
        room: Tokens that a row's cache holds, those of the prompt included.
        eos: Tokens that end a continuation.
        length_penalty: A finished beam's score is its log-probability / length ** length_penalty.
    """
    batch, prompt = prompts.tokens.shape
    step, logits, cache = read_prompts(model, prompts, room, num_beams)

    def more(state: _State) -> Array:
        return state.improvable.any() & ~state.all_ended

    def body(state: _State) -> _State:
        length = state.length + 1
        penalty = length.astype(jnp.float32) ** length_penalty
        grown = _grow(state, eos, prompts.limit)
        opened, parents = _still_open(grown, num_beams)
        finished = _finish(state.finished, grown, state.improvable, length, penalty)
        cache = _reorder(state.cache, parents)
        token = opened.tokens[:, :, state.length].reshape(-1)
        logits, cache = read_token(step, token, state.logits, cache, wanted=length < prompts.limit)
        improvable = state.improvable & _improvable(opened, finished, penalty)
        return _State(length, logits, cache, opened, finished, improvable, grown.ends.all())

    end = lax.while_loop(more, body, _start(logits, cache, batch, num_beams, room - prompt))
    return end.finished.tokens[:, 0], end.finished.lengths[:, 0]


def continuations(ends: int) -> int:
    """How many continuations each step keeps for a beam, with so many ends: no more than the vocabulary has."""
    return max(2, 1 + ends)


def _start(logits: Float[Array, "rows vocab"], cache: Cache, batch: int, beams: int, new: int) -> _State:
    """One open beam a prompt, the others impossible, and none finished."""
    tokens, never = jnp.zeros((batch, beams, new), jnp.int32), jnp.full((batch, beams), _NEVER)
    return _State(
        length=jnp.int32(0),
        logits=logits,
        cache=cache,
        open=_Open(tokens, never.at[:, 0].set(0.0)),
        finished=_Finished(tokens, never, jnp.zeros((batch, beams), jnp.int32), jnp.zeros((batch, beams), bool)),
        improvable=jnp.ones((batch, 1), bool),
        all_ended=jnp.zeros((), bool),
    )


def _grow(state: _State, eos: tuple[int, ...], limit: Int[Array, ""]) -> _Grown:
    """The best continuations of the open beams: at least as many that go on as there are beams."""
    batch, beams = state.open.scores.shape
    scores = jax.nn.log_softmax(state.logits).reshape(batch, beams, -1) + state.open.scores[..., None]
    vocab = scores.shape[-1]
    top, where = lax.top_k(scores.reshape(batch, beams * vocab), continuations(len(eos)) * beams)
    parents, token = where // vocab, (where % vocab).astype(jnp.int32)
    tokens = _pick(state.open.tokens, parents).at[:, :, state.length].set(token)
    return _Grown(tokens, top, parents, ends=among(token, eos) | (state.length + 1 >= limit))


def _still_open(grown: _Grown, beams: int) -> tuple[_Open, Int[Array, "batch beams"]]:
    """The best continuations that have not ended, and the beam that each continues."""
    scores, chosen = lax.top_k(grown.scores + grown.ends * _NEVER, beams)
    return _Open(_pick(grown.tokens, chosen), scores), _pick(grown.parents, chosen)


def _finish(
    finished: _Finished,
    grown: _Grown,
    improvable: Bool[Array, "batch 1"],
    length: Int[Array, ""],
    penalty: Float[Array, ""],
) -> _Finished:
    """The best of the finished beams and of those continuations that end, in rows that are still `improvable`."""
    beams, kept = finished.scores.shape[1], grown.scores.shape[1]
    now = grown.ends & (jnp.arange(kept) < beams)
    scores = grown.scores / penalty + ~improvable * _NEVER + ~now * _NEVER
    new = _Finished(grown.tokens, scores, jnp.full(scores.shape, length), now)
    both = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), finished, new)
    _, best = lax.top_k(both.scores, beams)
    return jax.tree.map(lambda array: _pick(array, best), both)


def _improvable(opened: _Open, finished: _Finished, penalty: Float[Array, ""]) -> Bool[Array, "batch 1"]:
    """Whether a row's best open beam would beat its worst finished one, if it ended now."""
    worst = jnp.where(finished.real, finished.scores.min(-1, keepdims=True), _NEVER)
    return (opened.scores[:, :1] / penalty > worst).any(-1, keepdims=True)


def _reorder(cache: Cache, parents: Int[Array, "batch beams"]) -> Cache:
    """The cache with each open beam's parent's row in its own place."""
    batch, beams = parents.shape
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    return change_rows(cache, lambda array, axis: jnp.take(array, rows, axis=axis))


def _pick(array: Array, places: Int[Array, "batch picked"]) -> Array:
    """`array[row, places[row]]` for every row."""
    return array[jnp.arange(len(places))[:, None], places]
