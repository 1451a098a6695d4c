"""Load Flax models from Hugging Face checkpoints, refusing what transformers would run wrongly.

transformers 4.56 and 4.57 are the last releases with Flax classes. Several of those ignore fields of the
configuration that the PyTorch class of the same release obeys, and their loader leaves a parameter that the
checkpoint lacks at a random value with a warning. Here both are errors: `hf_faults` lists the fields, and this
file accounts for every parameter of the model and every tensor of the checkpoint.
"""

import difflib
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from peanut_jax.files.hub import Tensors, find, read_json, read_weights, weight_files
from peanut_jax.models import hf_faults

logger = logging.getLogger(__name__)

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
# Heads beside a base that checkpoints do not keep under a prefix (T5).
HEADS = {"lm_head", "classifier", "qa_outputs", "classification_head"}
# Tensors that a checkpoint's base may have beyond the Flax model's: the function does not depend on them.
BUFFERS = re.compile(
    r"position_ids$|token_type_ids$|inv_freq$|num_batches_tracked$"
    r"|(attn|attention)\.(masked_)?bias$"  # causal masks of old GPT checkpoints
    r"|embed_positions\.weights?$"  # sinusoids, which Flax computes; learned positions have a place
    r"|embeddings\.mask_token$"  # for masked image modelling only
    r"|EncDecAttention\.relative_attention_bias\.weight$"  # of old T5 checkpoints, read by nobody
    r"|(^|\.)pooler\."  # PyTorch's class for such a task has none either
)

Keys = tuple[str, ...]


def load(
    name_or_path: str | Path,
    task: str = "base",
    *,
    dtype: Any = jnp.float32,
    seed: int = 0,
    new_modules: Sequence[str] = (),
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
            from `seed` and named in a log warning.
        dtype: A floating dtype, of the computation and of every parameter.
        seed: Seeds the parameters that are drawn.
        new_modules: Modules to draw from `seed` whatever the checkpoint holds: names or `/`-joined paths, such
            as `"pooler"`, or `"classifier"` to replace a head of another size.
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

    Example:
        model, params = load("FacebookAI/roberta-base", "sequence-classification", num_labels=3)
        logits = model(**batch, params=params).logits
    """
    transformers = _transformers()
    source, dtype = str(name_or_path), jnp.dtype(dtype)
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype such as float32 or bfloat16, got {dtype.name}")
    if isinstance(new_modules, str):
        raise ValueError(f"new_modules must be a sequence of names, got a string; write ({new_modules!r},)")
    config = _config(source, revision, config_overrides)
    model_class = _model_class(transformers, config, task)
    hf_faults.check(config, task)
    files = weight_files(source, revision)
    model = hf_faults.mended(model_class)(config, dtype=dtype, seed=seed, _do_init=False)
    if model.can_generate() and (path := find(source, "generation_config.json", revision)):
        model.generation_config = transformers.GenerationConfig.from_pretrained(path.parent)
    return model, _params(model, *read_weights(files), task, new_modules, seed)


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
    task = task or _own_task(transformers, config)
    model_class = _model_class(transformers, config, task)
    hf_faults.check(config, task)
    return config.model_type, hf_faults.mended(model_class)(config, _do_init=False).params_shape_tree


def own_task(name_or_path: str | Path, *, revision: str | None = None) -> str:
    """The task that a checkpoint was saved for, where Flax has it, else "base".

    Raises:
        As `load`.
    """
    return _own_task(_transformers(), _config(str(name_or_path), revision, {}))


def _own_task(transformers: ModuleType, config: Any) -> str:
    own = {f"Flax{name}" for name in config.architectures or ()}
    offers = {name: getattr(transformers, auto)._model_mapping for name, auto in TASKS.items()}
    return next((t for t, o in offers.items() if type(config) in o and o[type(config)].__name__ in own), "base")


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


# ---- configuration and class


def _config(source: str, revision: str | None, overrides: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    path = find(source, "config.json", revision)
    if path is None:
        what = "has no config.json" if Path(source).is_dir() else "is no folder here and no hub model in reach"
        raise FileNotFoundError(f"{source!r} {what}; give a folder that save_pretrained wrote, or a hub name")
    raw = read_json(path)
    model_type = str(raw.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING))
        raise ValueError(f"{path}: model_type {model_type!r} is unknown to transformers; closest: {near}")
    config = CONFIG_MAPPING[model_type].from_dict(raw)
    config.name_or_path = source
    fields = {*config.to_dict(), *config.attribute_map, "num_labels"} - FIXED_FIELDS
    for field, value in overrides.items():
        if field not in fields:
            near = difflib.get_close_matches(field, fields)
            raise ValueError(f"{field!r} is no field of {type(config).__name__} to override; closest: {near}")
        setattr(config, field, value)
    return config


def _model_class(transformers: ModuleType, config: Any, task: str) -> Any:
    """The Flax class of this architecture for this task."""
    offers = {name: getattr(transformers, auto)._model_mapping for name, auto in TASKS.items()}
    if type(config) in offers[task]:
        return offers[task][type(config)]
    hf_faults.check(config, task)
    model_type = config.model_type
    if tasks := [name for name, offer in offers.items() if type(config) in offer]:
        raise ValueError(f"{model_type!r} has no Flax class for task {task!r}, only for {', '.join(tasks)}")
    raise ValueError(f"model_type {model_type!r} has no Flax class. {hf_faults.way_out(model_type)}")


# ---- parameters


def _params(
    model: Any, tensors: Tensors, is_flax: bool, task: str, new_modules: Iterable[str], seed: int
) -> dict[str, Any]:
    """The whole parameter tree: each leaf from the checkpoint, or drawn because caller or task ask for it."""
    leaves = flatten_dict(model.params_shape_tree)
    # With batch norm the tree holds two collections, and PyTorch's names do not say which one a tensor is for.
    start = 1 if "batch_stats" in model.params_shape_tree else 0
    full = {path[start:]: path for path in leaves}
    shapes = {path[start:]: leaf for path, leaf in leaves.items()}
    paths = {name: tuple(name.split("."))[start if is_flax else 0 :] for name in tensors}
    placed, left_over = _place(tensors, paths, is_flax, shapes, model.base_model_prefix)
    _check_left_over(model, left_over, placed)
    drawn = _within(new_modules, shapes)
    missing = shapes.keys() - placed.keys() - drawn
    if task in NEW_HEAD_TASKS:
        known = {model.base_model_prefix, *(path[0] for path in placed)}
        if head := {path for path in missing if path[0] not in known}:
            logger.warning("%s: the checkpoint has no %s, drawn from seed %d", _name(model), _list(head), seed)
        drawn, missing = drawn | head, missing - head
    _check_complete(model, missing)
    kept = {path: tensor for path, tensor in placed.items() if path not in drawn}
    _check_tensors(model, kept, shapes)
    params = {full[path]: jnp.asarray(tensor, model.dtype) for path, tensor in kept.items()}
    return unflatten_dict(params | _draw(model, {full[path] for path in drawn}, seed))


def _place(
    tensors: Tensors, paths: Mapping[str, Keys], is_flax: bool, shapes: Mapping[Keys, Any], prefix: str
) -> tuple[dict[Keys, np.ndarray], Tensors]:
    """Tensors by the path of the parameter they fill, and those of the base that fill none.

    A checkpoint of a model with a head keeps its base under `prefix` and one of a bare base does not, and the
    same goes for models: hence the two cases in which the prefix comes off or goes on. Other tasks' heads drop out.
    """
    from transformers.modeling_flax_pytorch_utils import rename_key_and_reshape_tensor

    in_model = any(path[0] == prefix for path in shapes)
    in_file = any(path[0] == prefix for path in paths.values())
    placed: dict[Keys, np.ndarray] = {}
    left_over: Tensors = {}
    for name, path in paths.items():
        tensor: Any = tensors[name]
        is_head = path[0] != prefix if in_file else path[0] in HEADS
        if in_file and not in_model and not is_head:
            path = path[1:]
        if not is_flax:
            path, tensor = rename_key_and_reshape_tensor(path, tensor, shapes, prefix)  # type: ignore[arg-type]
        if in_model and not in_file and (prefix, *path) in shapes:
            path = (prefix, *path)
        if path in shapes:
            placed[path] = tensor
        elif not is_head:
            left_over[name] = tensors[name]  # not transposed
    return placed, left_over


def _check_left_over(model: Any, left_over: Tensors, placed: Mapping[Keys, np.ndarray]) -> None:
    """Refuse tensors of the base that the Flax class has no place for: without them it is another function."""
    shared = [tensor for path, tensor in placed.items() if path[-2:] == ("shared", "embedding")]
    names = []
    for name, tensor in left_over.items():
        copy = name.endswith("embed_tokens.weight") and any(np.array_equal(tensor, one) for one in shared)
        if not copy and not BUFFERS.search(name):
            names.append(name)
    if names:
        raise ValueError(
            f"{_name(model)} has no place for {len(names)} tensors of the checkpoint's base, which it then "
            f"computes without: {', '.join(names[:5])}. {hf_faults.way_out(model.config.model_type)}"
        )


def _check_complete(model: Any, missing: Collection[Keys]) -> None:
    if missing:
        modules = sorted({path[-2] if len(path) > 1 else path[-1] for path in missing})[:4]
        raise ValueError(
            f"the checkpoint lacks {len(missing)} parameters of {_name(model)}: {_list(missing)}. Load the task "
            f"that it was saved for, or pass new_modules={tuple(modules)} to draw them from `seed`"
        )


def _check_tensors(model: Any, kept: Mapping[Keys, np.ndarray], shapes: Mapping[Keys, Any]) -> None:
    for path, tensor in kept.items():
        where = "/".join(path)
        if tensor.shape != shapes[path].shape:
            raise ValueError(
                f"{where!r} is {tensor.shape} in the checkpoint (in Flax's layout) and {shapes[path].shape} in "
                f"{_name(model)}. Drop the override that resizes it, or pass new_modules=({path[-2:][0]!r},) to "
                "draw that module from `seed`"
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
            raise ValueError(f"{where!r} is {tensor.dtype}: quantised weights cannot be read; dequantise them")


def _within(modules: Iterable[str], shapes: Mapping[Keys, Any]) -> set[Keys]:
    """Paths inside the named modules, each of which must exist."""
    found = set()
    for module in modules:
        inside = {path for path in shapes if f"/{module}/" in f"/{'/'.join(path)}/"}
        if not inside:
            near = difflib.get_close_matches(module, {key for path in shapes for key in path})
            raise ValueError(f"new_modules: the model has no module {module!r}; closest: {near}")
        found |= inside
    return found


def _draw(model: Any, paths: Collection[Keys], seed: int) -> dict[Keys, jax.Array]:
    """Initial values at `paths`; under jit, so that XLA drops every other parameter's."""

    def draw(key: jax.Array) -> list[jax.Array]:
        fresh = flatten_dict(model.init_weights(key, model.input_shape))
        return [fresh[path].astype(model.dtype) for path in order]

    order = sorted(paths)
    return dict(zip(order, jax.jit(draw)(jax.random.key(seed)), strict=True)) if order else {}


def _name(model: Any) -> str:
    return type(model).__name__


def _list(paths: Collection[Keys]) -> str:
    names = sorted("/".join(path) for path in paths)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
