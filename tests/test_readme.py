"""The README's training example runs as written: only the hub's model and data are swapped for tiny local ones."""

import re
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
import transformers
from tokenizers import ByteLevelBPETokenizer

import peanut_jax as pj
from peanut_jax.models.hf import load

ROOT = Path(__file__).parent.parent
SENTENCES = ["a fine film", "a dull mess", "moving and funny", "tedious from start to end"] * 32


@pytest.fixture
def roberta(tmp_path):
    """A RoBERTa checkpoint with a tokenizer, as the hub would give it: no classification head."""
    folder = tmp_path / "roberta-base"
    folder.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(SENTENCES, 300, 1, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.save_model(str(folder))
    transformers.RobertaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    config = transformers.RobertaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=80,
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def test_the_training_example_runs_as_written(roberta, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"FacebookAI/roberta-base"' in code
    code = code.replace('"FacebookAI/roberta-base"', repr(str(roberta))).replace("% 100", "% 2")
    rows = datasets.Dataset.from_dict({"sentence": SENTENCES, "label": [1, 0, 1, 0] * 32})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: rows)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # the point of the test
    printed = re.findall(r"^(\d+) \{.*'loss': ([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step, _ in printed] == [2, 4]
    tokens = dict(names["tokens"])
    adapted = pj.adapt(lambda params, **x: names["model"](**x, params=params).logits, names["config"])(
        names["state"].adapters, names["params"], **tokens
    )
    saved, params = load("roberta-sst2", "sequence-classification")
    np.testing.assert_allclose(saved(**tokens, params=params).logits, adapted, atol=1e-5)
    assert float(jax.numpy.abs(names["state"].adapters["classifier/out_proj/bias"]).max()) > 0
