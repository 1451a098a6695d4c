"""The remat policy of a run: the first whose step fits, written down, and taken again on the same devices."""

import dataclasses
import json
import types

import jax
import pytest

from peanut_jax.plan import DoesNotFit
from peanut_jax.sharding import make_mesh
from peanut_jax.trainer import remat, train
from peanut_jax.trainer.identity import check_config, kept_identity
from peanut_jax.trainer.remat import first_fitting, kept_policy

GB = 10**9
# What a step of each policy takes.
TAKES = {"none": 8 * GB, "dots": 4 * GB, "full": 2 * GB}


def compiled(temporary):
    memory = types.SimpleNamespace(
        temp_size_in_bytes=temporary, output_size_in_bytes=5 * GB, alias_size_in_bytes=5 * GB,
        generated_code_size_in_bytes=0, argument_size_in_bytes=9 * GB,
    )  # fmt: skip
    return types.SimpleNamespace(memory_analysis=lambda: memory)


@pytest.mark.parametrize(
    ("free", "policy", "tried"),
    [
        (9 * GB, "none", ["none"]),
        (8 * GB, "dots", ["none", "dots"]),  # a tenth stays free
        (3 * GB, "full", ["none", "dots", "full"]),
        (1 * GB, "full", ["none", "dots", "full"]),
        (None, "full", ["full"]),
    ],
)
def test_the_first_policy_that_fits(monkeypatch, free, policy, tried):
    monkeypatch.setattr(remat, "free_memory", lambda device: free)
    seen = []
    found = first_fitting(
        {name: name for name in TAKES}, lambda name: seen.append(name) or compiled(TAKES[name]), make_mesh("data=8")
    )
    assert (found.policy, seen) == (policy, tried)
    assert ("may run out" in found.reason) == (free == GB)


def test_a_compiler_that_finds_a_step_too_large(monkeypatch):
    monkeypatch.setattr(remat, "free_memory", lambda device: 9 * GB)

    def refuse(name):
        if name in large:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: HLO temporaries (19.87G) exceeds available HBM (15.75G)."
            )
        return compiled(GB)

    large = ["none"]
    assert first_fitting({name: name for name in TAKES}, refuse, make_mesh("data=8")).policy == "dots"
    large = list(TAKES)
    with pytest.raises(DoesNotFit, match=r"need 21\.34 GB, and a device has 16\.91 GB"):
        first_fitting({name: name for name in TAKES}, refuse, make_mesh("data=8"))


@pytest.mark.large
def test_a_run_keeps_its_policy(run, tmp_path, monkeypatch, capsys):
    """Through a resume on the same devices, whatever is free there then; naming another makes no other run."""
    task = dataclasses.replace(run.task, remat="auto")
    loop = dataclasses.replace(run.loop, steps=2, save_every=1, eval_every=None, batch_size=8)
    optimizer = dataclasses.replace(run.optimizer, warmup_steps=0, schedule="constant")
    run = dataclasses.replace(run, task=task, loop=loop, optimizer=optimizer)
    train(run, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["remat"]
    assert kept == {"policy": "none", "device": "cpu", "devices": 8, "mesh": "data=-1"}
    shown = capsys.readouterr().err
    assert "train: remat none: a step needs 0.00" in shown
    monkeypatch.setattr(remat, "free_memory", lambda device: 1)
    longer = dataclasses.replace(run, loop=dataclasses.replace(loop, steps=3))
    train(longer, tmp_path / "run", resume=True)
    assert "train: remat none: as before on these devices" in capsys.readouterr().err

    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "remat": {**content["remat"], "device": "TPU v4"}}))
    assert kept_policy(tmp_path / "run", run) is None
    there = kept_identity(tmp_path / "run")
    check_config(there, dataclasses.replace(run, task=dataclasses.replace(task, remat="dots")), tmp_path)
    with pytest.raises(ValueError, match="seq_len"):
        check_config(there, dataclasses.replace(run, task=dataclasses.replace(task, seq_len=8)), tmp_path)
