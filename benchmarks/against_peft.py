"""The same BERT, adapter, optimizer and batches in HF PEFT (torch) and here: loss curves, seconds a step, accuracy.

    python -m benchmarks.against_peft --optimizer sgd
    python -m benchmarks.against_peft --optimizer adamw --model FOLDER
    python -m benchmarks.against_peft --optimizer adamw --model FOLDER --data FOLDER --tokens 64 --steps 100 --seeds 3

The first trains a tiny random BERT on random batches, the second a checkpoint (a folder with `config.json` and
`model.safetensors`, such as MiniLM's) on random batches of 32 x 96 tokens, the third that checkpoint on SST-2
(`train_10k.tsv` and `dev.tsv` in FOLDER) and scores both on the development set. Query, value and the classifier train;
dropout is off; every weight that trains starts equal. Each step of one side is followed by the same step of the other
in one process on the same cores; the first of each, which compiles or allocates, is not timed. Busy neighbours slow
torch, whose threads wait for one another by spinning, far more than XLA: read the seconds of an idle machine only (the
load before the run is printed), or pin the run to one core with `taskset -c 0`. In long runs the curves part, for each
AdamW step divides by the size of the gradient and enlarges rounding: the development score is what then compares.

Needs the extra `test`, which brings torch and peft.
"""

import argparse
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import peft
import torch
import transformers
from transformers import AutoModelForSequenceClassification, FlaxAutoModelForSequenceClassification

import peanut_jax as pj
from benchmarks.timing import alternate, median_ratio
from tests.oracle import bridge

Batch = dict[str, np.ndarray]
ROWS = 32
LEARNING_RATES = {"sgd": 0.2, "adamw": 2e-3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
ADAPTER: dict[str, Any] = {"r": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
# optax and torch differ in AdamW's default weight decay, so that every number is given to both.
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-2


def torch_model(folder: Path | None, seed: int) -> transformers.PreTrainedModel:
    """The checkpoint with a fresh head, or a tiny random BERT."""
    torch.manual_seed(seed)
    if folder:
        return AutoModelForSequenceClassification.from_pretrained(folder, **NO_DROPOUT)
    return AutoModelForSequenceClassification.from_config(transformers.BertConfig(**bridge.SIZES, **NO_DROPOUT))


def random_batches(tokens: int, vocab: int, seed: int) -> Iterator[Batch]:
    """Four batches in turn, so that there is something to learn by heart."""
    rng = np.random.default_rng(seed)
    batches = [
        {
            "input_ids": rng.integers(0, vocab, (ROWS, tokens)),
            "attention_mask": np.ones((ROWS, tokens), np.int64),
            "labels": rng.integers(0, 2, ROWS),
        }
        for _ in range(4)
    ]
    return itertools.cycle(batches)


def read_sst2(path: Path, tokenizer: Callable[..., Any], tokens: int) -> Batch:
    """All rows of an SST-2 file, whose quotes are text, cut or padded to `tokens`."""
    rows = [line.rsplit("\t", 1) for line in path.read_text().splitlines()[1:]]
    ids = tokenizer(
        [sentence for sentence, _ in rows],
        padding="max_length",
        truncation=True,
        max_length=tokens,
        return_tensors="np",
    )
    labels = np.array([int(label) for _, label in rows])
    return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": labels}


def shuffled(data: Batch, seed: int) -> Iterator[Batch]:
    """Batches, epoch after epoch, each in its own order; the rest of an epoch is dropped."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data["labels"]))
        for start in range(0, len(order) - ROWS + 1, ROWS):
            yield {name: value[order[start : start + ROWS]] for name, value in data.items()}


class PeftSide:
    """HF PEFT in an ordinary torch loop."""

    def __init__(self, model: peft.PeftModel, optimizer: str, lr: float):
        self.model, self.losses = model, list[float]()
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr, BETAS, EPS, WEIGHT_DECAY)

    def logits(self, batch: Batch) -> torch.Tensor:
        ids, mask = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"])
        return self.model(input_ids=ids, attention_mask=mask).logits

    def step(self, batch: Batch) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(self.logits(batch), torch.from_numpy(batch["labels"]))
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def predict(self, batch: Batch) -> np.ndarray:
        self.model.eval()
        return self.logits(batch).argmax(-1).numpy()


class OurSide:
    """peanut_jax with the base and the starting adapter of a `PeftSide`."""

    def __init__(
        self,
        base: transformers.PreTrainedModel,
        adapters: pj.Adapters,
        config: pj.PeanutConfig,
        optimizer: str,
        lr: float,
    ):
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            self.model = FlaxAutoModelForSequenceClassification.from_pretrained(folder)
        tx = optax.sgd(lr) if optimizer == "sgd" else optax.adamw(lr, *BETAS, EPS, weight_decay=WEIGHT_DECAY)
        self.params, self.losses = self.model.params, list[float]()
        self.state = pj.TrainState.create(adapters, tx, jax.random.key(0))
        self._step = pj.make_train_step(self._loss, tx, config)
        self._predict = jax.jit(pj.adapt(self._logits, config))

    def _logits(self, params: Any, batch: Batch, **train: Any) -> jax.Array:
        return self.model(batch["input_ids"], batch["attention_mask"], params=params, **train).logits

    def _loss(self, params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        logits = self._logits(params, batch, train=True, dropout_rng=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    def step(self, batch: Batch) -> None:
        self.state, metrics = self._step(self.state, self.params, batch)
        jax.block_until_ready(self.state)
        self.losses.append(float(metrics["loss"]))

    def predict(self, batch: Batch) -> np.ndarray:
        return np.asarray(self._predict(self.state.adapters, self.params, batch).argmax(-1))


def build(
    folder: Path | None, adapter: dict[str, Any], optimizer: str, lr: float, seed: int
) -> dict[str, PeftSide | OurSide]:
    """Both sides of one run, at the same start. `adapter` holds fields that both configs have."""
    base = torch_model(folder, seed)
    wrapped = bridge.wrap(base, seed=seed, **adapter)
    ours = OurSide(base, bridge.adapters(wrapped), pj.PeanutConfig(**adapter), optimizer, lr)
    return {"peft": PeftSide(wrapped, optimizer, lr), "ours": ours}


def compare(sides: dict[str, PeftSide | OurSide], batches: Iterator[Batch], steps: int) -> dict[str, Any]:
    """Trains both on the same batches in turn: loss curves, their largest relative difference, seconds a step."""
    feeds = dict(zip(sides, itertools.tee(batches, len(sides)), strict=True))
    runs = {name: lambda side=side, feed=feeds[name]: side.step(next(feed)) for name, side in sides.items()}
    seconds = alternate(runs, steps - 1)
    peft_losses, our_losses = np.array(sides["peft"].losses), np.array(sides["ours"].losses)
    differences = np.abs(our_losses / peft_losses - 1)
    return {
        "peft_losses": peft_losses.tolist(),
        "our_losses": our_losses.tolist(),
        "largest_relative_difference": float(differences.max()),
        "largest_in_the_first_20_steps": float(differences[:20].max()),
        "peft_median_seconds": float(np.median(seconds["peft"])),
        "our_median_seconds": float(np.median(seconds["ours"])),
        "our_seconds_over_peft": median_ratio(seconds["ours"], seconds["peft"]),
        "our_fastest_over_peft": min(seconds["ours"]) / min(seconds["peft"]),
    }


def accuracy(side: PeftSide | OurSide, data: Batch) -> float:
    starts = range(0, len(data["labels"]), ROWS)
    batches = [{name: value[start : start + ROWS] for name, value in data.items()} for start in starts]
    return float(np.mean(np.concatenate([side.predict(batch) for batch in batches]) == data["labels"]))


def band(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=tuple(LEARNING_RATES), default="sgd")
    parser.add_argument("--lr", type=float, help=f"constant; default: {LEARNING_RATES}")
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=ADAPTER["target_modules"], help="module names, or all-linear")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1, help="runs, each with its own head, adapter and batches")
    parser.add_argument("--model", type=Path, help="folder of a BERT checkpoint")
    parser.add_argument("--tokens", type=int, default=96, help="of each row; the tiny model takes at most 24")
    parser.add_argument("--data", type=Path, help="folder of SST-2, for --model")
    args = parser.parse_args()
    if args.data and not args.model:
        parser.error("--data needs --model: the tiny model has no tokenizer")
    args.lr = args.lr or LEARNING_RATES[args.optimizer]
    args.tokens = args.tokens if args.model else min(args.tokens, bridge.SIZES["max_position_embeddings"])
    return args


def main() -> None:
    args = arguments()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    versions = {module.__name__: module.__version__ for module in (jax, torch, transformers, peft)}
    command = shlex.join(["python", "-m", "benchmarks.against_peft", *sys.argv[1:]])
    print(json.dumps({"command": command, "cores": cores, **versions}), flush=True)

    targets = "all-linear" if args.targets == ["all-linear"] else args.targets
    adapter = {**ADAPTER, "target_modules": targets, "depth": args.depth}
    if args.data:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        train, dev = (read_sst2(args.data / name, tokenizer, args.tokens) for name in ("train_10k.tsv", "dev.tsv"))
    scores: dict[str, list[float]] = {"peft": [], "ours": []}
    for seed in range(args.seeds):
        sides = build(args.model, adapter, args.optimizer, args.lr, seed)
        vocab = sides["peft"].model.config.vocab_size
        batches = shuffled(train, seed) if args.data else random_batches(args.tokens, vocab, seed)
        record = {"seed": seed, "lr": args.lr, "rows": ROWS, "tokens": args.tokens, "load_before": os.getloadavg()[0]}
        record |= compare(sides, batches, args.steps)
        if args.data:
            for name, side in sides.items():
                scores[name].append(accuracy(side, dev))
            record |= {f"{name}_accuracy": values[-1] for name, values in scores.items()}
        print(json.dumps(record), flush=True)
    if args.data:
        print(json.dumps({"accuracy_over_seeds": {name: band(values) for name, values in scores.items()}}), flush=True)


if __name__ == "__main__":
    main()
