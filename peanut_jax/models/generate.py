"""Generation with the decoder: greedy, sampling and beam search over a key/value cache, each one compiled loop.

Prompts are padded on the left to a power of two, and the cache has room for a power of two of new tokens, so that
prompts of like lengths share one compiled function. Adapters work unmerged: one for all rows, or one for each row.
"""

from collections.abc import Sequence
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from peanut_jax.models.beam import beam_search
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.decoder_config import DecoderConfig
from peanut_jax.models.decoding import Prompts
from peanut_jax.models.sampling import Sampling, sample
from peanut_jax.models.serving import Factors, serve

SMALLEST_BUCKET = 16


def generate(
    model: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: int | Sequence[int] | None = (),
    factors: Factors | Sequence[Factors] | None = None,
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
        factors: What `pj.factors` or `pj.compute_updates` gives for an adapter, which is then applied unmerged; or a
            list of that for several adapters.
        adapter_ids: With several adapters: the number of each prompt's.
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
    _check(model.config, prompts, max_new_tokens, num_beams)
    if sampling is not None and (key is None or num_beams > 1):
        raise ValueError("sampling needs a key, and does not go with num_beams")
    served = serve(factors, adapter_ids, len(prompts), num_beams)
    tokens, real = left_padded(prompts)
    room = tokens.shape[1] + bucket(max_new_tokens)
    start = Prompts(params, tokens, real, served, jnp.int32(max_new_tokens))
    if num_beams > 1:
        penalty = float(length_penalty)
        out, lengths = beam_search(model, start, room=room, eos=eos, num_beams=num_beams, length_penalty=penalty)
    else:
        key = jax.random.key(0) if key is None else key
        out, lengths = sample(model, start, room=room, eos=eos, sampling=sampling, key=key)
    return [row[:length] for row, length in zip(np.asarray(out).tolist(), np.asarray(lengths).tolist(), strict=True)]


def bucket(length: int) -> int:
    """The length that arrays are made for: the next power of two."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def left_padded(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int[Array, "batch prompt"], Bool[Array, "batch prompt"]]:
    """The prompts in one array, padded on the left, and where they are not padding."""
    length = bucket(max(map(len, prompts)))
    tokens, real = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :], real[row, length - len(prompt) :] = prompt, True
    return jnp.asarray(tokens), jnp.asarray(real)


def _check(config: DecoderConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_beams: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if not len(prompts):
        raise ValueError("prompts is empty: give one or more lists of token ids")
    for row, prompt in enumerate(prompts):
        _check_prompt(config, row, prompt, max_new_tokens)


def _check_prompt(config: DecoderConfig, row: int, prompt: Sequence[int], max_new_tokens: int) -> None:
    context, vocab = config.max_position_embeddings, config.vocab_size
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
