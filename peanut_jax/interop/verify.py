"""Whether two roads give the same model: logits of a base with an adapter beside those of what was exported from it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peanut_jax.adapters import merge
from peanut_jax.interop.peft import load_adapter
from peanut_jax.interop.peft_files import CONFIG_FILE, label_count, read
from peanut_jax.models import hf
from peanut_jax.models.hf_files import local_folder

# HF PEFT's task -> ours.
_TASKS = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest absolute difference of two models' logits, the largest logit, and their shape."""

    largest: float
    scale: float
    shape: tuple[int, ...]

    @property
    def relative(self) -> float:
        return self.largest / self.scale if self.scale else self.largest


def compare(base: str | Path, other: str | Path, adapter: str | Path, *, seed: int = 0) -> Difference:
    """Runs `base` with `adapter`, and `other`, on the same random input, in float32.

    Args:
        base: The checkpoint that the adapter was trained on.
        other: A merged checkpoint, or an adapter of `base` such as a LoRA that was exported.
        adapter: What `save_adapter` or HF PEFT wrote.
        seed: Of the input, and of a head that neither checkpoint nor adapter holds.

    Raises:
        FileNotFoundError, ValueError: as `models.hf.load` and `load_adapter`.
    """
    folder = local_folder(str(other))
    is_adapter = (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()
    loaded = read(adapter)
    task = _TASKS.get(loaded.config.task_type or "") or hf.own_task(str(base) if is_adapter else str(folder))
    labels = label_count(loaded.saved)
    overrides: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    model, params = hf.load(base, task, seed=seed, **overrides)
    adapters, config = load_adapter(adapter, params)
    want = _logits(model, merge(params, adapters, config), seed)
    if is_adapter:
        adapters, config = load_adapter(folder, params)
        got = _logits(model, merge(params, adapters, config), seed)
    else:
        model, params = hf.load(folder, task, seed=seed, **overrides)
        got = _logits(model, params, seed)
    if got.shape != want.shape:
        raise ValueError(f"{base} gives logits of shape {want.shape} and {other} {got.shape}; these are two models")
    return Difference(float(np.abs(got - want).max()), float(np.abs(want).max()), want.shape)


def _logits(model: Any, params: Mapping[str, Any], seed: int) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        outputs = model(**_inputs(model, seed), params=params)
    # A question answerer has start and end logits; a base has none, and its first output is its last hidden state.
    found = [outputs[name] for name in outputs if name.endswith("logits")] or [outputs[0]]
    return np.concatenate([np.asarray(one, np.float32) for one in found], axis=-1)


def _inputs(model: Any, seed: int) -> dict[str, np.ndarray]:
    """A batch of two: random tokens, or random pixels of the model's size."""
    rng, config = np.random.default_rng(seed), model.config
    if model.main_input_name == "pixel_values":
        _, height, width, channels = model.input_shape
        return {"pixel_values": rng.normal(size=(2, channels, height, width)).astype(np.float32)}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"verify runs models of text and of images; {type(model).__name__} takes {model.main_input_name}"
        )
    positions = getattr(config, "max_position_embeddings", None) or 16
    ids = rng.integers(3, config.vocab_size, (2, min(16, positions - 4)))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, ::-1]} if config.is_encoder_decoder else {})
