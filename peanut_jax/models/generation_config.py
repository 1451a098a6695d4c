"""How a checkpoint is meant to generate: `generation_config.json`, or what an older `config.json` says in its place.

References:
    transformers 4.57, `generation/configuration_utils.py` (`GenerationConfig`) and `generation/utils.py`
    (`_get_logits_processor`).
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peanut_jax.files.untrusted import read_json
from peanut_jax.messages import reading, short
from peanut_jax.models.config_fields import flag, number

GENERATION_FILE = "generation_config.json"

# The most end-of-sequence tokens that a file may list; published ones have up to 5.
_MOST_ENDS = 1024
_LARGEST, _SMALLEST = sys.float_info.max, sys.float_info.min
# Fields that change what transformers generates and that `generate` does not follow -> the values with which they
# change nothing. Those of lengths are not here, for `generate` takes its own; nor those of encoders, of assistants, of
# speed and of the output's form.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "length_penalty": (1, None),
    "early_stopping": (False, None),
    "penalty_alpha": (0, None),
    "dola_layers": (None,),
    "no_repeat_ngram_size": (0, None),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "max_time": (None,),
    "stop_strings": (None,),
    "bad_words_ids": (None,),
    "force_words_ids": (None,),
    "constraints": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (1, None),
    "token_healing": (False, None),
    "watermarking_config": (None,),
}
# The same for fields that change sampling alone.
_NEUTRAL_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "min_p": (0, None),
    "typical_p": (1, None),
    "epsilon_cutoff": (0, None),
    "eta_cutoff": (0, None),
}


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
            object.__setattr__(self, name, _real(name, getattr(self, name)))
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}; without sampling it is greedy")
        top_k = self.top_k
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1 or None, got {short(top_k)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How a checkpoint is meant to generate.

    Attributes:
        eos_token_ids: Tokens that end a continuation; `generate` takes them unless it is given others.
        sampling: How the checkpoint's authors draw tokens, None for greedy: for `generate(sampling=...)`, which is
            greedy unless it is asked.
        repetition_penalty: Of tokens that have come before, above 1; `generate` takes it unless it is given another.
        ignored: What else the file asks for and `generate` does not do, as `name=value`; it logs a warning.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: Sampling | None = None
    repetition_penalty: float = 1.0
    ignored: tuple[str, ...] = ()


def generation_of(folder: Path, vocab_size: int) -> Generation | None:
    """What the folder's generation_config.json says; None where there is none.

    Raises:
        ValueError: a file that is not valid JSON, or with a field that cannot be.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        return None
    with reading(path):
        return read_generation(read_json(path), vocab_size)


def read_generation(fields: Mapping[str, Any], vocab_size: int) -> Generation:
    """What the fields of a generation_config.json mean.

    Fields that are left out have transformers' defaults; null switches a filter off. An end-of-sequence token outside
    the vocabulary never comes, and is among those ignored.

    Raises:
        ValueError: a field of another type, or out of its range.
    """
    ends = _ends(fields.get("eos_token_id"))
    sampling, penalty = _sampling(fields), fields.get("repetition_penalty")
    neutral = {**_NEUTRAL, **(_NEUTRAL_SAMPLING if sampling else {})}
    ignored = [
        f"{name}={short(fields[name])}" for name, values in neutral.items() if fields.get(name) not in (None, *values)
    ]
    outside = [end for end in ends if not 0 <= end < vocab_size]
    if outside:
        ignored.append(f"eos_token_id={short(outside)}, outside the vocabulary of {vocab_size}")
    return Generation(
        eos_token_ids=tuple(end for end in dict.fromkeys(ends) if end not in outside),
        sampling=sampling,
        repetition_penalty=1.0 if penalty is None else checked_penalty(penalty),
        ignored=tuple(ignored),
    )


def checked_penalty(value: Any) -> float:
    """A repetition penalty.

    Raises:
        ValueError: not a number above 0.
    """
    return number("repetition_penalty", value, "above 0", _SMALLEST, _LARGEST)


def _ends(value: Any) -> list[int]:
    ends = [] if value is None else value if isinstance(value, list) else [value]
    if len(ends) > _MOST_ENDS or any(not isinstance(end, int) or isinstance(end, bool) for end in ends):
        raise ValueError(f"eos_token_id must be an integer or a list of up to {_MOST_ENDS}, got {short(value)}")
    return ends


def _sampling(fields: Mapping[str, Any]) -> Sampling | None:
    """How tokens are drawn, None where do_sample is not true; every field is typed all the same."""
    given = {name: fields.get(name, default) for name, default in (("temperature", 1.0), ("top_p", 1.0))}
    numbers = {name: 1.0 if value is None else _real(name, value) for name, value in given.items()}
    top_k = fields.get("top_k", 50)
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0):
        raise ValueError(f"top_k must be an integer of at least 0 or null, got {short(top_k)}")
    draws = fields.get("do_sample")
    return Sampling(**numbers, top_k=top_k or None) if draws is not None and flag("do_sample", draws) else None


def _real(name: str, value: Any) -> float:
    return number(name, value, "that is finite", -_LARGEST, _LARGEST)
