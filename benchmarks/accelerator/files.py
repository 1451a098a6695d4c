"""Merging on the device, and checkpoints: written, loaded onto the device, merged on disk."""

import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import peanut_jax as pj
from benchmarks.accelerator.context import Context
from benchmarks.accelerator.flops import parameters
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.weights import random_params
from benchmarks.checkpoints import write_llama
from benchmarks.shapes import FIVE_TARGETS, decoder_config, fields
from benchmarks.timing import repeated
from peanut_jax.base.kernels import flatten
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.loading import load_decoder

RANK, SHARDS = 16, 4


def run_merge(record: Record, context: Context) -> None:
    """W0 + dW of every adapted kernel, in memory."""
    model = Decoder(decoder_config(context.sizes.merged), jnp.dtype(context.sizes.dtype))
    params = random_params(model)
    config = pj.PeanutConfig(r=RANK, target_modules=FIVE_TARGETS, init_weights=False)
    adapters = pj.init(jax.random.key(0), params, config)

    def merge() -> dict[str, Any]:
        seconds = repeated(
            lambda: jax.block_until_ready(pj.merge(params, adapters, config)), seconds=context.sizes.repeat_seconds / 4
        )
        flat = flatten(params)
        moved = 2 * sum(flat[path].nbytes for path in adapters.theta)
        median = float(np.median(seconds))
        return {"median_seconds": median, "gb_per_second": moved / median / 1e9, "kernel_bytes": moved // 2}

    record.run(f"merge {context.sizes.merged}", merge, {"shapes": context.sizes.merged, "rank": RANK})


def run_load(record: Record, context: Context) -> None:
    """A random checkpoint in shards, read onto the device and merged into another on disk; then deleted."""
    name = context.sizes.stored
    folder = context.folder / "tmp"
    base, about, loaded = folder / "base", {"shapes": name, "shards": SHARDS}, dict[str, Any]()
    try:
        record.run(f"write {name}", lambda: _write(base, name), about)
        if record.run(f"load {name}", lambda: _load(base, loaded), about):
            record.run(
                f"merge on disk {name}",
                lambda: _merge_on_disk(base, folder / "merged", loaded),
                {**about, "rank": RANK},
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(base: Path, name: str) -> dict[str, Any]:
    """Writes the checkpoint, if the disk has room for it and its merged copy."""
    shapes = fields(name, torch_dtype="bfloat16")
    needed = 5 * parameters(shapes)
    base.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(base.parent).free
    if free < needed:
        raise OSError(f"{base.parent} has {free / 1e9:.1f} GB free; checkpoint and merged copy take {needed / 1e9:.1f}")
    began = time.perf_counter()
    return _rate(write_llama(base, shapes, SHARDS), began)


def _load(base: Path, loaded: dict[str, Any]) -> dict[str, Any]:
    """Reads it from the page cache, where writing has left it."""
    began = time.perf_counter()
    loaded["params"] = jax.block_until_ready(load_decoder(base)[1])
    return _rate(_tensor_bytes(base), began)


def _merge_on_disk(base: Path, merged: Path, loaded: dict[str, Any]) -> dict[str, Any]:
    config = pj.PeanutConfig(r=RANK, target_modules=FIVE_TARGETS, init_weights=False)
    adapters = pj.init(jax.random.key(0), loaded["params"], config)
    began = time.perf_counter()
    pj.export_merged(base, merged, adapters, config)
    return _rate(_tensor_bytes(base), began)


def _tensor_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _rate(size: int, began: float) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": size, "gb_per_second": size / seconds / 1e9}
