"""Generation with the decoder: greedy, sampling and beam search over a key/value cache, each one compiled loop.

Prompts are padded on the left to a power of two, and the cache has room for a power of two of new tokens, so that
prompts of like lengths share one compiled function. Adapters work unmerged: one for all rows, or one for each row.

References:
    transformers 4.57, `generation/utils.py` (`_sample`, `_beam_search`) and `generation/logits_process.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from peanut_jax.frontends.linen import bind
from peanut_jax.models.decoder import Cache, Decoder, empty_cache
from peanut_jax.updates import Updates

SMALLEST_BUCKET = 16
# Stands for minus infinity among sums of log-probabilities.
_NEVER = -1.0e9

Step = Callable[[Array, Array, Cache], tuple[Array, Cache]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the filters apply in this order.

    Args:
        temperature: Divides the logits.
        top_k: Keeps the k largest; None keeps all.
        top_p: Keeps the fewest of the largest whose probabilities reach p; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}; without sampling it is greedy")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1 or None, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")


@flax.struct.dataclass
class _Prompts:
    """What greedy, sampling and beam search all start from.

    Attributes:
        params: The model's variables.
        tokens, real: Prompts padded on the left, and where they are not padding.
        factors: Of one adapter for all rows.
        rows: Each row's own pairs, from `_by_row`.
        limit: New tokens at most.
    """

    params: PyTree
    tokens: Int[Array, "batch prompt"]
    real: Bool[Array, "batch prompt"]
    factors: Updates | None
    rows: PyTree | None
    limit: Int[Array, ""]


def generate(
    model: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: int | Sequence[int] | None = (),
    factors: Updates | Sequence[Updates] | None = None,
    adapter_ids: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    key: PRNGKeyArray | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Continues each prompt, until an end-of-sequence token or `max_new_tokens`.

    Args:
        model: From `load_decoder`.
        params: From `load_decoder`; `pj.merge(params, ...)` for merged weights, `pj.with_saved(params, adapters)` for
            an adapter that has saved modules.
        prompts: Token ids, of any lengths.
        max_new_tokens: The most to append.
        eos_token_ids: Ends a continuation, which includes it.
        factors: Of an adapter, from `pj.factors`, which is then applied unmerged; or those of several adapters.
        adapter_ids: With several: the number of each prompt's adapter.
        sampling: None is greedy.
        key: For sampling.
        num_beams: More than 1 searches with beams, as transformers does with early_stopping=False.
        length_penalty: A finished beam's score is its log-probability / length ** length_penalty.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: an empty prompt, a token that the model does not have, more tokens than its context holds, arguments
            that contradict each other.

    Example:
        answers = generate(model, params, [tokenizer(text)["input_ids"]], max_new_tokens=32, num_beams=4)
    """
    eos = () if eos_token_ids is None else tuple(int(token) for token in np.ravel(np.asarray(eos_token_ids, np.int64)))
    _check(model, prompts, max_new_tokens, sampling, key, num_beams)
    several = factors is not None and not isinstance(factors, dict)
    if several != (adapter_ids is not None):
        raise ValueError("adapter_ids goes with a list of several adapters' factors, and says which each prompt takes")
    rows = None
    if adapter_ids is not None:
        rows, factors = _by_row(factors, adapter_ids, len(prompts), num_beams), None  # type: ignore[arg-type]
    tokens, real = _left_padded(prompts)
    room = tokens.shape[1] + bucket(max_new_tokens)
    start = _Prompts(params, tokens, real, factors, rows, jnp.int32(max_new_tokens))  # type: ignore[arg-type]
    if num_beams > 1:
        run = _beam_search
        options: dict[str, Any] = {"num_beams": num_beams, "length_penalty": float(length_penalty)}
    else:
        run = _sample
        options = {"sampling": sampling, "key": jax.random.key(0) if key is None else key}
    out, lengths = run(model, start, room=room, eos=eos, **options)
    return [row[:length] for row, length in zip(np.asarray(out).tolist(), np.asarray(lengths).tolist(), strict=True)]


def bucket(length: int) -> int:
    """The length that arrays are made for: the next power of two."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None,
    key: PRNGKeyArray | None,
    num_beams: int,
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if not len(prompts):
        raise ValueError("prompts is empty: give one or more lists of token ids")
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if np.ndim(prompt) != 1 or (len(prompt) and np.asarray(prompt).dtype.kind not in "iu"):
            raise ValueError(f"prompt {row} must be a list of token ids, got {prompt!r}")
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: a model continues at least one token, such as its bos_token_id")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, and with max_new_tokens={max_new_tokens} exceeds the model's "
                f"context of {context}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(
                f"prompt {row} holds token {max(prompt) if min(prompt) >= 0 else min(prompt)}, outside the model's "
                f"vocabulary of {vocab}; is the tokenizer this model's?"
            )
    if sampling is not None and (key is None or num_beams > 1):
        raise ValueError("sampling needs a key, and does not go with num_beams")


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    length = bucket(max(map(len, prompts)))
    tokens, real = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :], real[row, length - len(prompt) :] = prompt, True
    return tokens, real


def _by_row(factors: Sequence[Updates], adapter_ids: Sequence[int], count: int, num_beams: int) -> PyTree:
    """Each row's own pairs, on a leading axis. Adapters of other targets or ranks are filled up with zeros."""
    if len(adapter_ids) != count or not all(0 <= one < len(factors) for one in adapter_ids):
        raise ValueError(f"adapter_ids must be {count} numbers below {len(factors)}, got {list(adapter_ids)}")
    if not any(factors):
        raise ValueError("factors holds no adapted kernel")
    shapes: dict[str, tuple[Array, Array]] = {path: pair for tree in factors for path, pair in tree.items()}
    rank = max(pair[0].shape[-1] for tree in factors for pair in tree.values())

    def padded(tree: Updates, path: str, side: int) -> Array:
        like = shapes[path][side]
        axis = -1 if side == 0 else -2
        if path not in tree:
            shape = list(like.shape)
            shape[axis] = rank
            return jnp.zeros(shape, like.dtype)
        array = tree[path][side]
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, rank - array.shape[axis])
        return jnp.pad(array, widths)

    ids = jnp.repeat(jnp.asarray(adapter_ids), num_beams)
    return {
        path: tuple(jnp.stack([padded(tree, path, side) for tree in factors])[ids] for side in (0, 1))
        for path in shapes
    }


def _step_of(model: Decoder, prompts: _Prompts) -> Step:
    """(tokens [B, S], real [B, S], cache) -> (logits [B, vocab], cache) of the plain or the adapted model."""

    def plain(params: PyTree, tokens: Array, real: Array, cache: Cache) -> tuple[Array, Cache]:
        return model.apply(params, tokens, real, cache, method="step")  # type: ignore[return-value]

    params, rows = prompts.params, prompts.rows
    if rows is None:
        return partial(plain if prompts.factors is None else bind(plain, prompts.factors), params)

    def one_row(pairs: Updates, tokens: Array, real: Array, cache: Cache) -> tuple[Array, Cache]:
        alone = _row_cache(cache, jnp.expand_dims)
        logits, alone = bind(plain, pairs)(params, tokens[None], real[None], alone)
        return logits[0], _row_cache(alone, jnp.squeeze)

    layer = 1 if model.config.scan_layers else 0
    axes = Cache(keys=layer, values=layer, positions=0, filled=None)  # type: ignore[arg-type]
    batched = jax.vmap(one_row, in_axes=(0, 0, 0, axes), out_axes=(0, axes))
    return lambda tokens, real, cache: batched(rows, tokens, real, cache)


def _row_cache(cache: Cache, change: Callable[[Array, int], Array]) -> Cache:
    """`change(array, its batch axis)` of every array that has one."""

    def layers(arrays: PyTree) -> PyTree:
        if isinstance(arrays, tuple):
            return tuple(change(array, 0) for array in arrays)
        return change(arrays, 1)

    return cache.replace(  # type: ignore[attr-defined]
        keys=layers(cache.keys), values=layers(cache.values), positions=change(cache.positions, 0)
    )


@partial(jax.jit, static_argnames=("model", "room", "eos", "sampling"))
def _sample(
    model: Decoder,
    prompts: _Prompts,
    *,
    room: int,
    eos: tuple[int, ...],
    sampling: Sampling | None,
    key: PRNGKeyArray,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """Greedy or sampled continuations, and their lengths."""
    (batch, prompt), limit = prompts.tokens.shape, prompts.limit
    step = _step_of(model, prompts)
    logits, cache = step(prompts.tokens, prompts.real, empty_cache(model.config, batch, room, model.dtype))

    def choose(logits: Array, i: Array) -> Array:
        if sampling is None:
            return logits.argmax(-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, i), filtered(logits, sampling)).astype(jnp.int32)

    def more(state: tuple) -> Array:
        i, _, _, done, *_ = state
        return (i < limit) & ~done.all()

    def body(state: tuple) -> tuple:
        i, out, lengths, done, logits, cache = state
        token = choose(logits, i)
        out = out.at[:, i].set(token)
        lengths = lengths + ~done
        done = done | _among(token, eos)
        # The last token's successors are not asked for.
        logits, cache = lax.cond(
            i + 1 < limit,
            lambda: step(token[:, None], jnp.ones((batch, 1), bool), cache),
            lambda: (logits, cache),
        )
        return i + 1, out, lengths, done, logits, cache

    new = room - prompt
    start = (
        jnp.int32(0), jnp.zeros((batch, new), jnp.int32), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), logits,
        cache,
    )  # fmt: skip
    _, out, lengths, *_ = lax.while_loop(more, body, start)
    return out, lengths


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


@partial(jax.jit, static_argnames=("model", "room", "eos", "num_beams", "length_penalty"))
def _beam_search(
    model: Decoder,
    prompts: _Prompts,
    *,
    room: int,
    eos: tuple[int, ...],
    num_beams: int,
    length_penalty: float,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """The best finished beam of each row, and its length.

    Each step keeps the best 2K (or (1 + eos tokens) K) continuations, so that K unfinished ones are among them; those
    of the best K that end compete with the finished ones by score. A row stops once no open beam can beat its worst
    finished one at the present length.
    """
    (batch, prompt), limit = prompts.tokens.shape, prompts.limit
    k, new = num_beams, room - prompt
    keep = max(2, 1 + len(eos)) * k
    step = _step_of(model, prompts)
    # With adapters by row, a row's beams stand together, as in the flattened batch below.
    first = jnp.repeat(prompts.tokens, k, axis=0), jnp.repeat(prompts.real, k, axis=0)
    logits, cache = step(*first, empty_cache(model.config, batch * k, room, model.dtype))

    class_of = jnp.arange(batch)[:, None]
    start = {
        "i": jnp.int32(0),
        "logits": logits,
        "cache": cache,
        "open": jnp.zeros((batch, k, new), jnp.int32),
        "open_scores": jnp.full((batch, k), _NEVER).at[:, 0].set(0.0),
        "best": jnp.zeros((batch, k, new), jnp.int32),
        "best_scores": jnp.full((batch, k), _NEVER),
        "best_lengths": jnp.zeros((batch, k), jnp.int32),
        "finished": jnp.zeros((batch, k), bool),
        "improvable": jnp.ones((batch, 1), bool),
        "all_ended": jnp.zeros((), bool),
    }

    def more(state: dict) -> Array:
        return state["improvable"].any() & ~state["all_ended"]

    def body(state: dict) -> dict:
        i = state["i"]
        scores = jax.nn.log_softmax(state["logits"]).reshape(batch, k, -1) + state["open_scores"][..., None]
        vocab = scores.shape[-1]
        top, where = lax.top_k(scores.reshape(batch, k * vocab), keep)
        parent, token = where // vocab, (where % vocab).astype(jnp.int32)
        grown = state["open"][class_of, parent].at[:, :, i].set(token)
        ends = _among(token, eos) | (i + 1 >= limit)

        open_scores, chosen = lax.top_k(top + ends * _NEVER, k)
        opened, parents = grown[class_of, chosen], parent[class_of, chosen]

        final = top / (i + 1).astype(jnp.float32) ** length_penalty
        final = final + ~state["improvable"] * _NEVER
        now = ends & (jnp.arange(keep) < k)
        final = final + ~now * _NEVER
        merged_scores = jnp.concatenate([state["best_scores"], final], axis=1)
        best_scores, kept = lax.top_k(merged_scores, k)

        def merged(name: str, value: Array) -> Array:
            return jnp.concatenate([state[name], value], axis=1)[class_of, kept]

        finished = merged("finished", now)
        worst = jnp.where(finished, best_scores.min(-1, keepdims=True), _NEVER)
        possible = open_scores[:, :1] / (i + 1).astype(jnp.float32) ** length_penalty
        flat = (class_of * k + parents).reshape(-1)
        cache = state["cache"]
        cache = _row_cache(cache, lambda x, axis: jnp.take(x, flat, axis=axis))
        next_tokens = opened[:, :, i].reshape(-1, 1)
        logits, cache = lax.cond(
            i + 1 < limit,
            lambda: step(next_tokens, jnp.ones((batch * k, 1), bool), cache),
            lambda: (state["logits"], cache),
        )
        return {
            "i": i + 1,
            "logits": logits,
            "cache": cache,
            "open": opened,
            "open_scores": open_scores,
            "best": merged("best", grown),
            "best_scores": best_scores,
            "best_lengths": merged("best_lengths", jnp.full((batch, keep), i + 1)),
            "finished": finished,
            "improvable": state["improvable"] & (possible > worst).any(-1, keepdims=True),
            "all_ended": ends.all(),
        }

    end = lax.while_loop(more, body, start)
    return end["best"][:, 0], end["best_lengths"][:, 0]


def _among(token: Int[Array, "*batch"], eos: tuple[int, ...]) -> Bool[Array, "*batch"]:
    return jnp.isin(token, jnp.array(eos, jnp.int32)) if eos else jnp.zeros(token.shape, bool)
