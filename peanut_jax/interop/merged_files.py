"""What stands beside merged weights: the other files of a checkpoint, its index, and the config of a new head."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peanut_jax.files.hub import INDEX_FILE, NOT_FETCHED, read_index
from peanut_jax.files.torch_checkpoint import MERGED_FILE, Checkpoint
from peanut_jax.files.untrusted import OBJECT, TEXTS, read_json, typed
from peanut_jax.interop.peft_folder import ModuleAdapters, label_count
from peanut_jax.messages import reading

logger = logging.getLogger(__name__)

# HF PEFT's task -> how transformers' class for it is called, after the name of the architecture.
_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def check_others(checkpoint: Checkpoint) -> None:
    """Refuses links among the files to copy that lead out of the checkpoint: whoever gets the result gets what they
    point to. Files in the hub's cache are links to the repository's own blobs, and weights may lie anywhere: they are
    read as weights.

    Raises:
        ValueError: a link that leads elsewhere, to a folder or nowhere; something that is neither a file nor a folder.
    """
    folder = checkpoint.folder.resolve()
    blobs = folder.parent.parent / "blobs"
    for entry in _others(checkpoint):
        for path in (entry, *(entry.rglob("*") if entry.is_dir() and not entry.is_symlink() else ())):
            if path.is_symlink():
                target = path.resolve().parents if path.is_file() else []
                if folder not in target and blobs not in target:
                    raise ValueError(
                        f"{path} is a link to {os.readlink(path)}, which is not a file of this checkpoint, and the "
                        "result would hold a copy of it: replace the link by the file, or remove it"
                    )
            elif not path.is_file() and not path.is_dir():
                raise ValueError(f"{path} is neither a file nor a folder; remove it")


def copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Everything beside the weights: configuration, tokenizer, index, folders. No other copy of the old weights."""
    for entry in _others(checkpoint):
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name)
        else:
            shutil.copyfile(entry, folder / entry.name)


def _others(checkpoint: Checkpoint) -> list[Path]:
    shards = {file.name for file in checkpoint.headers}
    stale = shutil.ignore_patterns(
        *(pattern.partition("/")[0] for pattern in NOT_FETCHED), "openvino", ".cache", ".git"
    )

    def is_copied(entry: Path) -> bool:
        weights = entry.suffix == ".safetensors" or stale(str(checkpoint.folder), [entry.name])
        return entry.name not in shards and not weights and entry.name != MERGED_FILE

    return [entry for entry in sorted(checkpoint.folder.iterdir()) if is_copied(entry)]


def write_index(folder: Path, checkpoint: Checkpoint, rename: Mapping[str, str], added: Mapping[str, Any]) -> None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return
    index = read_index(path)
    index["weight_map"] = {rename.get(name, name): file for name, file in index["weight_map"].items()}
    index["weight_map"] |= dict.fromkeys(added, list(checkpoint.headers)[-1].name)
    if (index.get("metadata") or {}).get("total_size") is not None:
        index["metadata"]["total_size"] += sum(array.nbytes for array in added.values())
    path.write_text(json.dumps(index, indent=2) + "\n")


def write_config(
    folder: Path, final: Path, adapters: Iterable[ModuleAdapters], added: Mapping[str, np.ndarray]
) -> None:
    """The class that has the added head and the number of its labels; transformers makes a head of these."""
    task_type = next((adapter.config.task_type for adapter in adapters if added.keys() & adapter.saved), None)
    path = folder / "config.json"
    content = read_json(path)
    with reading(path):
        architectures = typed(content, "architectures", TEXTS, [])
        names = typed(content, "id2label", OBJECT, {})
    own = re.match(r"(\w+?)(For[A-Z]\w+|LMHeadModel|Model)$", architectures[0] if architectures else "")
    if own is None or task_type not in _CLASSES:
        logger.warning(
            "%s: the head (%s) is added, but config.json stays as it is: its architectures=%s and task_type=%r name no "
            "class for it",
            final, ", ".join(added), architectures, task_type,
        )  # fmt: skip
        return
    content["architectures"] = [own[1] + _CLASSES[task_type]]
    labels = label_count(added)
    if labels is not None and len(names) != labels:
        content["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        content["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    path.write_text(json.dumps(content, indent=2) + "\n")
