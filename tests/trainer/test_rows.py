"""Changed data are told, in whatever row, and moved data are the same."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest
import transformers

from peanut_jax.trainer import Classification, LanguageModelling
from peanut_jax.trainer.rows import digest_arrays, identity
from peanut_jax.trainer.tasks.tables import digest_table


class Numbers:
    """Rows of a user's own, without a digest."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return {"x": np.float32(self.values[i]), "weights": np.ones((), np.float32)}


@pytest.mark.parametrize("i", range(10))
def test_each_row_counts(i):
    values = list(range(10))
    want = identity(Numbers(values))
    assert want == identity(Numbers(list(values)))
    assert want["rows"] == 10
    values[i] += 100
    assert identity(Numbers(values))["digest"] != want["digest"]


def test_rows_with_a_digest_are_not_read():
    class Told(Numbers):
        def digest(self):
            return self.values

        def __getitem__(self, i):
            raise AssertionError("read")

    assert identity(Told("one")) != identity(Told("two"))
    with pytest.raises(ValueError, match=r"digest\(\) of Told must return a text that tells its rows, got \[1\]"):
        identity(Told([1]))


def test_long_reading_is_told(monkeypatch, caplog):
    monkeypatch.setattr("peanut_jax.trainer.rows._PATIENCE_S", 0.0)
    identity(Numbers([1, 2, 3]))
    assert caplog.text.count("Numbers are read once") == 1


def test_arrays_of_another_shape_or_dtype_differ():
    found = [digest_arrays({"a": a}) for a in (np.zeros(4), np.zeros((2, 2)), np.zeros(4, np.int64), np.zeros(8)[:0])]
    assert len(set(found)) == 4
    with pytest.raises(ValueError, match="'a' of a row must be an array of numbers, got list"):
        digest_arrays({"a": [object()]})


def test_a_table_is_its_values():
    """However it is divided into chunks; texts that join to the same text are not the same."""
    parts = [datasets.Dataset.from_dict({"t": ["ab", "c", ""], "n": [[1], [2, 3], []]}) for _ in range(2)]
    whole = datasets.Dataset.from_dict({"t": ["ab", "c", ""] * 2, "n": [[1], [2, 3], []] * 2})
    joined = datasets.concatenate_datasets(parts)
    assert len(joined.data.column("t").chunks) == 2
    assert digest_table(joined, ["t", "n"]) == digest_table(whole, ["t", "n"])
    for other in (
        {"t": ["a", "bc", ""] * 2, "n": [[1], [2, 3], []] * 2},
        {"t": ["ab", "d", ""] * 2, "n": [[1], [2, 3], []] * 2},
        {"t": ["ab", "c", ""] * 2, "n": [[1, 2], [3], []] * 2},
        {"t": ["ab", "c", ""] * 2, "n": [[1], [2, 4], []] * 2},
    ):
        assert digest_table(datasets.Dataset.from_dict(other), ["t", "n"]) != digest_table(whole, ["t", "n"])


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return transformers.AutoTokenizer.from_pretrained(tiny / "model")


def language_rows(tiny, tokenizer, path, **fields):
    task = LanguageModelling(model="m", train=str(path), prompt="question", response="answer", seq_len=16, **fields)
    return identity(task._rows(str(path), tokenizer, 90))


def test_an_answer_in_any_row_counts_and_a_move_does_not(tiny, tokenizer, tmp_path):
    source = tiny / "train.jsonl"
    want = language_rows(tiny, tokenizer, source)
    moved = tmp_path / "moved.jsonl"
    shutil.copy(source, moved)
    os.utime(moved, (1, 1))
    assert language_rows(tiny, tokenizer, moved) == want
    lines = source.read_text().splitlines()
    for i in (0, 1, 29, 31, 58, 59):
        changed = [*lines]
        row = json.loads(lines[i])
        changed[i] = json.dumps({**row, "answer": row["answer"][:-1] + str((int(row["answer"][-1]) + 1) % 10)})
        path = tmp_path / f"{i}.jsonl"
        path.write_text("\n".join(changed) + "\n")
        assert language_rows(tiny, tokenizer, path)["digest"] != want["digest"], i


def test_labels_texts_and_tokenizers_count(tiny, tokenizer, tmp_path):
    rows = [f"w{i % 7} w{i % 3}\t{int(i % 7 == i % 3)}" for i in range(42)]

    def found(rows, tokenizer):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.tsv"
        path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
        task = Classification(model="m", train=str(path), max_tokens=8)
        return identity(task._rows(str(path), tokenizer))["digest"]

    want = found(rows, tokenizer)
    assert found(rows, tokenizer) == want
    label = [*rows[:30], rows[30][:-1] + str(1 - int(rows[30][-1])), *rows[31:]]
    text = [*rows[:30], "w5 " + rows[30][3:], *rows[31:]]
    other = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    other.add_tokens(["new"])
    sides = transformers.AutoTokenizer.from_pretrained(tiny / "model", padding_side="left")
    assert len({want, found(label, tokenizer), found(text, tokenizer), found(rows, other), found(rows, sides)}) == 5
