"""A Hugging Face checkpoint in PyTorch's safetensors, read one tensor at a time, and an adapter's place in it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from peanut_jax.files.hub import INDEX_FILE, local_folder, read_index, weight_files, without_config
from peanut_jax.files.safetensors import Entry, Header, read_entry, read_header
from peanut_jax.files.untrusted import FLAG, read_json, typed
from peanut_jax.messages import reading

# Written beside merged weights: reading them as a base again would apply an adapter to the wrong kernels.
MERGED_FILE = "peanut_jax_merged.json"
# What a language model's head is called, and what the embeddings that it may be tied to end in.
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight", "word_embedding.weight")
# Bytes of a tensor that are compared at a time.
_BLOCK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where every tensor of a checkpoint is."""

    folder: Path
    headers: dict[Path, Header]
    entries: dict[str, Entry]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own dtype (bfloat16 as ml_dtypes has it)."""
        entry = self.entries[name]
        return read_entry(entry, name, self.headers[entry.file].data)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of one tensor, without reading the others."""
        entry = self.entries[name]
        row = (entry.stop - entry.start) // entry.shape[0]
        part = dataclasses.replace(
            entry,
            shape=(stop - start, *entry.shape[1:]),
            start=entry.start + start * row,
            stop=entry.start + stop * row,
        )
        return read_entry(part, name, self.headers[entry.file].data)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Reads the headers of a checkpoint, one file or shards, in a folder or on the hub.

    Raises:
        FileNotFoundError: no folder, config.json or safetensors; a shard that is missing.
        ValueError: a file that is corrupt, a tensor that is there twice or not where the index says, a checkpoint saved
            by Flax.
    """
    folder = local_folder(str(source))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(without_config(str(folder)))
    files = weight_files(str(folder), None)
    if files[0].suffix != ".safetensors":
        raise ValueError(f"{files[0]} is Flax's own format; a PyTorch checkpoint in safetensors is needed here")
    headers = {file: read_header(file) for file in files}
    with reading(folder):
        return Checkpoint(folder, headers, _entries(folder, headers))


def _entries(folder: Path, headers: Mapping[Path, Header]) -> dict[str, Entry]:
    """Every tensor by its name, as the files and the index agree."""
    entries: dict[str, Entry] = {}
    for file, header in headers.items():
        if header.metadata.get("format", "pt") != "pt":
            raise ValueError(
                f"{file} was saved by {header.metadata['format']!r}; only PyTorch's names and layout can be kept. "
                "For a Flax checkpoint use peanut_jax.merge and the model's save_pretrained"
            )
        for name, entry in header.entries.items():
            if name in entries:
                raise ValueError(
                    f"tensor {name!r} is in {entries[name].file.name} and in {file.name}; fetch them again"
                )
            entries[name] = entry
    if (index := folder / INDEX_FILE).is_file():
        weight_map = read_index(index)["weight_map"]
        wrong = [name for name, file in weight_map.items() if name not in entries or entries[name].file.name != file]
        if wrong or len(weight_map) != len(entries):
            first = wrong[0] if wrong else next(name for name in entries if name not in weight_map)
            raise ValueError(f"{index} and the shards disagree about {first!r}; fetch them again")
    return entries


def open_base(source: str | Path, fingerprinted: bool) -> Checkpoint:
    """As `open_checkpoint`, of a checkpoint that is to take an adapter.

    Args:
        fingerprinted: Whether a fingerprint will tell that it is the adapter's base.

    Raises:
        ValueError: merged weights, and no fingerprint to say that the adapter was trained on them; a head that
            config.json ties to an embedding from which it differs.
    """
    checkpoint = open_checkpoint(source)
    path = checkpoint.folder / "config.json"
    with reading(path):
        tied = typed(read_json(path), "tie_word_embeddings", FLAG, False)
    if tied:
        check_tied_head(checkpoint)
    if (checkpoint.folder / MERGED_FILE).is_file() and not fingerprinted:
        raise ValueError(
            f"{checkpoint.folder} holds merged weights ({MERGED_FILE} says so): an adapter's update is a function of "
            "the kernels that it was trained on, so give the checkpoint from which this one was merged (an adapter "
            "that save_adapter wrote for merged weights is told by its fingerprint)"
        )
    return checkpoint


def check_tied_head(checkpoint: Checkpoint) -> None:
    """Refuses a head of its own in a checkpoint whose config.json ties it to the embedding: which of the two is meant?

    A head that is a copy of the embedding is fine, and so is none. Both are read once, some rows at a time.

    Raises:
        ValueError: the head is another matrix.
    """
    embeddings = [name for name in checkpoint.entries if name.endswith(EMBEDDINGS)]
    if HEAD not in checkpoint.entries or not embeddings or any(_equal(checkpoint, HEAD, one) for one in embeddings):
        return
    raise ValueError(
        f"config.json of {checkpoint.folder} ties the head to the embedding (tie_word_embeddings), and its {HEAD!r} "
        f"differs from {embeddings[0]!r}: set tie_word_embeddings to false there if the head is meant, or take the "
        "head out of the file if the embedding is"
    )


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors have the same values, whatever their dtypes."""
    entries = checkpoint.entries[one], checkpoint.entries[other]
    if entries[0].shape != entries[1].shape or not entries[0].shape:
        return False
    rows = entries[0].shape[0]
    step = max(1, _BLOCK_BYTES * rows // max(1, *(entry.stop - entry.start for entry in entries)))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        left, right = (checkpoint.read_rows(name, start, stop) for name in (one, other))
        if left.dtype == right.dtype:  # as bits: numpy has no fast comparison of bfloat16
            left, right = (block.view(f"u{block.dtype.itemsize}") for block in (left, right))
        if not np.array_equal(left, right):
            return False
    return True
