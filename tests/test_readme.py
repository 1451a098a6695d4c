"""The README's training example runs as written: only the hub's model and data are swapped for tiny local ones."""

import re
from pathlib import Path

import datasets
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

import peanut_jax as pj
from peanut_jax.cli import main

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


def test_the_example_and_its_commands_run_as_written(roberta, tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
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
    assert float(jax.numpy.abs(names["state"].adapters.saved["classifier/out_proj/bias"]).max()) > 0

    commands = re.findall(r"^    peanut-jax ((?:merge|to-lora|verify) FacebookAI.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert main([str(roberta) if word == "FacebookAI/roberta-base" else word for word in command.split()]) == 0
    out = capsys.readouterr().out
    assert float(re.search(r"largest logit difference ([^,]+),", out)[1]) < 1e-5
    torch_model = transformers.AutoModelForSequenceClassification.from_pretrained("roberta-sst2-merged").eval()
    lora_model = peft.PeftModel.from_pretrained(fresh_model(roberta), "roberta-sst2-lora").eval()
    peanut_model = peft.PeftModel.from_pretrained(fresh_model(roberta), "roberta-sst2").eval()
    for model in (torch_model, lora_model, peanut_model):
        with torch.no_grad():
            got = model(**{name: torch.from_numpy(np.asarray(value)) for name, value in tokens.items()}).logits
        np.testing.assert_allclose(got, adapted, rtol=0, atol=1e-5)


def fresh_model(folder):
    """The base with a head of its own, which the adapter replaces."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
