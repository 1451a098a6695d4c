"""What the documentation shows runs: each docstring's example, and each Python block of README.md and docs/.

They run as written, in a folder where the hub's names are tiny local checkpoints.
"""

import ast
import doctest
import inspect
import re
from pathlib import Path

import datasets
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

import peanut_jax as pj
from peanut_jax.cli import main
from tests.models.test_decoder import build

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
SENTENCES = ["a fine film", "a dull mess", "moving and funny", "tedious from start to end"] * 32
# What an example may use without importing it, as docs/api.md says.
IMPORTED = {"jax": jax, "jnp": jnp, "nn": nn, "np": np, "optax": optax, "pj": pj}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder with a tiny checkpoint for each name of the hub that the documentation uses."""
    folder = tmp_path_factory.mktemp("hub")
    save_roberta(folder / "FacebookAI" / "roberta-base")
    build("llama3.2", folder / "meta-llama" / "Llama-3.2-1B")
    build("qwen3", folder / "Qwen" / "Qwen3-0.6B")
    return folder


def save_roberta(folder):
    """A checkpoint with a tokenizer and without a classification head."""
    folder.mkdir(parents=True)
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


@pytest.fixture(autouse=True)
def _working_folder(hub, tmp_path, monkeypatch):
    """A name of the hub is a folder of the working directory, and `load_dataset` gives two classes of sentences."""
    for organisation in hub.iterdir():
        (tmp_path / organisation.name).symlink_to(organisation)
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_dict({"sentence": SENTENCES, "label": [1, 0, 1, 0] * 32})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: rows)


# Docstrings


def documented():
    """(Name, line of its docstring, docstring) of every module, class and function of the library."""
    for path in sorted((ROOT / "peanut_jax").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield from _documented(ast.parse(path.read_text()), name)


def _documented(node, name):
    if text := ast.get_docstring(node):
        yield name, node.body[0].lineno, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            yield from _documented(child, f"{name}.{child.name}")


EXAMPLES = [
    pytest.param(name, line, section, id=f"{name}:{line}")
    for name, line, text in documented()
    for section in re.findall(r"^Examples?:\n((?:(?: {4}.*)?\n?)*)", text, re.MULTILINE)
]


def test_examples_are_found():
    """In as many places as the word stands at the start of a docstring's section."""
    marked = sum(len(re.findall(r"^ *Examples?:$", p.read_text(), re.M)) for p in (ROOT / "peanut_jax").rglob("*.py"))
    assert len(EXAMPLES) == marked > 10


@pytest.mark.parametrize(("name", "line", "section"), EXAMPLES)
def test_example(name, line, section):
    code = inspect.cleandoc(section)
    assert code.startswith(">>> "), f"the example of {name} is not a doctest: begin each of its statements with >>>"
    assert "doctest:" not in code, f"the example of {name} switches its doctest off or loosens it"
    test = doctest.DocTestParser().get_doctest(code, dict(IMPORTED), name, name, line)
    said = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed == 0, "".join(said)


# Pages


def blocks(page):
    """The Python blocks of a page, each compiled where it stands, so that an error names the page's line."""
    text = (ROOT / page).read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        code = "\n" * text[: match.start(1)].count("\n") + match[1]
        yield code


def run(code, page, names):
    exec(compile(code, str(ROOT / page), "exec"), names)  # the point of these tests


def index_names():
    model = nn.Dense(3)
    return {
        "fn": model.apply,
        "params": model.init(jax.random.key(0), jnp.ones((1, 4))),
        "config": pj.PeanutConfig(r=2, target_modules="all-linear"),
        "key": jax.random.key(1),
        "tx": optax.adamw(1e-2),
        "loss_fn": lambda params, batch, key: jnp.mean(model.apply(params, batch) ** 2),
    }


def packed(vocab=90):
    """Rows of a language model's batch, as `peanut_jax.trainer.packing.pack` makes them."""
    tokens = np.random.default_rng(0).integers(3, vocab, (8, 16))
    weights = np.ones((8, 16), np.float32)
    return {"tokens": tokens, "labels": np.roll(tokens, -1, 1), "weights": weights, "segments": np.ones((8, 16), int)}


def decoder_names():
    batch = packed()
    prompts = [[1, 5, 9], [1, 7], [1, 8, 3, 4]]
    return {**batch, "folder": "meta-llama/Llama-3.2-1B", "attention_mask": batch["segments"], "prompts": prompts}


# What a page takes for granted, beside `IMPORTED`.
GIVEN = {
    "docs/index.md": index_names,
    "docs/decoder.md": decoder_names,
    "docs/training.md": lambda: {"batch": packed()},
}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and any(blocks(page))])
def test_page(page):
    names = {**IMPORTED, **GIVEN.get(page, dict)()}
    for code in blocks(page):
        run(code, page, names)


@pytest.mark.parametrize("page", PAGES)
def test_python_stands_in_blocks(page):
    """An indented block is output or for a shell: Python would not be run there."""
    outside = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^    (?:import |from |def |class |\w+(?:, \w+)* = \w+.*\().*$", outside, re.MULTILINE)


def test_readme_and_its_commands(hub, capsys):
    text = (ROOT / "README.md").read_text()
    roberta, *rest = blocks("README.md")
    names: dict = {}
    run(roberta.replace("% 100", "% 2"), "README.md", names)
    printed = re.findall(r"^(\d+) \{.*'loss': ([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step, _ in printed] == [2, 4]
    tokens = dict(names["tokens"])
    adapted = pj.adapt(lambda params, **x: names["model"](**x, params=params).logits, names["config"])(
        names["state"].adapters, names["params"], **tokens
    )
    assert float(jnp.abs(names["state"].adapters.saved["classifier/out_proj/bias"]).max()) > 0

    commands = re.findall(r"^    peanut-jax ((?:merge|to-lora|verify) FacebookAI.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert float(re.search(r"largest logit difference ([^,]+),", out)[1]) < 1e-5
    torch_model = transformers.AutoModelForSequenceClassification.from_pretrained("roberta-sst2-merged").eval()
    lora_model = peft.PeftModel.from_pretrained(with_new_head(), "roberta-sst2-lora").eval()
    peanut_model = peft.PeftModel.from_pretrained(with_new_head(), "roberta-sst2").eval()
    for model in (torch_model, lora_model, peanut_model):
        with torch.no_grad():
            got = model(**{name: torch.from_numpy(np.asarray(value)) for name, value in tokens.items()}).logits
        np.testing.assert_allclose(got, adapted, rtol=0, atol=1e-5)

    names |= {"batches": [packed()], "prompts": [[1, 5, 9], [1, 7]]}
    for code in rest:
        run(code, "README.md", names)


def with_new_head():
    """The base with a head of its own, which the adapter replaces."""
    return transformers.AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=2)
