"""What is trained: a base on the mesh, its loss, and its data as rows."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.compute as pc
from jax.sharding import Mesh
from jaxtyping import PyTree
from transformers import AutoTokenizer

from peanut_jax.models import hf
from peanut_jax.models.decoder import CHUNK, language_loss, summed_loss
from peanut_jax.models.loading import load_decoder
from peanut_jax.sharding import Rules, batch_shards, rules_for, shard
from peanut_jax.trainer.config import Classification, LanguageModelling
from peanut_jax.trainer.data import Row, Rows
from peanut_jax.trainer.packing import fits, pack_row, plan_rows
from peanut_jax.training import LossFn

logger = logging.getLogger(__name__)

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}


class Task(NamedTuple):
    """A base, what is asked of it, and data.

    Attributes:
        params: Frozen, on the mesh.
        loss_fn: As `make_train_step` takes it.
        sums: (params, batch) -> sums over the batch's labels of each metric, and `weight`, their number.
        train, evaluation: Rows.
        unit: What the training's rate counts.
        count: batch -> how many of them it holds.
    """

    params: PyTree
    loss_fn: LossFn
    sums: Callable[[PyTree, Any], dict[str, jax.Array]]
    train: Rows
    evaluation: Rows | None
    unit: str
    count: Callable[[Any], int]


def build(task: LanguageModelling | Classification, mesh: Mesh, rules: Rules | None, seed: int) -> Task:
    """Loads the base onto the mesh and opens the data.

    Args:
        rules: None takes the architecture's table.
        seed: Of a new head.

    Raises:
        FileNotFoundError, ValueError: a model or data that is missing or does not fit, by name.
    """
    if isinstance(task, LanguageModelling):
        return _language(task, mesh, rules)
    return _classification(task, mesh, rules, seed)


def _language(task: LanguageModelling, mesh: Mesh, rules: Rules | None) -> Task:
    model, params = load_decoder(task.model, task.dtype, mesh, rules, remat=task.remat)
    tokenizer = AutoTokenizer.from_pretrained(task.model)

    def rows(source: str) -> Rows:
        columns = [name for name in (task.prompt, task.response) if name]
        table = _table(source, columns)
        _check_text(table, source, columns)
        return PackedRows(table, task, tokenizer, model.config.vocab_size)

    evaluation = rows(task.evaluation) if task.evaluation else None
    chunk = CHUNK * batch_shards(mesh)

    def sums(params: PyTree, batch: Any) -> dict[str, jax.Array]:
        total, weight = summed_loss(model, params, batch, chunk)
        return {"loss": total, "weight": weight}

    return Task(
        params,
        language_loss(model, chunk),
        sums,
        rows(task.train),
        evaluation,
        "tokens",
        lambda batch: batch["tokens"].size,
    )


class PackedRows:
    """Prompts and responses, tokenised once into a table on disk, and packed row by row as they are read."""

    def __init__(self, table: datasets.Dataset, task: LanguageModelling, tokenizer: Any, vocab_size: int):
        def ids(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"]

        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

        def tokenise(columns: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            responses = [[*one, *end] for one in ids(columns[task.response])]
            if task.prompt is None:
                return {"prompt": [[]] * len(responses), "response": [[*start, *one] for one in responses]}
            return {"prompt": [[*start, *one] for one in ids(columns[task.prompt])], "response": responses}

        self._table = table.map(tokenise, batched=True, remove_columns=table.column_names, load_from_cache_file=False)
        self._length = task.seq_len
        columns = [self._table.data.column(name) for name in ("prompt", "response")]
        largest = max(pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns)
        if largest >= vocab_size:
            raise ValueError(f"the tokenizer of {task.model} gives token {largest}, and its model has {vocab_size}")
        sizes = list(zip(*(pc.list_value_length(column).to_pylist() for column in columns), strict=True))
        fit = [i for i, (prompt, response) in enumerate(sizes) if fits(prompt, response, task.seq_len)]
        if not fit:
            raise ValueError(
                f"no example leaves room for its response in a row of {task.seq_len} tokens (task.seq_len)"
            )
        cut = sum(sum(sizes[i]) > task.seq_len for i in fit)
        if cut or len(fit) < len(sizes):
            logger.warning(
                "of %d examples %d are left out (no response, or no room for it in task.seq_len=%d) and %d are cut",
                len(sizes), len(sizes) - len(fit), task.seq_len, cut,
            )  # fmt: skip
        self._plan = [[fit[i] for i in row] for row in plan_rows([sizes[i] for i in fit], task.seq_len)]

    def _columns(self, index: Any) -> tuple[list[list[int]], list[list[int]]]:
        part = self._table[index]
        return part["prompt"], part["response"]

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, i: int) -> Row:
        members = list(zip(*self._columns(self._plan[i]), strict=True))
        return pack_row(members, self._length)


def _classification(task: Classification, mesh: Mesh, rules: Rules | None, seed: int) -> Task:
    model, params = hf.load(
        task.model, "sequence-classification", dtype=jnp.dtype(task.dtype), seed=seed, num_labels=task.num_labels
    )
    params = shard(params, mesh, rules_for(model.config.model_type) if rules is None else rules)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    _check_fit(task, model.config, len(tokenizer))

    def terms(params: PyTree, batch: Any, **options: Any) -> dict[str, jax.Array]:
        inputs = {name: batch[name] for name in batch if name not in ("labels", "weights")}
        logits = model(**inputs, params=params, **options).logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        each = {"loss": loss, "accuracy": logits.argmax(-1) == batch["labels"], "weight": 1.0}
        return {name: (values * batch["weights"]).sum() for name, values in each.items()}

    def loss_fn(params: PyTree, batch: Any, key: Any) -> Any:
        found = terms(params, batch, dropout_rng=key, train=True)
        weight = found.pop("weight")
        means = {name: value / weight for name, value in found.items()}
        return means.pop("loss"), {**means, "weight": weight}

    def rows(source: str) -> Rows:
        texts = [name for name in (task.text, task.text_pair) if name]
        table = _table(source, [*texts, task.label])
        _check_text(table, source, texts)
        return TextRows(table, task, tokenizer)

    evaluation = rows(task.evaluation) if task.evaluation else None
    return Task(
        params=params,
        loss_fn=loss_fn,
        sums=terms,
        train=rows(task.train),
        evaluation=evaluation,
        unit="examples",
        count=lambda batch: batch["labels"].size,
    )


def _check_fit(task: Classification, config: Any, tokens: int) -> None:
    """What a lookup out of range would turn into NaNs."""
    if tokens > config.vocab_size:
        raise ValueError(f"the tokenizer of {task.model} has {tokens} tokens, and its model {config.vocab_size}")
    # RoBERTa counts positions from its padding id on (transformers 4.57, create_position_ids_from_input_ids).
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    positions = getattr(config, "max_position_embeddings", task.max_tokens + offset) - offset
    if task.max_tokens > positions:
        raise ValueError(f"task.max_tokens={task.max_tokens} must be at most the model's {positions} positions")


class TextRows:
    """Labelled texts, tokenised as they are read."""

    def __init__(self, table: datasets.Dataset, task: Classification, tokenizer: Any):
        labels = set(table.unique(task.label))
        if not all(isinstance(one, int) and 0 <= one < task.num_labels for one in labels):
            raise ValueError(
                f"column {task.label!r} must hold integers in 0..{task.num_labels - 1}, found "
                f"{sorted(labels, key=str)[:5]}"
            )
        self._table, self._task, self._tokenizer = table, task, tokenizer

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: int) -> Row:
        task, row = self._task, self._table[int(i)]
        texts = [row[name] for name in (task.text, task.text_pair) if name]
        encoded = self._tokenizer(*texts, padding="max_length", truncation=True, max_length=task.max_tokens)
        inputs = {name: np.asarray(values, np.int32) for name, values in encoded.items()}
        return {**inputs, "labels": np.int32(row[task.label]), "weights": np.float32(1)}  # type: ignore[dict-item]


def _table(source: str, columns: list[str]) -> datasets.Dataset:
    """A file, or NAME[/CONFIG]:SPLIT of the hub, with the columns that are asked for and no others."""
    path = Path(source)
    if path.suffix in _READERS:
        if not path.is_file():
            raise FileNotFoundError(f"there is no data file {path}")
        options = {"delimiter": "\t", "quoting": 3} if path.suffix == ".tsv" else {}  # 3: no quoting, as GLUE's files
        table = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train", **options)
    else:
        name, colon, split = source.rpartition(":")
        if not colon:
            raise ValueError(
                f"data must be a {', '.join(_READERS)} file or NAME:SPLIT of the hub, such as nyu-mll/glue/sst2:train, "
                f"got {source!r}"
            )
        parts = name.split("/")
        table = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    if absent := [name for name in columns if name not in table.column_names]:
        raise ValueError(f"{source} has no column {absent[0]!r}, only {', '.join(table.column_names)}")
    return table.select_columns(columns)


def _check_text(table: datasets.Dataset, source: str, columns: list[str]) -> None:
    for name in columns:
        if table.features[name].dtype not in ("string", "large_string"):
            raise ValueError(f"column {name!r} of {source} must hold text, found {table.features[name].dtype}")
        if empty := table.data.column(name).null_count:
            raise ValueError(f"column {name!r} of {source} is empty in {empty} of {len(table)} rows")
