"""Whether two roads give the same model: logits of a base with an adapter beside those of what was exported from it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from peanut_jax.adapters import merge
from peanut_jax.files.hub import local_folder
from peanut_jax.files.safetensors import read_header
from peanut_jax.interop.peft import load_adapter
from peanut_jax.interop.peft_folder import CONFIG_FILE, DTYPE_KEY, label_count, read
from peanut_jax.models import decoder_config, hf
from peanut_jax.models.loading import load_decoder

Run = Callable[[PyTree], np.ndarray]

# Safetensors' dtypes that round more than float32 -> ours.
_CODES = {"F16": "float16", "BF16": "bfloat16"}

# HF PEFT's task -> ours.
_TASKS = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
}


# Dtype -> the largest relative difference of the logits that its rounding explains, coarsest last. Sums of float32
# differ in their order alone; bfloat16 keeps 8 bits of a kernel or a factor, and float16 11, three more.
TOLERANCES = {"float32": 1e-4, "float16": 0.0025, "bfloat16": 0.02}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart.

    Attributes:
        largest: The largest absolute difference; NaN where either has one.
        scale: The largest logit of the base with the adapter.
        shape: Of the logits.
        broken: Which of the two has logits that are not finite: "BASE with the adapter", "OTHER".
        dtype: The coarsest dtype in which OTHER was computed or is stored.
    """

    largest: float
    scale: float
    shape: tuple[int, ...]
    broken: tuple[str, ...] = ()
    dtype: str = "float32"

    @property
    def relative(self) -> float:
        return self.largest / self.scale if self.scale else self.largest

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding explains."""
        return TOLERANCES[self.dtype]

    def within(self, tolerance: float) -> bool:
        """Whether the relative difference is at most `tolerance`; never where a logit is not finite."""
        return not self.broken and self.relative <= tolerance


def compare(base: str | Path, other: str | Path, adapter: str | Path, *, seed: int = 0) -> Difference:
    """Runs `base` with `adapter`, and `other`, on the same random input, in float32.

    Args:
        base: The checkpoint that the adapter was trained on.
        other: A merged checkpoint, or an adapter of `base` such as a LoRA that was exported.
        adapter: What `save_adapter` or HF PEFT wrote.
        seed: Seeds the input, and a head that neither checkpoint nor adapter holds.

    Raises:
        FileNotFoundError, ValueError: as `models.hf.load` and `load_adapter`; logits of different shapes.
    """
    folder = local_folder(str(other))
    is_adapter = (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()
    saved = read(adapter)
    task = _TASKS.get(saved.config.task_type or "")
    labels = label_count(saved.saved)
    load = partial(_load, task=task, labels=labels, seed=seed)
    run, params = load(str(base), like=str(base) if is_adapter else str(folder))
    want = run(_adapted(adapter, params))
    if is_adapter:
        got = run(_adapted(folder, params))
    else:
        run, params = load(str(folder), like=str(folder))
        got = run(params)
    if got.shape != want.shape:
        raise ValueError(
            f"{base} gives logits of shape {want.shape} and {other} {got.shape}: these are two different models; give "
            "what was exported from this base"
        )
    sides = (("BASE with the adapter", want), ("OTHER", got))
    return Difference(
        float(np.abs(got - want).max()),
        float(np.abs(want).max()),
        want.shape,
        tuple(name for name, logits in sides if not np.isfinite(logits).all()),
        _coarsest(saved.base_dtype, folder),
    )


def _coarsest(base_dtype: str | None, folder: Path) -> str:
    """The coarsest dtype of the kernels from which an update was computed, and of the weights in `folder`."""
    found = {base_dtype}
    for file in folder.glob("*.safetensors"):
        header = read_header(file)
        found |= {_CODES.get(entry.dtype) for entry in header.entries.values()} | {header.metadata.get(DTYPE_KEY)}
    return [dtype for dtype in TOLERANCES if dtype in found or dtype == "float32"][-1]


def _adapted(adapter: str | Path, params: PyTree) -> PyTree:
    adapters, config = load_adapter(adapter, params)
    return merge(params, adapters, config)


def _load(source: str, like: str, task: str | None, labels: int | None, seed: int) -> tuple[Run, PyTree]:
    """params -> logits on the random input, and the params; with the decoder where it runs the model, else with
    transformers' Flax class for `task` (default: what `like` was saved for)."""
    if task in (None, "causal-lm") and decoder_config.runs(source):
        decoder, params = load_decoder(source, "float32")
        inputs = _tokens(decoder.config.vocab_size, decoder.config.max_position_embeddings, seed)
        return lambda params: _run(lambda: {"logits": decoder.apply(params, inputs)}), params
    overrides: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    model, params = hf.load(source, task or hf.own_task(like), seed=seed, **overrides)
    return lambda params: _run(lambda: model(**_inputs(model, seed), params=params)), params


def _run(forward: Callable[[], Any]) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        outputs = forward()
    # A question answerer has start and end logits; a base has none, and its first output is its last hidden state.
    found = [outputs[name] for name in outputs if name.endswith("logits")] or [outputs[0]]
    return np.concatenate([np.asarray(one, np.float32) for one in found], axis=-1)


def _tokens(vocab: int, positions: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(min(3, vocab - 1), vocab, (2, min(16, positions)))


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
    positions = getattr(config, "max_position_embeddings", None) or 20
    ids = _tokens(config.vocab_size, positions - 4, seed)  # RoBERTa's positions begin after its padding's
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, ::-1]} if config.is_encoder_decoder else {})
