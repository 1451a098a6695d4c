"""Token ids as a caller gives them, checked on the host: an id outside the vocabulary has no embedding."""

from typing import Any

import jax
import numpy as np

from peanut_jax.messages import short


def id_list(name: str, value: Any) -> np.ndarray:
    """A list of token ids, or an array of one axis, as integers.

    Raises:
        ValueError: anything else, such as floats, bools or a string.
    """
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of different lengths
        ids = np.asarray(None)
    flags = isinstance(value, (list, tuple)) and any(isinstance(one, (bool, np.bool_)) for one in value)
    if ids.ndim != 1 or flags or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a list of token ids, got {short(value)}")
    return ids if ids.size else ids.astype(np.int32)


def check_inside(name: str, ids: np.ndarray, vocab_size: int) -> None:
    """Refuses integers that are not ids of the vocabulary.

    Args:
        name: What holds them, and the verb: "tokens hold".

    Raises:
        ValueError: one that is negative or too large.
    """
    if ids.size and not 0 <= (least := ids.min()) <= (most := ids.max()) < vocab_size:
        raise ValueError(
            f"{name} token {least if least < 0 else most}, outside the model's vocabulary of {vocab_size}; is the "
            "tokenizer this model's?"
        )


def check_known(name: str, ids: Any, vocab_size: int, *padding: Any) -> None:
    """As `check_inside`, for arrays of a batch whose values are known: not under `jax.jit` or another transformation.

    Args:
        name: What holds the ids.
        ids: Token ids, one axis or more.
        padding: Arrays of the same shape, 0 where a token is padding, which may have any id; None for no padding.

    Raises:
        ValueError: `ids` is not an array of integers (traced ones too), or one of them is outside the vocabulary.
    """
    if not hasattr(ids, "dtype") or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} must be an array of integers, got {short(getattr(ids, 'dtype', ids))}")
    known = [array for array in (ids, *padding) if array is not None]
    if not all(map(_is_known, known)):
        return
    real = np.ones(ids.shape, bool)
    for array in known[1:]:
        real &= np.asarray(array) != 0
    check_inside(f"{name} hold", np.asarray(ids)[real], vocab_size)


def _is_known(array: Any) -> bool:
    """Whether this process can read the array's values."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable
