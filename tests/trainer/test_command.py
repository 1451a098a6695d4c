"""`python -m train` and `peanut-jax train`: one line for each error, and what is missing."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from peanut_jax import cli
from peanut_jax.trainer import distributed, extras
from peanut_jax.trainer.command import main


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """What JAX says on a machine of its own; in this process it would say that devices were used before."""

    def initialize(*args, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "loop.batch_size=6"], "a batch of 6 rows does not divide over 8 data shards"),
        (
            ["--set", "loop.accumulate_steps=2"],
            "a batch of 8 rows does not divide over 8 data shards and 2 microbatches",
        ),
        (["--set", "mesh=data=16"], "16 places and there are 8 devices"),
        (["--set", "mesh=fsdp=100000"], "100000 places and there are 8 devices"),
        (["--set", "mesh=fsdp=" + "9" * 5000], "mesh must be like data=2,fsdp=2,tensor=2"),
        (["--set", "task.train=no/such:train"], "no/such:train cannot be read"),
        (["--set", "loop.stepz=3"], "--set takes a field of the config"),
        (["--set", "loop.steps=0"], "loop.steps must be an integer of at least 1, got 0"),
        (["--set", "loop.epochs=2", "--set", "loop.steps=8"], "give one of loop.steps and loop.epochs, got 8 and 2"),
        (["--set", "loop.steps=null"], "give one of loop.steps and loop.epochs, got None and None"),
        (["--set", "loop.best=accuracy"], "loop.best must be one of loss, got 'accuracy'"),
        (["--set", "optimizer.schedule=step"], "optimizer.schedule must be one of cosine, linear, constant"),
        (["--set", "task.train=absent.jsonl"], "there is no data file absent.jsonl"),
        (["--set", "task.prompt=number"], "column 'number' of"),
        (["--set", "task.prompt=query"], "has no column 'query', only question, answer, number"),
        (["--set", "task.seq_len=2"], "no example leaves room for its response in a row of 2"),
        (["--set", "task.evaluation=null", "--set", "loop.patience=2"], "loop.patience=2 needs task.evaluation"),
        (["--set", "optimizer.warmup_steps=8"], "optimizer.warmup_steps=8 must be below the 8 steps"),
        (["--set", "optimizer.b1=2"], "optimizer.b1 must be a number of at least 0 and below 1, got 2"),
        (["--set", 'adapter={"r": 4}'], "--set takes a field of the config"),
        (["--resume"], "holds no run to resume"),
        (["--process-id", "1"], "go together"),
    ],
)
def test_errors_are_one_line(tiny, tmp_path, capsys, arguments, message):
    assert main([str(tiny / "config.py"), "--out", str(tmp_path / "run"), *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train: ")
    assert message in last
    assert len(last) <= 500
    assert not (tmp_path / "run").exists()


def test_a_config_file_must_be_named(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "run")]) == 1
    assert "name a config file, or with --resume the folder of a run" in capsys.readouterr().err.splitlines()[-1]
    assert main(["--out", str(tmp_path / "run"), "--resume"]) == 1
    assert "run holds no run to resume" in capsys.readouterr().err.splitlines()[-1]


def test_peanut_jax_train_is_the_same_command(tiny, tmp_path, capsys):
    arguments = [str(tiny / "config.py"), "--out", str(tmp_path / "run"), "--set", "loop.steps=2"]
    changes = ["--set", "optimizer.warmup_steps=0", "--set", "optimizer.saved_learning_rate=0.1"]
    assert cli.main(["train", *arguments, *changes]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"train: {tmp_path / 'run'} is complete after step 2"
    assert cli.main(["train", *arguments]) == 1
    assert "holds a run; pass --resume" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_not_installed_is_named(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extras, "PACKAGES", ("filelock", "no_such_package"))
    assert main([str(tiny / "config.py"), "--out", str(tmp_path / "run")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "train: training needs no_such_package: pip install 'peanut-jax[train]'"
    assert not (tmp_path / "run").exists()


def test_a_config_needs_no_extra():
    """With them blocked a config can be imported and read; training says what it needs."""
    code = (
        "import contextlib, sys\n"
        "extras = 'grain', 'matplotlib', 'tensorboardX'\n"
        "sys.modules.update(dict.fromkeys((*extras, 'datasets', 'filelock', 'transformers', 'sklearn')))\n"
        "from peanut_jax.trainer import command\n"
        "with contextlib.suppress(SystemExit): command.main(['--help'])\n"
        "for name in ('datasets', 'filelock', 'transformers', 'sklearn'): del sys.modules[name]\n"
        "from peanut_jax.trainer import Classification, LanguageModelling, Loop, Optimizer, Run, read\n"
        "from peanut_jax.trainer.command import main\n"
        "sys.exit(main(['config.py', '--out', 'run']))"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "--coordinator HOST:PORT" in found.stdout
    line = found.stderr.splitlines()[-1]
    assert line == "train: training needs grain, matplotlib, tensorboardX: pip install 'peanut-jax[train]'"
    assert found.returncode == 1


def test_a_long_error_is_cut_to_a_line(tiny, tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise OSError("one\n  two " + "x" * 1000 + " three")

    monkeypatch.setattr(distributed, "start", fail)
    assert main([str(tiny / "config.py"), "--out", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train: one two xxx")
    assert last.endswith("xxx three")
    assert len(last) <= 500


def test_ctrl_c_before_the_first_step(tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(distributed, "start", interrupt)
    assert main([str(tiny / "config.py"), "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "train: interrupted before the first step; nothing was saved\n"
