"""`peanut-jax inspect` on model folders: what it prints, and one line for a user's error."""

import json

import pytest
from transformers import GPT2Config, RobertaConfig, ViTConfig

from peanut_jax.cli import main

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    RobertaConfig(
        **TINY, vocab_size=50, max_position_embeddings=12, architectures=["RobertaForSequenceClassification"]
    ).save_pretrained(folder)
    return folder


def run(capsys, *argv):
    code = main(["inspect", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_table_of_paths_shapes_parameters_and_shares(roberta, capsys):
    code, out, _ = run(capsys, roberta, "--r", "4", "--depth", "1", "--target-modules", "query", "value")
    rows = [line for line in out.splitlines() if "roberta/encoder/layer" in line]
    assert code == 0
    assert len(rows) == 4
    assert "roberta/encoder/layer/1/attention/self/value/kernel" in rows[-1]
    assert all("16 x 16" in row and " 160 " in row for row in rows)  # 2 * 16 * 4 + 2 * 4 * 4
    # 50 + 12 + 2 embeddings of 16 and a norm; two layers; the head of 16 -> 16 -> 2.
    total = 64 * 16 + 32 + 2 * (4 * (16 * 16 + 16) + 16 * 24 + 24 + 24 * 16 + 16 + 64) + 16 * 16 + 16 + 16 * 2 + 2
    assert f"{total:,} in the model" in out
    assert f"{640 / total:.4%}" in out


def test_saved_modules_are_listed(roberta, capsys):
    _, out, _ = run(capsys, roberta, "--r", "4", "--task-type", "SEQ_CLS")
    assert "classifier/out_proj/kernel (saved)" in out


@pytest.mark.parametrize(
    ("config", "flags", "found"),
    [
        (ViTConfig(**TINY, image_size=8, patch_size=4), [], "encoder/layer/0/attention/attention/query/kernel"),
        (GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8), [], "h/0/attn/c_attn/kernel"),
        (
            ViTConfig(**TINY, image_size=8, patch_size=4),
            ["--task", "image-classification", "--target-modules", "all-linear"],
            "vit/encoder/layer/1/output/dense/kernel",
        ),
        (
            ViTConfig(**TINY, image_size=8, patch_size=4),
            ["--target-regex", r".*\.1\..*key", "--orientation", "input"],
            "encoder/layer/1/attention/attention/key/kernel",
        ),
    ],
)
def test_other_architectures_and_targets(config, flags, found, tmp_path, capsys):
    config.save_pretrained(tmp_path)
    code, out, _ = run(capsys, tmp_path, "--r", "2", *flags)
    assert code == 0
    assert found in out


def test_a_pefts_adapter_config_is_read(roberta, tmp_path, capsys):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "PEANUT", "r": 2, "target_modules": ["key"], "inference_mode": True}))
    _, out, _ = run(capsys, roberta, "--config", file)
    assert out.count("/key/kernel") == 2
    file.write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    assert run(capsys, roberta, "--config", file)[::2] == (
        1,
        f"peanut-jax: {file} must hold a PEANuT config (peft_type 'PEANUT'), found 'LORA'\n",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-modules", "qurey"], "'qurey' matched none of"),
        (["--r", "0"], "r must be an integer of at least 1, got 0"),
        (["--target-modules", "query", "--target-regex", ".*"], "not both"),
        (["--task", "causal-lm", "--target-modules", "word_embeddings"], "is of type Embed"),
    ],
)
def test_a_users_error_is_one_line(roberta, flags, message, capsys):
    code, out, err = run(capsys, roberta, *flags)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_without_a_config(tmp_path, capsys):
    code, _, err = run(capsys, tmp_path)
    assert code == 1
    assert "has no config.json" in err
