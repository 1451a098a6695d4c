"""Fields of a config.json, which anyone may have written: their types, and the bounds of their sizes."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from peanut_jax.messages import short

# The largest size that is read, many times that of any published model (in brackets): a mistake or an attack would
# otherwise show as memory or time that never ends.
SIZES: Mapping[str, int] = {
    "vocab_size": 1 << 24,  # 262,208 (Gemma 3)
    "hidden_size": 1 << 17,  # 16,384 (Llama 3.1 405B)
    "intermediate_size": 1 << 20,  # 53,248 (Llama 3.1 405B)
    "num_hidden_layers": 1024,  # 126 (Llama 3.1 405B)
    "num_attention_heads": 4096,  # 128 (Llama 3.1 405B)
    "num_key_value_heads": 4096,
    "head_dim": 8192,  # 256 (Gemma)
    "max_position_embeddings": 1 << 30,  # 10,485,760 (Llama 4); positions are int32
    "original_max_position_embeddings": 1 << 30,
    "sliding_window": 1 << 30,  # distances between positions are int32
    "max_window_layers": 1 << 30,  # compared with a layer's number, and no size of anything
    "unroll": 1024,
}


def size(name: str, value: Any, minimum: int = 1) -> int:
    """An integer between `minimum` and `SIZES[name]`.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {short(value)}")
    if value > SIZES[name]:
        raise ValueError(f"{name} must be at most {SIZES[name]}, got {short(value)}")
    return value


def number(name: str, value: Any, allowed: str, low: float, high: float) -> float:
    """A number between `low` and `high`, both included, as a float.

    Args:
        allowed: The range in words, for the error: "above 0".

    Raises:
        ValueError: anything else.
    """
    try:
        as_float = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:  # an integer of JSON may be as large as it likes
        as_float = math.inf
    if not low <= as_float <= high:
        raise ValueError(f"{name} must be a number {allowed}, got {short(value)}")
    return as_float


def flag(name: str, value: Any) -> bool:
    """true or false.

    Raises:
        ValueError: anything else, numbers included.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {short(value)}")
    return value
