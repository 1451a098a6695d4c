"""What stands beside merged weights: the other files of a checkpoint, its index, and the config of a new head."""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peanut_jax.files.hub import INDEX_FILE, NOT_FETCHED, read_index, read_json
from peanut_jax.files.torch_checkpoint import MERGED_FILE, Checkpoint
from peanut_jax.interop.peft_folder import ModuleAdapters, label_count

logger = logging.getLogger(__name__)

# HF PEFT's task -> how transformers' class for it is called, after the name of the architecture.
_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Everything beside the weights: configuration, tokenizer, index, folders. No other copy of the old weights."""
    shards = {file.name for file in checkpoint.headers}
    stale = shutil.ignore_patterns(
        *(pattern.partition("/")[0] for pattern in NOT_FETCHED), "openvino", ".cache", ".git"
    )
    for entry in checkpoint.folder.iterdir():
        weights = entry.suffix == ".safetensors" or stale(str(checkpoint.folder), [entry.name])
        if entry.name in shards or weights or entry.name == MERGED_FILE:
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name)
        else:
            shutil.copyfile(entry, folder / entry.name)


def write_index(folder: Path, checkpoint: Checkpoint, rename: Mapping[str, str], added: Mapping[str, Any]) -> None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return
    index = read_index(path)
    index["weight_map"] = {rename.get(name, name): file for name, file in index["weight_map"].items()}
    index["weight_map"] |= dict.fromkeys(added, list(checkpoint.headers)[-1].name)
    if "total_size" in (index.get("metadata") or {}):
        index["metadata"]["total_size"] += sum(array.nbytes for array in added.values())
    path.write_text(json.dumps(index, indent=2) + "\n")


def write_config(
    folder: Path, final: Path, adapters: Iterable[ModuleAdapters], added: Mapping[str, np.ndarray]
) -> None:
    """The class that has the added head and the number of its labels; transformers makes a head of these."""
    task_type = next((adapter.config.task_type for adapter in adapters if added.keys() & adapter.saved), None)
    path = folder / "config.json"
    content = read_json(path)
    own = re.match(r"(\w+?)(For[A-Z]\w+|LMHeadModel|Model)$", str((content.get("architectures") or [""])[0]))
    if own is None or task_type not in _CLASSES:
        logger.warning(
            "%s: the head (%s) is added, but config.json stays as it is: its architectures=%s and task_type=%r name no "
            "class for it",
            final, ", ".join(added), content.get("architectures"), task_type,
        )  # fmt: skip
        return
    content["architectures"] = [own[1] + _CLASSES[task_type]]
    labels = label_count(added)
    if labels is not None and len(content.get("id2label") or {}) != labels:
        content["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        content["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    path.write_text(json.dumps(content, indent=2) + "\n")
