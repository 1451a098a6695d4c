"""Generation with the decoder: greedy, sampling and beam search over a key/value cache, in compiled loops.

Prompts are padded on the left to a power of two, the batch is filled up, and how tokens are chosen is values: what is
alike in size shares what was compiled. Adapters work unmerged: one for all rows, or one for each row.
"""

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from peanut_jax.messages import short
from peanut_jax.methods.fields import is_int
from peanut_jax.models.beam import beam_search, continuations
from peanut_jax.models.config_fields import number
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.decoder_config import DecoderConfig
from peanut_jax.models.decoding import Prompts, Rules, stages
from peanut_jax.models.generation_config import Sampling, checked_penalty
from peanut_jax.models.sampling import draw_of, sample
from peanut_jax.models.serving import Factors, serve
from peanut_jax.models.sizes import power_of_two
from peanut_jax.models.token_ids import check_inside, id_list

logger = logging.getLogger(__name__)

SMALLEST_BUCKET = 16
# Each beam takes a row of the cache; published searches have up to some hundred.
MOST_BEAMS = 1024


def generate(
    model: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: int | Sequence[int] | None = None,
    factors: Factors | Sequence[Factors] | None = None,
    adapter_ids: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    key: PRNGKeyArray | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    repetition_penalty: float | None = None,
) -> list[list[int]]:
    """Continues each prompt, until an end-of-sequence token or `max_new_tokens`.

    Args:
        model: From `load_decoder`.
        params: From `load_decoder`; `pj.merge(params, ...)` for merged weights, `pj.with_saved(params, adapters)` for
            an adapter that has saved modules.
        prompts: Token ids, of any lengths.
        max_new_tokens: The most to append.
        eos_token_ids: Tokens that end a continuation, which includes its end. None takes those of the checkpoint's
            generation_config.json (`model.config.generation.eos_token_ids`); `()` lets no token end it.
        factors: What `pj.factors` or `pj.compute_updates` gives for an adapter, which is then applied unmerged; or a
            list of that for several adapters.
        adapter_ids: With several adapters: the number of each prompt's.
        sampling: None is greedy, whatever generation_config.json says; `model.config.generation.sampling` draws as it
            says, and is None where it says nothing.
        key: For sampling.
        num_beams: More than 1 searches with beams, as transformers does with early_stopping=False.
        length_penalty: A finished beam's score is its log-probability / length ** length_penalty.
        repetition_penalty: Above 1 makes tokens less likely that stand in the prompt or the continuation: their scores
            are divided by it, or multiplied where negative. None takes the checkpoint's
            (`model.config.generation.repetition_penalty`), as transformers does; 1 penalises none.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: an empty prompt, a token that the model does not have, more tokens than its context holds, a beam
            search in which every token is an end, arguments that contradict each other.

    Examples:
        >>> from peanut_jax.models.generate import generate
        >>> from peanut_jax.models.loading import load_decoder
        >>> model, params = load_decoder("meta-llama/Llama-3.2-1B")
        >>> answers = generate(model, params, [[1, 5, 9], [1, 7]], max_new_tokens=8)
        >>> [len(answer) for answer in answers]
        [8, 8]
    """
    config = model.config
    rows = _prompt_rows(config, prompts, max_new_tokens)
    eos = _ends(config, eos_token_ids)
    _check_beams(config, num_beams, length_penalty, len(eos))
    _note_ignored(config.generation.ignored)
    if not isinstance(sampling, Sampling | None):
        raise ValueError(f"sampling must be a Sampling or None, got {short(sampling)}")
    if sampling is not None and (key is None or num_beams > 1):
        raise ValueError("sampling needs a key, and does not go with num_beams")
    penalty = _repetition_penalty(config, repetition_penalty)
    batch, new = batch_bucket(len(rows)), bucket(int(max_new_tokens))
    served = serve(factors, adapter_ids, len(rows), batch, model.dtype)
    tokens, real = left_padded([*rows, *[np.zeros(1, np.int32)] * (batch - len(rows))])
    prompts_in = Prompts(params, tokens, real, jnp.arange(batch) < len(rows), served)
    rules = Rules(jnp.int32(max_new_tokens), _filled_up(eos), None if penalty == 1 else jnp.float32(penalty))
    sizes = stages(tokens.shape[1], tokens.shape[1] + new)
    if num_beams > 1:
        long = float(length_penalty)
        out, lengths = beam_search(model, prompts_in, rules, sizes, num_beams=num_beams, length_penalty=long)
    else:
        draw = None if sampling is None or key is None else draw_of(sampling, key, config.vocab_size)
        out, lengths = sample(model, prompts_in, rules, draw, sizes)
    both = zip(np.asarray(out).tolist(), np.asarray(lengths).tolist(), strict=True)
    return [row[:length] for row, length in both][: len(rows)]


def bucket(length: int) -> int:
    """The length that arrays are made for: the next power of two."""
    return max(SMALLEST_BUCKET, power_of_two(length))


def batch_bucket(rows: int) -> int:
    """The rows that a batch is filled up to: the next power of two, and above 16 the half between two as well."""
    power = power_of_two(rows)
    return power * 3 // 4 if power > 16 and rows <= power * 3 // 4 else power


def left_padded(
    prompts: Sequence[Sequence[int] | np.ndarray],
) -> tuple[Int[Array, "batch prompt"], Bool[Array, "batch prompt"]]:
    """The prompts in one array, padded on the left, and where they are not padding."""
    length = bucket(max(map(len, prompts)))
    tokens, real = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :], real[row, length - len(prompt) :] = prompt, True
    return jnp.asarray(tokens), jnp.asarray(real)


def _prompt_rows(config: DecoderConfig, prompts: Any, max_new_tokens: int) -> list[np.ndarray]:
    """The prompts, checked: ids of the vocabulary that leave room for the new tokens."""
    _check_count("max_new_tokens", max_new_tokens)
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__") or getattr(prompts, "ndim", 2) == 0:
        raise ValueError(f"prompts must be lists of token ids, got {short(prompts)}")
    if not len(prompts):
        raise ValueError("prompts is empty: give one or more lists of token ids")
    rows = [id_list(f"prompt {row}", prompt) for row, prompt in enumerate(prompts)]
    for row, ids in enumerate(rows):
        if not ids.size:
            raise ValueError(f"prompt {row} is empty: a model continues at least one token, such as its bos_token_id")
        if len(ids) + max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompt {row} has {len(ids)} tokens, and with max_new_tokens={max_new_tokens} exceeds the model's "
                f"context of {config.max_position_embeddings}"
            )
        check_inside(f"prompt {row} holds", ids, config.vocab_size)
    return rows


def _ends(config: DecoderConfig, eos_token_ids: Any) -> tuple[int, ...]:
    """The tokens that end a continuation, each once."""
    if eos_token_ids is None:
        return config.generation.eos_token_ids
    alone = is_int(eos_token_ids) or getattr(eos_token_ids, "ndim", None) == 0
    ids = id_list("eos_token_ids", [eos_token_ids] if alone else eos_token_ids)
    check_inside("eos_token_ids hold", ids, config.vocab_size)
    return tuple(dict.fromkeys(ids.tolist()))


def _filled_up(eos: tuple[int, ...]) -> Int[Array, " ends"]:
    """The ends, with -1 up to a power of two."""
    return jnp.array([*eos, *[-1] * (power_of_two(len(eos)) - len(eos))], jnp.int32)


def _repetition_penalty(config: DecoderConfig, given: float | None) -> float:
    if given is None:
        return config.generation.repetition_penalty
    return checked_penalty(given)


def _check_beams(config: DecoderConfig, num_beams: int, length_penalty: float, ends: int) -> None:
    _check_count("num_beams", num_beams)
    if num_beams > MOST_BEAMS:
        raise ValueError(f"num_beams must be at most {MOST_BEAMS}, got {short(num_beams)}")
    number("length_penalty", length_penalty, "that is finite", -sys.float_info.max, sys.float_info.max)
    kept = continuations(ends)
    if num_beams > 1 and kept > config.vocab_size:
        raise ValueError(
            f"num_beams={num_beams} keeps {kept} continuations of each beam, so that one goes on beside the {ends} "
            f"eos_token_ids, and the vocabulary has {config.vocab_size}: leave some ends out, or search without beams"
        )


def _check_count(name: str, value: Any) -> None:
    if not is_int(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {short(value)}")


@functools.cache
def _note_ignored(ignored: tuple[str, ...]) -> None:
    """Logs once what the checkpoint's generation_config.json asks for and is not done."""
    if ignored:
        logger.warning("generation_config.json asks for what generate does not do: %s", "; ".join(ignored))
