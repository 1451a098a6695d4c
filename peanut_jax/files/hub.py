"""The files of a Hugging Face checkpoint, in a folder or the hub's cache: safetensors or msgpack, whole or in shards.

Pickle files are never read.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

from peanut_jax.files.safetensors import open_safetensors

WEIGHTS = ("model.safetensors", "flax_model.msgpack")
INDEX_FILE = "model.safetensors.index.json"
# Files of a hub repository that hold the same weights for others to read.
NOT_FETCHED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "onnx/*")
Tensors = dict[str, np.ndarray]


def find(source: str, filename: str, revision: str | None) -> Path | None:
    """A file of the folder or of the hub repository; None where it has no such file."""
    if Path(source).is_dir():
        path = Path(source, filename)
        return path if path.is_file() else None
    _refuse_path(source)
    from transformers.utils import cached_file

    try:
        found = cached_file(source, filename, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:  # ValueError: not a name that the hub could have
        raise FileNotFoundError(_not_found(source, error)) from error
    return Path(found) if found else None


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder, or the hub repository's files in the cache, without pickles and other frameworks' weights.

    Raises:
        FileNotFoundError: it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    _refuse_path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, ignore_patterns=list(NOT_FETCHED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(_not_found(source, error)) from error


def _refuse_path(source: str) -> None:
    """Refuses what can only be meant as a path: there is no folder of that name.

    Raises:
        FileNotFoundError: a file; a name that no hub repository has, such as "./x", "/x", "x/" or "x/y/z".
    """
    if Path(source).exists():
        raise FileNotFoundError(f"{source!r} is a file; give the folder that holds it")
    if source.startswith("~"):
        raise FileNotFoundError(f"{source!r} does not exist; write the whole path, as ~ is the shell's to fill in")
    if source.startswith((".", os.sep)) or source.endswith(os.sep) or len(Path(source).parts) > 2:
        raise FileNotFoundError(f"{source!r} does not exist; give the path of a folder that does")


def _not_found(source: str, error: Exception) -> str:
    """What is said of a name that is not a folder and that the hub did not give."""
    reason = " ".join(str(error).split())
    if "Repo id" in reason:  # how the hub calls a name that it could not have
        return f"{source!r} does not exist here, and cannot be a hub name; give a folder that does, or a hub name"
    reason = reason if len(reason) <= 200 else reason[:199] + "\N{HORIZONTAL ELLIPSIS}"
    return f"{source!r} is not a folder here, and the hub did not give it. Check the path, or the hub name: {reason}"


def without_config(source: str) -> str:
    """What is said of a source that has no config.json, so that it is not a model's."""
    folder = Path(source)
    if not folder.is_dir():
        return (
            f"{source!r} is not a folder here, and no hub model of that name is in reach; check the path, or the hub "
            "name and the connection"
        )
    if (folder / "adapter_config.json").is_file():
        return f"{source!r} holds an adapter, and a model is needed here: give the base that the adapter was trained on"
    names = _names(folder)
    return (
        f"{source!r} has no config.json; give a folder that save_pretrained wrote, or a hub name. This one "
        f"{'holds ' + names if names else 'is empty'}"
    )


def _names(folder: Path) -> str:
    """The first files of a folder, for an error; an empty string where there are none."""
    names = sorted(file.name for file in folder.iterdir())
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(name if len(name) <= 40 else f"{name[:39]}\N{HORIZONTAL ELLIPSIS}" for name in names[:4]) + more


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def weight_files(source: str, revision: str | None) -> list[Path]:
    """The file or the shards to read."""
    for filename in WEIGHTS:
        if path := find(source, filename, revision):
            return [path]
        if index := find(source, f"{filename}.index.json", revision):
            return _shards(source, index, revision)
    folder = Path(source)
    there = f" (only {_names(folder)})" if folder.is_dir() else ""
    what = f"{source!r} has no {' or '.join(WEIGHTS)}, whole or in shards{there}"
    if folder.is_dir() and not any(file.suffix in (".bin", ".pt", ".pth") for file in folder.iterdir()):
        raise FileNotFoundError(f"{what}; fetch the weights too, or give the folder that holds them")
    raise FileNotFoundError(
        f"{what}. Pickle files (.bin) are never read: convert them once where PyTorch is installed, with "
        "AutoModel.from_pretrained(source).save_pretrained(folder, safe_serialization=True)"
    )


def _shards(source: str, index: Path, revision: str | None) -> list[Path]:
    names = set(read_index(index)["weight_map"].values())
    files = {name: find(source, name, revision) for name in sorted(names)}
    if absent := [name for name, path in files.items() if path is None]:
        raise FileNotFoundError(f"{index} lists {', '.join(absent)}, which is missing; fetch it again")
    return [path for path in files.values() if path]


def read_index(path: Path) -> dict[str, Any]:
    """The index of a checkpoint in shards.

    Raises:
        ValueError: no weight_map, or one that leads out of the folder.
    """
    index = read_json(path)
    weight_map = index.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{path} must hold a weight_map from tensor names to files beside it")
    return index


def read_weights(files: Sequence[Path]) -> tuple[Tensors, bool]:
    """Every tensor by its dotted name, and whether names and layouts are Flax's already."""
    tensors: Tensors = {}
    for path in files:
        content, kind = _read_safetensors(path) if path.suffix == ".safetensors" else _read_msgpack(path)
        if kind not in ("pt", "flax"):
            raise ValueError(f"{path} was saved by {kind!r}; only 'pt' (PyTorch) and 'flax' can be read")
        tensors |= content
    return tensors, kind == "flax"


def _read_safetensors(path: Path) -> tuple[Tensors, str]:
    with open_safetensors(path) as file:
        names, kind = file.keys(), (file.metadata() or {}).get("format", "pt")
        return {name: file.get_tensor(name) for name in names}, kind


def _read_msgpack(path: Path) -> tuple[Tensors, str]:
    try:
        return flatten_dict(msgpack_restore(path.read_bytes()), sep="."), "flax"
    except ValueError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); fetch it again") from error
