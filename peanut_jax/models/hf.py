"""Load Flax models from Hugging Face checkpoints, refusing what transformers would run wrongly.

transformers 4.56 and 4.57 are the last releases with Flax classes. Several of those ignore fields of the
configuration that the PyTorch class of the same release obeys, and their loader leaves a parameter that the
checkpoint lacks at a random value with a warning. Here both are errors: `hf_faults` lists the fields, and
`hf_params` accounts for every parameter of the model and every tensor of the checkpoint. What is drawn at all, such as
a new head, is drawn as PyTorch's class draws it (`hf_init`), and so is attention dropout (`hf_copies`).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp

from peanut_jax.base.kernels import flatten
from peanut_jax.base.origin import note
from peanut_jax.files.hub import find, read_weights, weight_files, without_config
from peanut_jax.files.untrusted import TEXT, read_json, typed
from peanut_jax.messages import reading, short
from peanut_jax.models import hf_faults
from peanut_jax.models.hf_fields import check_fields, used_by_transformers
from peanut_jax.models.hf_params import read_params

INSTALL = "pip install 'peanut-jax[hf-flax]' (transformers>=4.56,<5)"
TASKS = {
    "base": "FlaxAutoModel",
    "pretraining": "FlaxAutoModelForPreTraining",
    "masked-lm": "FlaxAutoModelForMaskedLM",
    "causal-lm": "FlaxAutoModelForCausalLM",
    "seq2seq-lm": "FlaxAutoModelForSeq2SeqLM",
    "speech-seq2seq": "FlaxAutoModelForSpeechSeq2Seq",
    "next-sentence-prediction": "FlaxAutoModelForNextSentencePrediction",
    "sequence-classification": "FlaxAutoModelForSequenceClassification",
    "token-classification": "FlaxAutoModelForTokenClassification",
    "image-classification": "FlaxAutoModelForImageClassification",
    "question-answering": "FlaxAutoModelForQuestionAnswering",
    "multiple-choice": "FlaxAutoModelForMultipleChoice",
}
# Pretrained checkpoints have no head for the last five: one that is missing as a whole is drawn from the seed.
NEW_HEAD_TASKS = tuple(TASKS)[-5:]
# Not to be overridden; from the last two the configuration has derived other fields by then.
FIXED_FIELDS = {"model_type", "quantization_config", "pruned_heads", "feed_forward_proj", "attention_types"}


def load(
    name_or_path: str | Path,
    task: str = "base",
    *,
    dtype: Any = jnp.float32,
    seed: int = 0,
    new_modules: Sequence[str] = (),
    dropout_masks: str = "torch",
    revision: str | None = None,
    **config_overrides: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load a Flax model and its parameters by hub name or from a folder.

    PyTorch is not needed. Safetensors are read first (one file or shards, saved by PyTorch or by Flax), then
    `flax_model.msgpack`; pickle files never.

    Args:
        name_or_path: A folder with `config.json` and weights, or a hub name, which goes through
            `huggingface_hub` and its cache (`HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` work as usual).
        task: A key of `TASKS`. For those in `NEW_HEAD_TASKS` a head that the checkpoint lacks altogether is drawn
            from `seed` and named in a log warning: from the distribution that PyTorch's class draws it from, kernels
            of most architectures from normal(0, `config.initializer_range`) and biases 0.
        dtype: A floating dtype, of the computation and of every parameter.
        seed: Seeds the parameters that are drawn.
        new_modules: Modules to draw from `seed` whatever the checkpoint holds: names or `/`-joined paths, such
            as `"pooler"`, or `"classifier"` to replace a head of another size.
        dropout_masks: "torch" has attention dropout draw a mask for each row and head, as PyTorch's classes do. "flax"
            has it draw one for all rows and heads of a batch, as transformers' Flax classes do. Outside training
            there is no difference.
        revision: Branch, tag or commit of a hub repository.
        **config_overrides: Fields of the configuration to set, such as `num_labels=3`.

    Returns:
        The `FlaxPreTrainedModel`, built without parameters of its own (`model(..., params=params)`), and the
        parameters as a nested dict of arrays in the layout that this call expects.

    Raises:
        ImportError: no transformers with Flax classes is installed.
        FileNotFoundError: no such folder or repository, or no file in it that can be read.
        ValueError: an argument, the architecture, its configuration or the weights do not fit; the message says
            what to do instead.

    Examples:
        >>> from peanut_jax.models.hf import load
        >>> model, params = load("FacebookAI/roberta-base", "sequence-classification", num_labels=3)
        >>> model(input_ids=jnp.array([[0, 5, 6, 2]]), params=params).logits.shape
        (1, 3)
    """
    transformers = _transformers()
    source, dtype = str(name_or_path), jnp.dtype(dtype)
    _check_arguments(task, dtype, new_modules, dropout_masks)
    config = _config(source, revision, config_overrides)
    model_class = _checked_class(transformers, config, task, dropout_masks)
    files = weight_files(source, revision)
    with used_by_transformers(Path(source)), reading(source):
        model = model_class(config, dtype=dtype, seed=seed, _do_init=False)
    if model.can_generate() and (path := find(source, "generation_config.json", revision)):
        with used_by_transformers(path), reading(path):
            model.generation_config = transformers.GenerationConfig.from_dict(read_json(path))
    new_head = task in NEW_HEAD_TASKS
    params = read_params(model, *read_weights(files), new_modules=new_modules, new_head=new_head, seed=seed)
    note(flatten(params), str(source))
    return model, params


def _check_arguments(task: str, dtype: Any, new_modules: Sequence[str], dropout_masks: str) -> None:
    if task not in tuple(TASKS):
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype such as float32 or bfloat16, got {dtype.name}")
    if isinstance(new_modules, str):
        raise ValueError(f"new_modules must be a sequence of names, got a string; write ({new_modules!r},)")
    if dropout_masks not in hf_faults.DROPOUT_MASKS:
        raise ValueError(f"dropout_masks must be one of {', '.join(hf_faults.DROPOUT_MASKS)}; got {dropout_masks!r}")


def shapes(name_or_path: str | Path, task: str | None = None, *, revision: str | None = None) -> tuple[str, dict]:
    """The model type and the parameters' shapes and dtypes, from `config.json` alone.

    Args:
        task: As for `load`; None takes the one that the checkpoint was saved for, where Flax has it, else "base".

    Returns:
        `config.model_type`, and the parameters as a nested dict of `jax.ShapeDtypeStruct`s.

    Raises:
        As `load`.
    """
    transformers = _transformers()
    config = _config(str(name_or_path), revision, {})
    model_class = _checked_class(transformers, config, task or _own_task(transformers, config))
    with used_by_transformers(Path(name_or_path)), reading(str(name_or_path)):
        return config.model_type, model_class(config, _do_init=False).params_shape_tree


def own_task(name_or_path: str | Path, *, revision: str | None = None) -> str:
    """The task that a checkpoint was saved for, where Flax has it, else "base".

    Raises:
        As `load`.
    """
    return _own_task(_transformers(), _config(str(name_or_path), revision, {}))


def _own_task(transformers: ModuleType, config: Any) -> str:
    own = {f"Flax{name}" for name in config.architectures or ()}
    offers = _offers(transformers)
    return next((t for t, o in offers.items() if type(config) in o and o[type(config)].__name__ in own), "base")


def _offers(transformers: ModuleType) -> dict[str, Any]:
    """Task -> mapping from a config's class to its Flax class."""
    return {name: getattr(transformers, auto)._model_mapping for name, auto in TASKS.items()}


def _transformers() -> ModuleType:
    """The installed transformers, if it is one that has Flax classes."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"loading Hugging Face Flax models needs transformers: {INSTALL}") from error
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if not (4, 56) <= version < (5, 0):
        raise ImportError(
            f"transformers {transformers.__version__} is installed; its Flax classes end before 5 and are known "
            f"here from 4.56 on: {INSTALL}"
        )
    return transformers


def _config(source: str, revision: str | None, overrides: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    path = find(source, "config.json", revision)
    if path is None:
        raise FileNotFoundError(without_config(source))
    raw = read_json(path)
    with reading(path):
        model_type = typed(raw, "model_type", TEXT, "None")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type[:80], list(CONFIG_MAPPING))
        raise ValueError(f"{path}: model_type {short(model_type)} is unknown to transformers; closest: {near}")
    config_class = CONFIG_MAPPING[model_type]
    with used_by_transformers(path), reading(path):
        check_fields(raw, {} if config_class.has_no_defaults_at_init else config_class().to_dict())
        config = config_class.from_dict(raw)
    config.name_or_path = source
    fields = {*config.to_dict(), *config.attribute_map, "num_labels"} - FIXED_FIELDS
    for field, value in overrides.items():
        if field not in fields:
            near = difflib.get_close_matches(field, fields)
            raise ValueError(f"{field!r} is no field of {type(config).__name__} to override; closest: {near}")
        setattr(config, field, value)
    return config


def _checked_class(transformers: ModuleType, config: Any, task: str, dropout_masks: str = "torch") -> Any:
    """The Flax class, with its faults mended.

    Raises:
        ValueError: no such class, or a configuration that it would run wrongly.
    """
    model_class = _model_class(transformers, config, task)
    hf_faults.check(config, task)
    return hf_faults.mended(model_class, dropout_masks)


def _model_class(transformers: ModuleType, config: Any, task: str) -> Any:
    """The Flax class of this architecture for this task."""
    offers = _offers(transformers)
    if type(config) in offers[task]:
        return offers[task][type(config)]
    hf_faults.check(config, task)
    model_type = config.model_type
    if tasks := [name for name, offer in offers.items() if type(config) in offer]:
        raise ValueError(f"{model_type!r} has no Flax class for task {task!r}, only for {', '.join(tasks)}")
    raise ValueError(f"model_type {model_type!r} has no Flax class. {hf_faults.way_out(model_type)}")
