"""Beam search, as transformers does it with early_stopping=False.

Each step keeps the best 2K (or (1 + eos tokens) K) continuations of the K open beams, so that K unfinished ones are
among them; those of the best K that end compete with the finished ones by score. A row stops once no open beam can
beat its worst finished one at the present length.

References:
    transformers 4.57, `generation/utils.py` (`_beam_search`).
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from peanut_jax.models.cache import Cache, reordered, widened, wider
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.decoding import Prompts, Rules, among, read_prompts, reader, to_the_end
from peanut_jax.models.repetition import Said, penalised, said_in, said_too

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
        cache: After all tokens but the last, a row for each open beam; those of a prompt stand together.
        said: Tokens of each such row that are penalised.
        improvable: Rows whose open beams may still beat a finished one.
        more: Whether any row goes on.
    """

    length: Int[Array, ""]
    cache: Cache
    said: Said
    open: _Open
    finished: _Finished
    improvable: Bool[Array, "batch 1"]
    more: Bool[Array, ""]


def beam_search(
    model: Decoder, prompts: Prompts, rules: Rules, sizes: list[int], *, num_beams: int, length_penalty: float
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """The best finished beam of each row, and its length.

    Args:
        sizes: From `decoding.stages`.
        length_penalty: A finished beam's score is its log-probability / length ** length_penalty.
    """
    long = jnp.float32(length_penalty)
    state = _start(model, prompts, rules, long, slots=sizes[0], num_beams=num_beams)
    state = to_the_end(state, sizes, _widened, lambda state: _go_on(model, prompts, rules, long, state))
    return state.finished.tokens[:, 0], state.finished.lengths[:, 0]


@partial(jax.jit, static_argnames=("model", "slots", "num_beams"))
def _start(
    model: Decoder, prompts: Prompts, rules: Rules, length_penalty: Array, *, slots: int, num_beams: int
) -> _State:
    """After the prompts and the first token: of one open beam a prompt, the others impossible, and none finished."""
    batch, prompt = prompts.tokens.shape
    logits, cache = read_prompts(model, prompts, slots, num_beams)
    tokens, never = jnp.zeros((batch, num_beams, slots - prompt), jnp.int32), jnp.full((batch, num_beams), _NEVER)
    said = None if rules.penalty is None else said_in(prompts.tokens, prompts.real, logits.shape[-1])
    logits, said = jax.tree.map(lambda array: jnp.repeat(array, num_beams, axis=0), (logits, said))
    state = _State(
        length=jnp.int32(0),
        cache=cache,
        said=said,
        open=_Open(tokens, never.at[:, 0].set(0.0)),
        finished=_Finished(tokens, never, jnp.zeros(never.shape, jnp.int32), jnp.zeros(never.shape, bool)),
        improvable=prompts.wanted[:, None],
        more=jnp.bool_(True),
    )
    return _appended(state, logits, prompts.wanted, rules, length_penalty)[0]


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def _go_on(model: Decoder, prompts: Prompts, rules: Rules, length_penalty: Array, state: _State) -> _State:
    """Token by token, until no row goes on or there is no place left."""
    _, beams, new = state.open.tokens.shape
    read = reader(model, prompts, beams)

    def body(state: _State) -> _State:
        token = lax.dynamic_index_in_dim(state.open.tokens, state.length - 1, axis=2, keepdims=False)
        logits, cache = read(token.reshape(-1), state.cache)
        state, rows = _appended(state, logits, prompts.wanted, rules, length_penalty)
        return state.replace(cache=reordered(cache, rows, prompts.tokens.shape[1]))  # type: ignore[attr-defined]

    return lax.while_loop(lambda state: state.more & (state.length < new), body, state)


def _appended(
    state: _State, logits: Array, wanted: Bool[Array, " batch"], rules: Rules, length_penalty: Array
) -> tuple[_State, Int[Array, " rows"]]:
    """With one more token a beam, and the row of the cache that each open beam now continues."""
    batch, beams = state.open.scores.shape
    length = state.length + 1
    long = length.astype(jnp.float32) ** length_penalty
    grown = _grow(state, logits, rules)
    opened, parents = _still_open(grown, beams)
    finished = _finish(state.finished, grown, state.improvable, length, long)
    improvable = state.improvable & _improvable(opened, finished, long)
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    token = lax.dynamic_index_in_dim(opened.tokens, state.length, axis=2, keepdims=False)
    said = None if state.said is None else said_too(state.said[rows], token.reshape(-1))
    more = improvable.any() & ~(grown.ends | ~wanted[:, None]).all()
    return _State(length, state.cache, said, opened, finished, improvable, more), rows


def _widened(state: _State, slots: int) -> _State:
    new = slots - state.cache.positions.shape[1] + state.open.tokens.shape[2]
    parts: tuple[Any, ...] = (state.open, state.finished)
    opened, finished = (part.replace(tokens=wider(part.tokens, new, 2)) for part in parts)
    return state.replace(open=opened, finished=finished, cache=widened(state.cache, slots))  # type: ignore[attr-defined]


def continuations(ends: int) -> int:
    """How many continuations each step keeps for a beam, with so many ends: no more than the vocabulary has."""
    return max(2, 1 + ends)


def _grow(state: _State, logits: Float[Array, "rows vocab"], rules: Rules) -> _Grown:
    """The best continuations of the open beams: at least as many that go on as there are beams."""
    batch, beams = state.open.scores.shape
    scores = penalised(jax.nn.log_softmax(logits), state.said, rules.penalty)
    scores = scores.reshape(batch, beams, -1) + state.open.scores[..., None]
    vocab = scores.shape[-1]
    kept = min(continuations(len(rules.ends)), vocab) * beams
    top, where = lax.top_k(scores.reshape(batch, beams * vocab), kept)
    parents, token = where // vocab, (where % vocab).astype(jnp.int32)
    tokens = lax.dynamic_update_slice(_pick(state.open.tokens, parents), token[..., None], (0, 0, state.length))
    return _Grown(tokens, top, parents, ends=among(token, rules.ends) | (state.length + 1 >= rules.limit))


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


def _pick(array: Array, places: Int[Array, "batch picked"]) -> Array:
    """`array[row, places[row]]` for every row."""
    return array[jnp.arange(len(places))[:, None], places]
