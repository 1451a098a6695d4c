"""`peanut-jax` on folders: what it prints and writes, and one line for a user's error."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, RobertaConfig, RobertaForSequenceClassification, ViTConfig

import peanut_jax as pj
from peanut_jax.cli import exporting, main
from peanut_jax.cli.tables import in_bytes, in_flops, in_seconds, path_table, print_table
from peanut_jax.interop.peft_folder import DTYPE_KEY
from peanut_jax.interop.verify import Difference, _coarsest, compare
from peanut_jax.models import hf

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    RobertaConfig(
        **TINY, vocab_size=50, max_position_embeddings=12, architectures=["RobertaForSequenceClassification"]
    ).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """pytest-xdist tells its workers how wide the terminal is."""
    monkeypatch.delenv("COLUMNS", raising=False)


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
    for path in (file, tmp_path):
        assert run(capsys, roberta, "--config", path)[1].count("/key/kernel") == 2
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
    assert "vLLM serves no LoRA on a model of type 'roberta': merge for it" in out
    assert f"peft:      peft.PeftModel.from_pretrained(model, '{tmp_path / 'lora'}')" in out
    for other in ("merged", "lora"):
        code, out, _ = command(capsys, "verify", base, tmp_path / other, "--adapter", adapter)
        assert code == 0
        assert out.startswith("pass: ")
        assert float(re.search(r"difference ([^,]+),", out)[1]) < 1e-5
    code, out, _ = command(capsys, "verify", base, base, "--adapter", adapter)
    assert code == 1
    assert out.startswith("fail: ")
    assert "(tolerance 0.0001, for float32; logits of shape (2, 3))" in out
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


def test_for_an_engine(folders, tmp_path, capsys):
    argv = ["to-lora", folders / "base", "--adapter", folders / "adapter", "--out", tmp_path / "out", "--for"]
    code, out, err = command(capsys, *argv, "llama.cpp")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "llama.cpp takes no saved modules beside a LoRA, and this adapter saves 'classifier.dense.bias'" in err
    assert f"merge it instead: peanut-jax merge {folders / 'base'} --adapter {folders / 'adapter'} --out DIR" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = command(capsys, *argv, "peft")
    assert (code, out.splitlines()[1:]) == (0, [f"peft.PeftModel.from_pretrained(model, '{tmp_path / 'out'}')"])
    with pytest.raises(SystemExit) as exit_info:
        main([str(arg) for arg in (*argv, "tgi")])
    assert exit_info.value.code == 2


def differences(**fields):
    return lambda *args, **kwargs: Difference(**{"largest": 1e-3, "scale": 1.0, "shape": (2, 3), **fields})


@pytest.mark.parametrize(
    ("found", "flags", "code", "said"),
    [
        (differences(), [], 1, "fail: largest logit difference 0.001"),
        (differences(dtype="float16"), [], 0, "(tolerance 0.0025, for float16;"),
        (differences(largest=0.01, dtype="bfloat16"), [], 0, "(tolerance 0.02, for bfloat16;"),
        (differences(), ["--tolerance", "0.001"], 0, "(tolerance 0.001, as given;"),
        (differences(), ["--tolerance", "0"], 1, "fail: "),
        (differences(scale=0.0), [], 1, "fail: "),
        (
            differences(largest=math.nan, broken=("OTHER",)),
            ["--tolerance", "1e9"],
            1,
            "fail: logits of OTHER are not fin",
        ),
        (
            differences(largest=math.nan, broken=("BASE with the adapter", "OTHER")),
            [],
            1,
            "adapter and of OTHER are not",
        ),
    ],
)
def test_verify_passes_or_fails(folders, monkeypatch, capsys, found, flags, code, said):
    monkeypatch.setattr(exporting, "compare", found)
    argv = ("verify", folders / "base", folders / "base", "--adapter", folders / "adapter", *flags)
    got, out, _ = command(capsys, *argv)
    assert got == code
    assert said in out


@pytest.mark.parametrize("value", ["nan", "-1", "inf", "x"])
def test_a_tolerance_is_a_number_of_at_least_0(value, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["verify", "base", "other", "--adapter", "adapter", "--tolerance", value])
    assert exit_info.value.code == 2
    assert "must be a number of at least 0" in capsys.readouterr().err


def test_the_coarsest_dtype_sets_the_tolerance(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert _coarsest(None, tmp_path) == _coarsest("float64", tmp_path) == "float32"
    assert _coarsest("bfloat16", tmp_path) == "bfloat16"
    save_file({"a": np.zeros(2, np.float16)}, tmp_path / "other.safetensors")
    assert _coarsest(None, tmp_path) == "float16"
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "last.safetensors", metadata={DTYPE_KEY: "bfloat16"})
    assert _coarsest(None, tmp_path) == "bfloat16"


def test_logits_that_are_not_finite_fail(folders, tmp_path):
    shutil.copytree(folders / "base", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.dense.bias"][:] = 100  # behind which tanh is 1
    tensors["classifier.out_proj.weight"][1] = 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    found = compare(folders / "base", tmp_path / "broken", folders / "adapter")
    assert found.broken == ("OTHER",)
    assert not found.within(1e9)


# ---- what a terminal and a pipe show


def test_80_columns_show_the_ends_of_paths(roberta, folders, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, roberta, "--r", "4", "--target-modules", "query", "value")
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("layer/1/attention/self/query/kernel") == out.count("layer/1/attention/self/value/kernel") == 1
    assert "\N{HORIZONTAL ELLIPSIS}" in out
    monkeypatch.setenv("COLUMNS", "56")
    _, out, _ = run(capsys, folders / "adapter")
    table = [line for line in out.splitlines() if line.startswith("\N{BOX DRAWINGS LIGHT VERTICAL}")]
    assert max(map(len, table)) <= 56
    assert sum("self.query " in line for line in table) == sum("self.value " in line for line in table) == 2
    assert sum("bias (saved) " in line for line in table) == 2


def test_a_pipe_shows_whole_paths(capsys):
    path = "layers/" * 40 + "kernel"
    print_table(path_table(("kernel", "shape"), [(path, "1 x 1")], ("1 row", ""), "title"))
    assert path in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (in_bytes(0), "0 B"),
        (in_bytes(512), "512 B"),
        (in_bytes(39_040), "39.04 kB"),
        (in_bytes(2_210_000_000), "2.210 GB"),
        (in_bytes(94_248_000_000), "94.25 GB"),
        (in_bytes(3.2e15), "3,200 TB"),
        (in_seconds(0.0000123), "12.3 us"),
        (in_seconds(0.0123), "12.30 ms"),
        (in_seconds(83.4), "83.40 s"),
        (in_seconds(1e-9), "0.001 us"),
        (in_flops(4_833_000), "4.833 M"),
        (in_flops(12), "12"),
    ],
)
def test_units_by_size(text, wanted):
    assert text == wanted


@contextlib.contextmanager
def closed_pipe(monkeypatch):
    """stdout as `| head` leaves it behind."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield stream


def test_a_pipe_that_nobody_reads(roberta, monkeypatch, capsys):
    with closed_pipe(monkeypatch) as stream:
        assert main(["inspect", str(roberta), "--target-modules", "query"]) == 141
        print("what Python still flushes as it exits", file=stream, flush=True)
    assert capsys.readouterr().err == ""


def test_help_for_a_pipe_that_nobody_reads(monkeypatch, capsys):
    with closed_pipe(monkeypatch) as stream:
        assert main(["to-lora", "--help"]) == 141
        print("what Python still flushes as it exits", file=stream, flush=True)
    assert capsys.readouterr().err == ""


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert (exit_info.value.code, capsys.readouterr().out) == (0, f"peanut-jax {pj.__version__}\n")


# ---- errors


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["inspect", "./absent"], "'./absent' does not exist; give the path of a folder that does"),
        (["inspect", "{tmp}/absent"], "absent' does not exist"),
        (["inspect", "runs/absent/adapter"], "'runs/absent/adapter' does not exist; give the path"),
        (["inspect", "~/absent"], "'~/absent' does not exist; write the whole path"),
        (["inspect", "a b"], "'a b' does not exist here, and cannot be a hub name"),
        (["inspect", "absent/name"], "'absent/name' is not a folder here, "),
        (["inspect", "{base}/config.json"], "config.json' is a file; give the folder that holds it"),
        (["inspect", "{tmp}"], "a folder that save_pretrained wrote, or a hub name. This one is empty"),
        (
            ["inspect", "{base}", "--config", "absent.json"],
            "--config 'absent.json' does not exist; give an adapter_config.json",
        ),
        (
            ["inspect", "{base}", "--config", "{base}"],
            "base' has no adapter_config.json; give an adapter_config.json, or",
        ),
        (["inspect", "{base}", "--config", "{base}/config.json"], "config.json: peft_type must be one of"),
        (
            ["plan", "--config-json", "x/y/z", "--mesh", "data=1", "--batch", "1", "--seq", "1"],
            "'x/y/z' does not exist",
        ),
        (["merge", "{adapter}", "--adapter", "{adapter}", "--out", "{tmp}/o"], "a model is needed here: give the base"),
        (["merge", "{base}", "--adapter", "{base}", "--out", "{tmp}/o"], "holds a model, not an adapter; --adapter"),
        (["merge", "{base}", "--adapter", "{tmp}", "--out", "{tmp}/o"], "is an empty folder; --adapter takes"),
        (["merge", "{base}", "--adapter", "{base}/..", "--out", "{tmp}/o"], "adapter' has one; give that folder"),
        (["merge", "{base}", "--adapter", "{config}", "--out", "{tmp}/o"], "is a file; give the folder that holds it"),
        (["merge", "{base}", "--adapter", "{adapter}", "--out", "{base}"], "must lie apart"),
        (["to-lora", "{base}", "--adapter", "./absent", "--out", "{tmp}/o"], "'./absent' does not exist"),
        (
            ["to-lora", "{base}", "--adapter", "{adapter}", "--out", "{config}/o"],
            "is a file, so that no folder can be made in it",
        ),
        (["verify", "{base}", "{tmp}", "--adapter", "{adapter}"], "OTHER, where it is not a merged checkpoint, takes"),
        (["verify", "{base}", "./absent", "--adapter", "{adapter}"], "'./absent' does not exist"),
        (["verify", "{base}", "{base}", "--adapter", "{base}"], "holds a model, not an adapter"),
    ],
)
def test_the_wrong_folder(folders, tmp_path, capsys, argv, said):
    names = {"base": folders / "base", "adapter": folders / "adapter", "tmp": tmp_path, "config": folders / "file"}
    names["config"].touch()
    code, out, err = command(capsys, *(word.format(**names) for word in argv))
    assert (code, out) == (2 if argv[0] == "verify" else 1, "")
    assert said in err
    assert err.count("\n") == 1
    assert len(err) <= 501
    assert "save_pretrained(folder)" not in err


def test_half_an_adapter(folders, tmp_path, capsys):
    shutil.copyfile(folders / "adapter" / "adapter_config.json", tmp_path / "adapter_config.json")
    assert "is half an adapter; copy it there too" in run(capsys, tmp_path)[2]
    (tmp_path / "adapter_model.bin").touch()
    assert "adapter_model.bin is a pickle file, which can run code and is not read: load" in run(capsys, tmp_path)[2]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (PermissionError(13, "Permission denied", "/a/b"), 1, "/a/b: Permission denied"),
        (ValueError("two\nlines"), 1, "two lines"),
        (ValueError("begin " + "x" * 10_000 + " end"), 1, " ... "),
    ],
)
def test_an_error_is_one_short_line(monkeypatch, capsys, error, code, said):
    def merge_folders(*args, **kwargs):
        raise error

    monkeypatch.setattr(exporting, "merge_folders", merge_folders)
    got, _, err = command(capsys, "merge", "base", "--adapter", "adapter", "--out", "out")
    assert (got, err.count("\n")) == (code, 1)
    assert said in err
    assert len(err) <= 501


@pytest.mark.parametrize("mesh", ["fsdp=100000", "data=64,fsdp=64,tensor=2"])
def test_a_mesh_that_is_too_large_is_refused_at_once(capsys, mesh):
    """Before the model's config is looked for, let alone a device made."""
    assert main(["plan", "--config-json", "absent", "--mesh", mesh, "--batch", "1", "--seq", "1"]) == 1
    assert "devices and plan takes at most 2,048" in capsys.readouterr().err
