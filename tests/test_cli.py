"""`peanut-jax` on folders: what it prints and writes, and one line for a user's error."""

import json
import re
import shutil
import subprocess
import sys

import jax
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, RobertaConfig, RobertaForSequenceClassification, ViTConfig

import peanut_jax as pj
from peanut_jax.cli import main
from peanut_jax.models import hf

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
    file.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["key"]}))
    code, out, _ = run(capsys, roberta, "--config", file)
    assert (code, out.count("/key/kernel")) == (0, 2)
    err = run(capsys, roberta, "--config", file, "--depth", "1")[2]
    assert err == f"peanut-jax: {file} holds a LoraConfig, which has no depth\n"


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


# ---- merge, to-lora, verify, and inspect of an adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny RoBERTa as torch saves it and a PEANuT with a head for it."""
    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    config = RobertaConfig(**TINY, vocab_size=50, max_position_embeddings=24, num_labels=3, initializer_range=0.2)
    RobertaForSequenceClassification(config).save_pretrained(folder / "base")
    _, params = hf.load(folder / "base", "sequence-classification")
    config = pj.PeanutConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_weights=False)
    pj.save_adapter(folder / "adapter", pj.init(jax.random.key(0), params, config), config, params)
    return folder


def command(capsys, *argv):
    code = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_whole_road(folders, tmp_path, capsys):
    base, adapter = folders / "base", folders / "adapter"
    code, out, err = command(capsys, "merge", base, "--adapter", adapter, "--out", tmp_path / "merged")
    assert code == 0
    assert "merged in" in out
    assert "4/4" in err or "8/8" in err  # the bar: kernels, and the head's tensors
    code, out, _ = command(capsys, "to-lora", base, "--adapter", adapter, "--out", tmp_path / "lora")
    assert code == 0
    assert "LoRA of rank 4, lora_alpha = 4" in out
    for other in ("merged", "lora"):
        code, out, _ = command(capsys, "verify", base, tmp_path / other, "--adapter", adapter)
        assert code == 0
        assert float(re.search(r"difference ([^,]+),", out)[1]) < 1e-5
    code, out, _ = command(capsys, "verify", base, base, "--adapter", adapter)
    assert code == 1
    assert float(re.search(r"difference ([^,]+),", out)[1]) > 1e-2


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as where it is not installed
from peanut_jax.cli import main
base, adapter, out = sys.argv[1:]
for command in (["merge", base, "--out", out + "/merged"], ["to-lora", base, "--out", out + "/lora"],
                ["verify", base, out + "/merged"], ["verify", base, out + "/lora"]):
    assert main([*command, "--adapter", adapter]) == 0
"""


def test_torch_is_not_needed(folders, tmp_path):
    """The whole road, with a new head on a base that has none."""
    tensors = load_file(folders / "base" / "model.safetensors")
    (tmp_path / "bare").mkdir()
    shutil.copyfile(folders / "base" / "config.json", tmp_path / "bare" / "config.json")
    bare = {name.removeprefix("roberta."): array for name, array in tensors.items() if "classifier" not in name}
    save_file(bare, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-c", WITHOUT_TORCH, tmp_path / "bare", folders / "adapter", tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"largest logit difference \d\S*e-0[678],", result.stdout)) == 2


def test_inspect_of_an_adapter(folders, capsys):
    code, out, _ = run(capsys, folders / "adapter")
    assert code == 0
    assert "PEANUT" in out
    assert "roberta.encoder.layer.1.attention.self.value" in out
    assert "classifier.out_proj.weight (saved)" in out
    assert "target_modules=('query', 'value')" in out
    assert len(re.findall(r" [0-9a-f]{16} ", out)) == 4


def test_merge_refuses_and_overwrites(folders, tmp_path, capsys):
    argv = ["merge", folders / "base", "--adapter", folders / "adapter", "--out", tmp_path]
    assert command(capsys, *argv)[0] == 0, "an empty folder is free"
    code, out, err = command(capsys, *argv)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "exists; give another folder" in err
    assert command(capsys, *argv, "--overwrite")[0] == 0


@pytest.mark.parametrize("name", ["merge", "to-lora"])
def test_another_base_in_one_line(folders, tmp_path, capsys, name):
    torch.manual_seed(1)
    config = RobertaConfig(**TINY, vocab_size=50, max_position_embeddings=24, num_labels=3)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "other")
    argv = [name, tmp_path / "other", "--adapter", folders / "adapter", "--out", tmp_path / "out"]
    code, _, err = command(capsys, *argv)
    assert code == 1
    assert "another base" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert command(capsys, *argv, "--no-base-check")[0] == 0


def test_a_note_for_adapters_without_a_fingerprint(folders, tmp_path, capsys):
    shutil.copytree(folders / "adapter", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    argv = ["to-lora", folders / "base", "--adapter", tmp_path / "peft", "--out", tmp_path / "out"]
    code, _, err = command(capsys, *argv)
    assert code == 0
    assert "peanut-jax: note:" in err
    assert "no fingerprint" in err


@pytest.mark.parametrize("name", ["inspect", "merge", "to-lora", "verify"])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([name, "--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert "usage: peanut-jax " + name in out
    assert max(map(len, out.splitlines())) <= 140


def test_bad_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["merge", "base"])
    assert exit_info.value.code == 2
    assert "--adapter" in capsys.readouterr().err


@pytest.mark.parametrize("mesh", ["fsdp=100000", "data=64,fsdp=64,tensor=2"])
def test_a_mesh_that_is_too_large_is_refused_at_once(capsys, mesh):
    """Before the model's config is looked for, let alone a device made."""
    assert main(["plan", "--config-json", "absent", "--mesh", mesh, "--batch", "1", "--seq", "1"]) == 1
    assert "devices and plan takes at most 2,048" in capsys.readouterr().err
