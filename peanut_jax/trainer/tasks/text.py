"""Classification of texts: a Flax encoder of transformers with a new head."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from peanut_jax.methods.base import Method
from peanut_jax.models import hf
from peanut_jax.sharding import Rules, rules_for, shard
from peanut_jax.trainer.checks import check_choice, check_int
from peanut_jax.trainer.rows import WEIGHTS, Row, Rows, digest_arrays
from peanut_jax.trainer.tasks.base import DTYPES, Direction, Task
from peanut_jax.trainer.tasks.losses import classification_sums, mean_loss
from peanut_jax.trainer.tasks.tables import check_text, digest_table, read_table
from peanut_jax.trainer.tasks.tokenizers import load_tokenizer

LABELS = "labels"
# Rows whose tokens are part of the digest, and tell another tokenizer of the same vocabulary.
_PROBES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """A transformers Flax encoder with a new head on a text or a pair of texts.

    Attributes:
        model: Folder or hub name.
        train, evaluation: As for `LanguageModelling`; .tsv too.
        text, text_pair, label: Columns; labels are integers from 0.
        num_labels: Number of classes.
        max_tokens: Length of an example; a longer one is truncated.
        dtype: Dtype of the base and the activations.
    """

    METRICS: ClassVar[Mapping[str, Direction]] = {"loss": "min", "accuracy": "max"}
    SOURCES: ClassVar[tuple[str, ...]] = ("train", "evaluation")

    model: str
    train: str
    evaluation: str | None = None
    text: str = "sentence"
    text_pair: str | None = None
    label: str = "label"
    num_labels: int = 2
    max_tokens: int = 128
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_int("task.num_labels", self.num_labels, 2)
        check_int("task.max_tokens", self.max_tokens, 2)
        check_choice("task.dtype", self.dtype, DTYPES)

    def check(self, adapter: Method) -> None:
        """Refuses an adapter that leaves the new head untrained.

        Raises:
            ValueError: as said.
        """
        if not (adapter.task_type or adapter.modules_to_save):
            raise ValueError(
                "adapter.task_type is None: the new head would stay as it was drawn. Set task_type='SEQ_CLS', or name "
                "the head in modules_to_save"
            )

    def build(self, mesh: Mesh, rules: Rules | None, seed: int) -> Task:
        """The encoder, its loss and the data; see `TaskConfig.build`."""
        model, params = hf.load(
            self.model, "sequence-classification", dtype=jnp.dtype(self.dtype), seed=seed, num_labels=self.num_labels
        )
        params = shard(params, mesh, rules_for(model.config.model_type) if rules is None else rules)
        tokenizer = load_tokenizer(self.model)
        self._check_fit(model.config, len(tokenizer))

        def sums(params: PyTree, batch: Any, **options: Any) -> dict[str, jax.Array]:
            inputs = {name: batch[name] for name in batch if name not in (LABELS, WEIGHTS)}
            logits = model(**inputs, params=params, **options).logits
            return classification_sums(logits, batch[LABELS], batch[WEIGHTS])

        def loss_fn(params: PyTree, batch: Any, key: Any) -> Any:
            return mean_loss(sums(params, batch, dropout_rng=key, train=True))

        return Task(
            params=params,
            loss_fn=loss_fn,
            sums=sums,
            train=self._rows(self.train, tokenizer),
            evaluation=self._rows(self.evaluation, tokenizer) if self.evaluation else None,
            unit="examples",
            count=lambda batch: batch[LABELS].size,
        )

    def _rows(self, source: str, tokenizer: Any) -> Rows:
        texts = [name for name in (self.text, self.text_pair) if name]
        table = read_table(source, [*texts, self.label])
        check_text(table, source, texts)
        return TextRows(table, self, tokenizer)

    def _check_fit(self, config: Any, tokens: int) -> None:
        """Refuses what a lookup out of range would turn into NaNs."""
        if tokens > config.vocab_size:
            raise ValueError(f"the tokenizer of {self.model} has {tokens} tokens, and its model {config.vocab_size}")
        # RoBERTa counts positions from its padding id on (transformers 4.57, create_position_ids_from_input_ids).
        offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        positions = getattr(config, "max_position_embeddings", self.max_tokens + offset) - offset
        if self.max_tokens > positions:
            raise ValueError(f"task.max_tokens={self.max_tokens} must be at most the model's {positions} positions")


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
        return {**inputs, LABELS: np.int32(row[task.label]), WEIGHTS: np.float32(1)}  # type: ignore[dict-item]

    def digest(self) -> str:
        """See `Digested`: every text and label, the vocabulary, and the tokens of some rows.

        The tokenizer's files do not count themselves: another release of its library may write them otherwise.
        """
        columns = [name for name in (self._task.text, self._task.text_pair, self._task.label) if name]
        vocabulary = json.dumps(sorted(self._tokenizer.get_vocab().items())).encode()
        probes = np.unique(np.linspace(0, len(self) - 1, min(_PROBES, len(self)), dtype=int))
        rows = [digest_arrays(self[i]) for i in probes]
        parts = [digest_table(self._table, columns), hashlib.sha256(vocabulary).hexdigest(), *rows]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
