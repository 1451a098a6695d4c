"""PEANuT from start to end, in about two minutes on two cores.

    python -m train.quickstart --out runs/quickstart

1. Pretrain a small ViT of HF transformers on the handwritten digits 0-4, and save it as a checkpoint folder.
2. Load the checkpoint with a new head and adapt it to the digits 5-9, with each method of `methods.py`.
3. Compare them: a table, learning curves and a JSON of both.
4. Merge the first PEANuT into the checkpoint, load the result from disk, and compare its logits.

`adapter_trainer` and `merged_difference` are the two to read: training with the library, and taking the result home.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
import transformers
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import peanut_jax as pj
from peanut_jax.files.atomic import refuse_foreign, replacing_entries
from peanut_jax.methods.base import Config
from peanut_jax.models import hf
from train import report
from train.digits import N_CLASSES, Pictures, Task, tasks
from train.methods import HEAD, METHODS, Method
from train.trainers import (
    LogitsFn,
    LossFn,
    Plan,
    Run,
    Trainer,
    compile_step,
    fit,
    plain_trainer,
    planned_bytes,
    seconds_in_turns,
    stepper,
)

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
JSON, PNG, PRETRAINED, MERGED = "quickstart.json", "quickstart.png", "pretrained", "merged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how often to train."""

    seeds: tuple[int, ...]
    pretrain: Plan
    adapt: Plan


SETTINGS = Settings(
    seeds=(0, 1, 2),
    pretrain=Plan(n_steps=600, batch_size=32, eval_every_steps=600),
    adapt=Plan(n_steps=150, batch_size=32, eval_every_steps=15),
)


def logits_of(model: Any, params: PyTree, images: Float[Array, "n 1 8 8"]) -> Float[Array, "n labels"]:
    """What an HF model says. Knows nothing of adapters: the library adapts it from outside."""
    return model(images, params=params).logits


def loss_of(model: Any, params: PyTree, batch: Pictures, key: PRNGKeyArray | None) -> Float[Array, ""]:
    """Mean cross-entropy. `key` is for dropout, which this model has none of."""
    logits = logits_of(model, params, batch.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def adapter_trainer(
    logits_fn: LogitsFn,
    loss_fn: LossFn,
    config: Config,
    adapter_tx: optax.GradientTransformation,
    head_tx: optax.GradientTransformation,
) -> Trainer:
    """Trains an adapter and a new head. The parameters of the checkpoint are read, never written."""
    tx = pj.partition(adapters=adapter_tx, saved=head_tx)
    adapted = pj.adapt(logits_fn, config)

    def start(key: PRNGKeyArray, params: PyTree) -> pj.TrainState:
        init_key, train_key = jax.random.split(key)
        return pj.TrainState.create(pj.init(init_key, params, config), tx, train_key)

    return Trainer(
        start=start,
        step=pj.make_train_step(loss_fn, tx, config),
        logits=jax.jit(lambda state, params, images: adapted(state.adapters, params, images)),
        trainable=lambda state: pj.count(state.adapters),
    )


def trainer_of(method: Method, model: Any, n_steps: int) -> Trainer:
    """The trainer of one row of the table, with Adam at the row's learning rates."""
    head_tx = adam(method.head_learning_rate, n_steps)
    fns = functools.partial(logits_of, model), functools.partial(loss_of, model)
    if method.how == "probe":
        return plain_trainer(*fns, pj.freeze(head_tx, _is_head), trained=(HEAD,))
    body_tx = adam(method.learning_rate, n_steps)
    if method.how == "full":
        tx = optax.partition({True: head_tx, False: body_tx}, _is_head)
        return plain_trainer(*fns, tx, trained=(model.base_model_prefix, HEAD))
    return adapter_trainer(*fns, method.how, body_tx, head_tx)


def adam(learning_rate: float, n_steps: int) -> optax.GradientTransformation:
    """Adam that warms up for a tenth of the steps, then decays along a cosine to 0."""
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, n_steps // 10, n_steps))


def _is_head(params: PyTree) -> PyTree:
    """The same tree with True for every leaf of the head."""
    return {name: jax.tree.map(lambda _, head=(name == HEAD): head, module) for name, module in params.items()}


def pretrain(folder: Path, task: Task, plan: Plan, progress: Progress) -> float:
    """Trains the ViT from scratch and saves it as any HF checkpoint is. Returns its test accuracy."""
    model = transformers.FlaxViTForImageClassification(transformers.ViTConfig(**VIT), seed=0)
    fns = functools.partial(logits_of, model), functools.partial(loss_of, model)
    trainer = plain_trainer(*fns, adam(PRETRAIN_LEARNING_RATE, plan.n_steps), trained=tuple(model.params))
    bar = progress.add_task("pretraining on 0-4", total=plan.n_steps)
    step = compile_step(trainer, model.params, task, plan.batch_size)
    run = fit(trainer, step, model.params, task, plan, seed=0, advance=lambda: progress.advance(bar))
    model.save_pretrained(folder, params=run.state.params, safe_serialization=True)
    return run.accuracies[-1]


class Trained(NamedTuple):
    """A method after its training: one run a seed."""

    method: Method
    trainer: Trainer
    step: jax.stages.Compiled
    runs: list[Run]


def train_method(
    method: Method, model: Any, starts: Mapping[int, PyTree], task: Task, plan: Plan, progress: Progress
) -> Trained:
    """Trains one method from the params of every seed in `starts`, with one compiled step."""
    bar = progress.add_task(method.name, total=len(starts) * plan.n_steps)
    trainer = trainer_of(method, model, plan.n_steps)
    step = compile_step(trainer, next(iter(starts.values())), task, plan.batch_size)
    runs = [
        fit(trainer, step, params, task, plan, seed, advance=lambda: progress.advance(bar))
        for seed, params in starts.items()
    ]
    return Trained(method, trainer, step, runs)


def result_of(trained: Trained, step_seconds: float) -> report.Result:
    """The method's row of the report."""
    method, trainer, step, runs = trained
    return report.Result(
        method=method.name,
        trainable_parameters=trainer.trainable(runs[0].state),
        learning_rate=method.learning_rate,
        head_learning_rate=method.head_learning_rate,
        step_seconds=step_seconds,
        step_bytes=planned_bytes(step),
        eval_steps=runs[0].eval_steps,
        test_accuracy=[run.accuracies for run in runs],
    )


def merged_difference(
    folder: Path, model: Any, params: PyTree, adapters: PyTree, config: Config, images: Array
) -> float:
    """Merges an adapter, saves an ordinary HF checkpoint, loads it again: the largest difference between their logits.

    Both sides at full matmul precision, since a GPU or TPU rounds the operands of a matmul by default.
    """
    model.save_pretrained(folder, params=pj.merge(params, adapters, config), safe_serialization=True)
    merged_model, merged_params = hf.load(folder, "image-classification")
    with jax.default_matmul_precision("highest"):
        adapted = pj.adapt(functools.partial(logits_of, model), config)(adapters, params, images)
        merged = logits_of(merged_model, merged_params, images)
    return float(jnp.max(jnp.abs(adapted - merged)))


def run(folder: Path, settings: Settings, methods: Sequence[Method], console: Console) -> report.Report:
    """The whole story, its checkpoints written into `folder`."""
    started = time.perf_counter()
    pretraining, task = tasks()
    plan = settings.adapt
    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        pretrained_accuracy = pretrain(folder / PRETRAINED, pretraining, settings.pretrain, progress)
        load = functools.partial(hf.load, folder / PRETRAINED, "image-classification", new_modules=(HEAD,))
        model, _ = load()
        starts = {seed: load(seed=seed)[1] for seed in settings.seeds}
        trained = [train_method(method, model, starts, task, plan, progress) for method in methods]

    params = starts[settings.seeds[0]]
    seconds = seconds_in_turns([stepper(t.trainer, t.step, params, task, plan.batch_size) for t in trained])
    method, config, adapters = next(
        (t.method, t.method.how, t.runs[0].state.adapters) for t in trained if isinstance(t.method.how, pj.PeanutConfig)
    )
    difference = merged_difference(folder / MERGED, model, params, adapters, config, task.test.images)
    device = jax.local_devices()[0]
    return report.Report(
        versions={package.__name__: package.__version__ for package in (pj, jax, flax, transformers)},
        device=device.device_kind,
        device_peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
        settings=dataclasses.asdict(settings),
        pretrained_test_accuracy=pretrained_accuracy,
        results=[result_of(t, s) for t, s in zip(trained, seconds, strict=True)],
        merged_method=method.name,
        merged_largest_logit_difference=difference,
        seconds=time.perf_counter() - started,
    )


def main(argv: Sequence[str] | None = None, settings: Settings = SETTINGS, methods: Sequence[Method] = METHODS) -> None:
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
        found = run(folder, settings, methods, console)
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
    main()
