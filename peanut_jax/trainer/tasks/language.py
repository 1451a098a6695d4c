"""Language modelling: a decoder on prompts and responses."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import datasets
import jax
import pyarrow.compute as pc
from jax.sharding import Mesh
from jaxtyping import PyTree

from peanut_jax.methods.base import Method
from peanut_jax.models.decoder import CHUNK, Decoder, language_loss, summed_loss
from peanut_jax.models.decoder_config import REMAT_POLICIES
from peanut_jax.models.loading import load_decoder
from peanut_jax.sharding import Rules, batch_shards
from peanut_jax.trainer.checks import check_choice, check_int
from peanut_jax.trainer.packing import fits, pack_row, plan_rows
from peanut_jax.trainer.rows import Row, Rows
from peanut_jax.trainer.tasks.base import DTYPES, Direction, Task
from peanut_jax.trainer.tasks.tables import check_text, digest_table, read_table
from peanut_jax.trainer.tasks.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling:
    """A decoder on prompts and responses; the loss is on the responses.

    Attributes:
        model: Folder or hub name of a Llama, Mistral or Qwen checkpoint with its tokenizer.
        train, evaluation: Data: a .json, .jsonl or .csv file, or a hub name as `NAME:SPLIT` or `NAME/CONFIG:SPLIT`.
        prompt, response: Their columns. None as `prompt` for plain text in `response`.
        seq_len: Tokens of a row; examples are packed into rows, and a longer one is truncated.
        dtype: Dtype of the base and the activations.
        remat: As `DecoderConfig.remat`; "auto" for the policy that recomputes the least of those whose step fits the
            devices' memory.
    """

    METRICS: ClassVar[Mapping[str, Direction]] = {"loss": "min"}
    SOURCES: ClassVar[tuple[str, ...]] = ("train", "evaluation")
    FREE: ClassVar[tuple[str, ...]] = ("remat",)

    model: str
    train: str
    evaluation: str | None = None
    prompt: str | None = "prompt"
    response: str = "response"
    seq_len: int = 1024
    dtype: str = "bfloat16"
    remat: str = AUTO

    def __post_init__(self) -> None:
        check_int("task.seq_len", self.seq_len, 2)
        check_choice("task.dtype", self.dtype, DTYPES)
        check_choice("task.remat", self.remat, (AUTO, *REMAT_POLICIES))

    def check(self, adapter: Method) -> None:
        """Takes every adapter: the decoder has no new modules."""

    def build(self, mesh: Mesh, rules: Rules | None, seed: int) -> Task:
        """The decoder, its loss and the data; see `TaskConfig.build`. Nothing is drawn from `seed`."""
        auto = self.remat == AUTO
        remat = REMAT_POLICIES[-1] if auto else self.remat
        model, params = load_decoder(self.model, self.dtype, mesh, rules, remat=remat)
        tokenizer = load_tokenizer(self.model)
        vocab_size = model.config.vocab_size
        chunk = CHUNK * batch_shards(mesh)

        def sums(params: PyTree, batch: Any) -> dict[str, jax.Array]:
            total, weight = summed_loss(model, params, batch, chunk)
            return {"loss": total, "weight": weight}

        return Task(
            params=params,
            loss_fn=language_loss(model, chunk),
            sums=sums,
            train=self._rows(self.train, tokenizer, vocab_size),
            evaluation=self._rows(self.evaluation, tokenizer, vocab_size) if self.evaluation else None,
            unit="tokens",
            count=lambda batch: batch["tokens"].size,
            remats={policy: language_loss(_with_remat(model, policy), chunk) for policy in REMAT_POLICIES if auto},
        )

    def _rows(self, source: str, tokenizer: Any, vocab_size: int) -> Rows:
        columns = [name for name in (self.prompt, self.response) if name]
        table = read_table(source, columns)
        check_text(table, source, columns)
        return PackedRows(table, self, tokenizer, vocab_size)


def _with_remat(model: Decoder, policy: str) -> Decoder:
    return Decoder(dataclasses.replace(model.config, remat=policy), model.dtype)


class PackedRows:
    """Prompts and responses, tokenised once into a table on disk, and packed row by row as they are read."""

    def __init__(self, table: datasets.Dataset, task: LanguageModelling, tokenizer: Any, vocab_size: int):
        self._table = _tokenised(table, task, tokenizer)
        self._length = task.seq_len
        columns = [self._table.data.column(name) for name in ("prompt", "response")]
        largest = max(pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns)
        if largest >= vocab_size:
            raise ValueError(f"the tokenizer of {task.model} gives token {largest}, and its model has {vocab_size}")
        sizes = list(zip(*(pc.list_value_length(column).to_pylist() for column in columns), strict=True))
        fit = _fitting(sizes, task.seq_len)
        self._members = [[fit[i] for i in row] for row in plan_rows([sizes[i] for i in fit], task.seq_len)]

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, i: int) -> Row:
        # Typed Any: datasets knows lists of indices, and says so nowhere.
        indices: Any = self._members[i]
        part = self._table[indices]
        return pack_row(list(zip(part["prompt"], part["response"], strict=True)), self._length)

    def digest(self) -> str:
        """See `Digested`: every token, from which and `seq_len` the rows are made."""
        return digest_table(self._table, ("prompt", "response"))


def _tokenised(table: datasets.Dataset, task: LanguageModelling, tokenizer: Any) -> datasets.Dataset:
    """The token ids of each `prompt`, with the start token, and of each `response`, with the end token."""

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenise(columns: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        responses = [[*one, *end] for one in ids(columns[task.response])]
        if task.prompt is None:
            return {"prompt": [[]] * len(responses), "response": [[*start, *one] for one in responses]}
        return {"prompt": [[*start, *one] for one in ids(columns[task.prompt])], "response": responses}

    return table.map(tokenise, batched=True, remove_columns=table.column_names, load_from_cache_file=False)


def _fitting(sizes: list[tuple[int, int]], length: int) -> list[int]:
    """The examples of which a row of `length` tokens holds something to learn; a warning counts the others.

    Args:
        sizes: Tokens of each example's prompt and response.

    Raises:
        ValueError: there is none.
    """
    fit = [i for i, (prompt, response) in enumerate(sizes) if fits(prompt, response, length)]
    if not fit:
        raise ValueError(f"no example leaves room for its response in a row of {length} tokens (task.seq_len)")
    cut = sum(sum(sizes[i]) > length for i in fit)
    if cut or len(fit) < len(sizes):
        logger.warning(
            "of %d examples %d are left out (no response, or no room for it in task.seq_len=%d) and %d are truncated",
            len(sizes), len(sizes) - len(fit), length, cut,
        )  # fmt: skip
    return fit
