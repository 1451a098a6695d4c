"""The files of a Hugging Face checkpoint, in a folder or the hub's cache: safetensors or msgpack, whole or in shards.

Pickle files are never read.
"""

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

from peanut_jax.files.safetensors import open_safetensors, read_header
from peanut_jax.files.untrusted import COUNT, OBJECT, read_json, typed
from peanut_jax.messages import one_line, reading, short

WEIGHTS = ("model.safetensors", "flax_model.msgpack")
INDEX_FILE = "model.safetensors.index.json"
# Files and folders of a repository that hold the same weights for others to read, or what training left behind. The
# names are fnmatch's, whose * takes a / too.
NOT_FETCHED = (
    # PyTorch's pickles, their indices and the states of optimizers; Meta's and Mistral's own layouts
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.pt2", "*.pte", "*.ckpt", "*.pkl", "*.pickle", "*.joblib",
    "*.distcp", "consolidated*", "original/*", "metal/*", "checkpoint-*/*", "global_step*/*", "runs/*",
    # TensorFlow, Flax, Rust, Paddle, NeMo, Keras, NumPy
    "*.h5", "*.h5.index.json", "*.hdf5", "*.keras", "*.pb", "*.tflite", "*.litertlm", "*.ckpt.*", "saved_model/*",
    "*.msgpack", "*.msgpack.index.json", "*.ot", "*.pdparams", "*.nemo", "*.npz", "*.npy",
    # compiled or converted for an engine
    "*.onnx", "*.onnx_data*", "*.onnx.data", "onnx/*", "openvino*", "*.gguf*", "*.ggml", "*.task", "*.llamafile",
    "*.engine", "*.mlmodel", "*.mlpackage/*", "*.mlmodelc/*", "coreml/*", "*.mnn*", "*.rknn",
    # archives
    "*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z",
)  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")
Tensors = dict[str, np.ndarray]
# Bytes of a file's name on the systems that there are.
_MAX_NAME = 255
# What flax and msgpack raise over bytes that are not theirs; flax looks into what it unpacked without asking.
_MSGPACK_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, OverflowError, RecursionError,
    msgpack.UnpackException,
)  # fmt: skip


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
    """The folder, or the hub repository's files in the cache: one copy of its weights, and what stands beside them.

    Raises:
        FileNotFoundError: it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    _refuse_path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _fetched(source, revision, snapshot_download)
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
    reason = one_line(error, 200)
    if "Repo id" in reason:  # how the hub calls a name that it could not have
        return f"{source!r} does not exist here, and cannot be a hub name; give a folder that does, or a hub name"
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


def _fetched(source: str, revision: str | None, download: Callable[..., str]) -> Path:
    """The cache's folder with a repository's small files, and then the weights that they speak of, of the same commit.

    Args:
        download: `huggingface_hub.snapshot_download`.
    """
    folder = Path(download(source, revision=revision, ignore_patterns=[*NOT_FETCHED, "*.safetensors"]))
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    for wanted in (_whole, _in_shards):  # shards only where there is no whole file, as transformers has it
        if patterns := [glob.escape(name) for name in wanted(folder) if not (folder / name).is_file()]:
            download(source, revision=commit, allow_patterns=patterns)
    return folder


def _whole(folder: Path) -> list[str]:
    """The weights of a model or an adapter in one file, and those of the parts of a sentence-transformer."""
    own = {"config.json": WEIGHTS[0], "adapter_config.json": "adapter_model.safetensors"}
    parts = sorted(path.parent.name for path in folder.glob("[0-9]_*/config.json"))
    return [
        *(file for config, file in own.items() if (folder / config).is_file()),
        *(f"{n}/{WEIGHTS[0]}" for n in parts),
    ]


def _in_shards(folder: Path) -> list[str]:
    """The shards of a model that is not in one file."""
    index = folder / INDEX_FILE
    if (folder / WEIGHTS[0]).is_file() or not index.is_file():
        return []
    return sorted(set(read_index(index)["weight_map"].values()))


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
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise FileNotFoundError(f"{index} lists {absent[0]}{more}, which is missing; fetch it again")
    return [path for path in files.values() if path]


def read_index(path: Path) -> dict[str, Any]:
    """The index of a checkpoint in shards: `weight_map`, and `metadata` with the `total_size`.

    Raises:
        ValueError: no weight_map, or one that leads out of the folder; metadata of another form.
    """
    with reading(path):
        index = read_json(path)
        weight_map = index.get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(_is_file_name(name) for name in weight_map.values())
        ):
            raise ValueError("it must hold a weight_map from tensor names to files beside it")
        typed(typed(index, "metadata", OBJECT, {}), "total_size", COUNT)
    return index


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and "\0" not in name and len(name) <= _MAX_NAME


def read_weights(files: Sequence[Path]) -> tuple[Tensors, bool]:
    """Every tensor by its dotted name, and whether names and layouts are Flax's already."""
    tensors: Tensors = {}
    for path in files:
        content, kind = _read_safetensors(path) if path.suffix == ".safetensors" else _read_msgpack(path)
        if kind not in ("pt", "flax"):
            raise ValueError(f"{path} was saved by {short(kind)}; only 'pt' (PyTorch) and 'flax' can be read")
        tensors |= content
    return tensors, kind == "flax"


def _read_safetensors(path: Path) -> tuple[Tensors, str]:
    kind = read_header(path).metadata.get("format", "pt")
    with open_safetensors(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, kind


def _read_msgpack(path: Path) -> tuple[Tensors, str]:
    try:
        content = flatten_dict(msgpack_restore(path.read_bytes()), sep=".")
    except _MSGPACK_ERRORS as error:
        raise ValueError(f"{path} is truncated or corrupt ({one_line(error)}); fetch it again") from error
    if odd := next((name for name, leaf in content.items() if not isinstance(leaf, np.ndarray)), None):
        raise ValueError(f"{path} holds {short(content[odd])} at {short(odd)}, not an array; fetch it again")
    return content, "flax"
