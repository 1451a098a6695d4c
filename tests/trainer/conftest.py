"""A tiny run: a random Llama with a tokenizer, questions and answers, and a config file."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
import transformers

from peanut_jax.trainer import Run, read
from tests.models.test_decoder import build

CONFIG = """
import peanut_jax as pj
from peanut_jax.trainer import LanguageModelling, Loop, Optimizer, Run

config = Run(
    task=LanguageModelling(
        model={model!r}, train={train!r}, evaluation={evaluation!r}, prompt="question", response="answer", seq_len=16,
        dtype="float32", remat="none",
    ),
    adapter=pj.PeanutConfig(r=4, depth=1, target_modules=["q_proj", "down_proj"]),
    optimizer=Optimizer(learning_rate=0.02, warmup_steps=2),
    loop=Loop(steps=8, batch_size=8, log_every=2, save_every=3, eval_every=4),
)
"""
WORDS = [f"w{i}" for i in range(80)]


def _tokenizer(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.save_pretrained(folder)


def _data(path: Path, rows: int, seed: int) -> None:
    """Answers that follow from the questions, so that a loss can fall."""
    draw = random.Random(seed)
    lines = []
    for _ in range(rows):
        question = draw.choices(WORDS[:40], k=draw.randint(2, 5))
        answer = [WORDS[WORDS.index(word) + 40] for word in question]
        lines.append(json.dumps({"question": " ".join(question), "answer": " ".join(answer), "number": 1}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of the tiny run; `config.py` in it is its config file."""
    folder = tmp_path_factory.mktemp("tiny")
    build("llama2", folder / "model")
    _tokenizer(folder / "model")
    _data(folder / "train.jsonl", 60, seed=0)
    _data(folder / "eval.jsonl", 10, seed=1)
    paths = {name: str(folder / f"{name}.jsonl") for name in ("train", "eval")}
    (folder / "config.py").write_text(
        CONFIG.format(model=str(folder / "model"), train=paths["train"], evaluation=paths["eval"])
    )
    return folder


@pytest.fixture(scope="session")
def run(tiny) -> Run:
    """The run of that config file."""
    return read(tiny / "config.py")
