"""PEANuT from start to end, in about two minutes on two cores.

    python -m train.quickstart --out runs/quickstart

1. Pretrain a small ViT of HF transformers on the handwritten digits 0-4, and save it as a checkpoint folder.
2. Load the checkpoint with a new head and adapt it to the digits 5-9, with each method of `methods.py`.
3. Compare them: a table, learning curves and a JSON of both.
4. Merge the first PEANuT into the checkpoint, load the result from disk, and compare its logits.

`comparison.run_of` and `merged_difference` are the two to read: what a training run is made of, and taking the result
home.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jaxtyping import Array, Float, PyTree
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import peanut_jax as pj
from peanut_jax.files.atomic import refuse_foreign, replacing_entries
from peanut_jax.models import hf
from peanut_jax.trainer import Loop, train
from train import report
from train.comparison import Settings, accuracies, result_of, run_of, step_seconds, train_method
from train.digits import BODY, HEAD, HIGH, LOW, N_CLASSES, Digits, split
from train.methods import METHODS, Entry

VIT = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_labels": N_CLASSES,
    "initializer_range": 0.1,  # HF's 0.02 is for wider layers: here it takes twice the steps to learn less
}
PRETRAIN_LEARNING_RATE = 2e-3
LOGIT_TOLERANCE = 1e-4
JSON, PNG, DRAWN, PRETRAINED, MERGED = "quickstart.json", "quickstart.png", "drawn", "pretrained", "merged"
RUNS, PRETRAINING = "runs", "pretraining"

SETTINGS = Settings(
    seeds=(0, 1, 2),
    pretrain=Loop(steps=600, batch_size=32, log_every=60, save_every=600, keep_last=1),
    adapt=Loop(steps=150, batch_size=32, log_every=25, eval_every=25, save_every=150, keep_last=1),
)


def pretrain(folder: Path, loop: Loop) -> float:
    """Trains the ViT from scratch and saves it as any HF checkpoint is. Returns its test accuracy."""
    model = transformers.FlaxViTForImageClassification(transformers.ViTConfig(**VIT), seed=0)
    model.save_pretrained(folder / DRAWN, safe_serialization=True)
    everything = pj.SubsetConfig(modules_to_save=(BODY, HEAD))
    run = run_of(Digits(model=str(folder / DRAWN), digits=LOW), everything, loop, PRETRAIN_LEARNING_RATE)
    train(run, folder / RUNS / PRETRAINING, quiet=True)
    adapters, config = pj.load_adapter(folder / RUNS / PRETRAINING / "adapter", model.params)
    model.save_pretrained(folder / PRETRAINED, params=pj.merge(model.params, adapters, config), safe_serialization=True)
    return list(accuracies(folder / RUNS / PRETRAINING).values())[-1]


def merged_difference(
    folder: Path, checkpoint: Path, adapter: Path, images: Float[np.ndarray, "n 1 8 8"], seed: int
) -> float:
    """Merges an adapter, saves an ordinary HF checkpoint, loads it again: the largest difference between their logits.

    Both sides at full matmul precision, since a GPU or TPU rounds the operands of a matmul by default.

    Args:
        folder: Where the merged checkpoint goes.
        checkpoint: The pretrained checkpoint.
        adapter: The adapter of one run.
        seed: The seed of that run, from which its head was drawn.
    """
    model, params = hf.load(checkpoint, "image-classification", new_modules=(HEAD,), seed=seed)
    adapters, config = pj.load_adapter(adapter, params)
    model.save_pretrained(folder, params=pj.merge(params, adapters, config), safe_serialization=True)
    merged_model, merged_params = hf.load(folder, "image-classification")
    with jax.default_matmul_precision("highest"):
        adapted = jax.jit(pj.adapt(functools.partial(logits_of, model), config))(adapters, params, images)
        merged = jax.jit(functools.partial(logits_of, merged_model))(merged_params, images)
    return float(jnp.max(jnp.abs(adapted - merged)))


def logits_of(model: Any, params: PyTree, images: Float[np.ndarray, "n 1 8 8"]) -> Float[Array, "n labels"]:
    """What an HF model says. Knows nothing of adapters: the library adapts it from outside."""
    return model(images, params=params).logits


def story(folder: Path, out: Path, settings: Settings, methods: Sequence[Entry], console: Console) -> report.Report:
    """The whole story, its checkpoints and runs written into `folder`, which `out` takes over in the end."""
    started = time.perf_counter()
    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("pretraining on 0-4", total=1)
        pretrained_accuracy = pretrain(folder, settings.pretrain)
        progress.advance(bar)
        base_name = str((out / PRETRAINED).absolute())
        trained = [
            train_method(entry, folder / PRETRAINED, base_name, folder / RUNS, settings, progress) for entry in methods
        ]
    seconds = step_seconds(trained, settings.adapt.batch_size)
    first = next(one for one in trained if one.entry.config.READS_BASE)
    difference = merged_difference(
        folder / MERGED, folder / PRETRAINED, first.folders[0] / "adapter", split(HIGH)[1].images, settings.seeds[0]
    )
    device = jax.local_devices()[0]
    return report.Report(
        versions={package.__name__: package.__version__ for package in (pj, jax, flax, transformers)},
        device=device.device_kind,
        device_peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
        settings=dataclasses.asdict(settings),
        pretrained_test_accuracy=pretrained_accuracy,
        results=[result_of(one, each) for one, each in zip(trained, seconds, strict=True)],
        merged_method=first.entry.name,
        merged_largest_logit_difference=difference,
        seconds=time.perf_counter() - started,
    )


def main(argv: Sequence[str] | None = None, settings: Settings = SETTINGS, methods: Sequence[Entry] = METHODS) -> None:
    """The command. `settings` and `methods` are for callers that want a shorter story."""
    parser = argparse.ArgumentParser(prog="python -m train.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results, new or of an earlier quickstart"
    )
    out = parser.parse_args(argv).out
    transformers.logging.set_verbosity_error()  # its Flax classes announce on every use that v5 dropped them
    console = Console()
    try:
        refuse_foreign(out, marker=JSON)
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    with replacing_entries(out) as folder:
        found = story(folder, out, settings, methods, console)
        report.write_json(found, folder / JSON)
        report.plot(found, folder / PNG)
    console.print(report.table(found))
    for name in (PNG, JSON, PRETRAINED, MERGED):
        console.print(f"wrote {out / name}", highlight=False, soft_wrap=True)
    difference = found.merged_largest_logit_difference
    console.print(
        f"merged checkpoint: largest logit difference to the adapted model = {difference:.1e}", highlight=False
    )
    if not difference <= LOGIT_TOLERANCE:
        sys.exit(f"error: the merged checkpoint differs from the adapted model by more than {LOGIT_TOLERANCE:.0e}")


if __name__ == "__main__":
    # What the runs of several seeds compile alike is compiled once.
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        main()
