"""The tasks: their rows, what they refuse, and one of a user's own."""

import dataclasses
import errno
import json
import shutil

import datasets
import pytest
import transformers
from safetensors.numpy import load_file

import peanut_jax as pj
from peanut_jax.sharding import make_mesh
from peanut_jax.trainer import Classification, Loop, Optimizer, Run, read, train
from peanut_jax.trainer.loop import Outcome
from peanut_jax.trainer.metrics_file import read_metrics
from peanut_jax.trainer.tasks import language
from peanut_jax.trainer.tasks.tables import read_table
from peanut_jax.trainer.tasks.tokenizers import load_tokenizer

ADAPTER = "adapter/adapter_model.safetensors"


def test_examples_without_room_are_left_out(run, caplog):
    """Of questions of 2 to 5 words, with the start token, those of 2 fit into rows of 4."""
    task = dataclasses.replace(run.task, seq_len=4)
    rows = task.build(make_mesh("data=8"), None, 0).train
    assert "are left out (no response, or no room for it in task.seq_len=4)" in caplog.text
    assert all(rows[i]["weights"].sum() >= 1 for i in range(len(rows)))
    assert 0 < len(rows) < 60


@pytest.mark.parametrize(("seq_len", "whole"), [(4, True), (32, False)])
def test_rows_of_one_example_are_not_kept_apart(run, monkeypatch, seq_len, whole):
    """Attention in them is plainly causal: the loss is not given their segments."""
    monkeypatch.setattr(language, "language_loss", lambda model, chunk: lambda params, batch, key: sorted(batch))
    task = dataclasses.replace(run.task, seq_len=seq_len).build(make_mesh("data=8"), None, 0)
    assert task.train.whole is whole is all(task.train[i]["segments"].max() == 1 for i in range(len(task.train)))
    for loss_fn in (task.loss_fn, *task.remats.values()):
        assert ("segments" in loss_fn(None, task.train[0], None)) is not whole


@pytest.fixture
def classification(tiny, tmp_path):
    """A tiny BERT on pairs of words that are equal or not."""
    model = transformers.FlaxBertModel(
        transformers.BertConfig(
            vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=12,
        ),
        seed=0,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "bert", safe_serialization=True)
    for file in (tiny / "model").glob("*token*"):
        shutil.copy(file, tmp_path / "bert")
    rows = [f"w{i % 7} w{i % 3}\t{int(i % 7 == i % 3)}" for i in range(42)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return Run(
        task=Classification(
            model=str(tmp_path / "bert"), train=str(tmp_path / "pairs.tsv"), evaluation=str(tmp_path / "pairs.tsv"),
            max_tokens=8,
        ),
        adapter=pj.PeanutConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"),
        optimizer=Optimizer(learning_rate=0.01, schedule="constant"),
        loop=Loop(steps=12, batch_size=16, accumulate_steps=2, best="accuracy", eval_every=6),
        mesh="data=4,fsdp=2",
    )  # fmt: skip


def test_a_classification_run(classification, tmp_path):
    folder = tmp_path / "run"
    assert train(classification, folder) == Outcome(12, 12)
    evaluations = [row for row in read_metrics(folder) if "eval/accuracy" in row]
    assert [row["step"] for row in evaluations] == [6, 12]
    assert evaluations[1]["eval/loss"] < 0.6
    assert evaluations[1]["eval/accuracy"] * 42 == pytest.approx(round(evaluations[1]["eval/accuracy"] * 42))
    assert any("classifier" in name for name in load_file(folder / ADAPTER))
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == classification.task.model


def test_texts_that_do_not_fit_the_model(classification, tmp_path):
    longer = dataclasses.replace(classification.task, max_tokens=13)
    with pytest.raises(ValueError, match=r"task\.max_tokens=13 must be at most the model's 12 positions"):
        train(dataclasses.replace(classification, task=longer), tmp_path / "run")
    (tmp_path / "pairs.tsv").write_text("sentence\tlabel\nw1 w2\t1\n\t0\n")
    with pytest.raises(ValueError, match=r"column 'sentence' of .* is empty in 1 of 2 rows"):
        train(classification, tmp_path / "other")


def test_labels_that_are_no_classes(classification, tmp_path):
    (tmp_path / "pairs.tsv").write_text("sentence\tlabel\nw1 w2\t1\nw3 w4\t2\n")
    with pytest.raises(ValueError, match=r"column 'label' must hold integers in 0\.\.1, found \[1, 2\]"):
        train(classification, tmp_path / "run")


def test_a_new_head_must_be_trained(classification):
    with pytest.raises(ValueError, match=r"adapter\.task_type is None: the new head would stay as it was drawn"):
        dataclasses.replace(classification, adapter=pj.PeanutConfig(r=4, target_modules=["query"]))


OWN = """
import dataclasses
import json
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import peanut_jax as pj
from peanut_jax.sharding import shard
from peanut_jax.trainer import Loop, Optimizer, Run
from peanut_jax.trainer.tasks.base import Task


class Points:
    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = np.sin(np.arange(4) + i).astype(np.float32)
        return {"x": x, "y": x[::-1] * 2, "weights": np.ones((), np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    METRICS: ClassVar[tuple[str, ...]] = ("loss", "largest")

    model: str | None = None
    evaluation: str | None = "the same points"
    width: int = 4

    def check(self, adapter):
        pass

    def build(self, mesh, rules, seed):
        model = nn.Dense(self.width)
        params = shard(model.init(jax.random.key(seed), jnp.zeros((1, 4))), mesh, [(".*", jax.P())])

        def sums(params, batch):
            error = ((model.apply(params, batch["x"]) - batch["y"]) ** 2).mean(-1) * batch["weights"]
            return {"loss": error.sum(), "largest": error.max(), "weight": batch["weights"].sum()}

        def loss_fn(params, batch, key):
            found = sums(params, batch)
            return found["loss"] / found["weight"], {"weight": found["weight"]}

        return Task(params, loss_fn, sums, Points(), Points(), "points", lambda batch: batch["weights"].size)


config = Run(
    task=Regression(), adapter=pj.LoraConfig(r=2, target_modules="all-linear"),
    optimizer=Optimizer(learning_rate=0.1), loop=Loop(steps=12, batch_size=8, eval_every=6, log_every=6),
)
"""


def test_a_task_of_the_users_own(tmp_path):
    """Defined in the config file: it trains, its fields are in the identity, and --set changes them."""
    (tmp_path / "config.py").write_text(OWN)
    run = read(tmp_path / "config.py")
    assert run.identity()["task"] == {
        "kind": "Regression", "model": None, "evaluation": "the same points", "width": 4,
    }  # fmt: skip
    assert train(run, tmp_path / "run") == Outcome(12, 12)
    first, last = (row["eval/loss"] for row in read_metrics(tmp_path / "run") if "eval/loss" in row)
    assert last < first
    assert read(tmp_path / "config.py", ["task.width=3"]).task.width == 3


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"a": "x"}\n{"a": [}\n', "cannot be read: "), ("a.jsonl", b"", "has no rows"),
        ("a.csv", b"a,b\n1,2\n1,2,3,4\n", "cannot be read: Error tokenizing data"), ("a.csv", b"", "cannot be read: "),
        ("a.csv", bytes(range(256)), "cannot be read: "), ("a.json", b"[" * 100_000, "cannot be read: "),
    ],
)  # fmt: skip
def test_a_damaged_data_file_is_named_in_one_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told) as caught:
        read_table(str(tmp_path / name), ["a"])
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_data_set_that_cannot_be_reached():
    with pytest.raises(OSError, match="no/such:train cannot be read: Couldn't reach 'no/such' on the Hub"):
        read_table("no/such:train", ["a"])


def test_a_cache_of_datasets_without_room_is_named(tmp_path, monkeypatch):
    def load_dataset(*args, **options):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "a.csv").write_text("a\n1\n")
    with pytest.raises(OSError, match=r"No space left on device, reading .*a\.csv into the cache .*HF_DATASETS_CACHE"):
        read_table(str(tmp_path / "a.csv"), ["a"])


@pytest.mark.parametrize("damage", [None, "{", "[" * 100_000])
def test_a_model_without_a_tokenizer(tiny, tmp_path, damage):
    shutil.copy(tiny / "model" / "config.json", tmp_path)
    if damage:
        shutil.copy(tiny / "model" / "tokenizer_config.json", tmp_path)
        (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(ValueError, match="holds no tokenizer that can be read") as caught:
        load_tokenizer(str(tmp_path))
    assert len(str(caught.value)) <= 500
    assert "\n" not in str(caught.value)
