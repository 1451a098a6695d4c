"""Training runs from start to end, in this process: what they leave, how they stop, and that a resume is exact."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peanut_jax as pj
from peanut_jax.models.loading import load_decoder
from peanut_jax.sharding import make_mesh
from peanut_jax.trainer import Optimizer, Run, loop, train
from peanut_jax.trainer.data import batches
from peanut_jax.trainer.loop import Outcome
from peanut_jax.trainer.metrics_file import read_metrics
from peanut_jax.trainer.programs import compile_programs, first_state
from peanut_jax.trainer.recorder import Recorder

ADAPTER = "adapter/adapter_model.safetensors"


def changed(run: Run, **fields) -> Run:
    """The run with `part__field=value`."""
    for name, value in fields.items():
        part, _, field = name.partition("__")
        new = dataclasses.replace(getattr(run, part), **{field: value}) if field else value
        run = dataclasses.replace(run, **{part: new})
    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(run, folder) == Outcome(8, 8)
    return folder


def test_what_a_run_leaves(run, whole, tiny):
    losses = {row["step"]: row["train/loss"] for row in read_metrics(whole) if "train/loss" in row}
    assert list(losses) == [2, 3, 4, 6, 8]  # every second step, and before a checkpoint
    evaluations = [row for row in read_metrics(whole) if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8]
    assert evaluations[1]["eval/loss"] < evaluations[0]["eval/loss"]
    assert {"train/input_wait", "train/per_second", "train/grad_norm", "train/learning_rate"} <= set(
        read_metrics(whole)[0]
    )
    assert (whole / "curves.png").stat().st_size > 10_000
    described = json.loads((whole / "run.json").read_text())
    assert described["config"] == run.as_json()
    assert described["config"]["adapter"]["kind"] == "PeanutConfig"
    assert sorted(path.name for path in (whole / "checkpoints").iterdir() if path.is_dir()) == ["6", "8"]

    model, params = load_decoder(tiny / "model", "float32")
    adapters, config = pj.load_adapter(whole / "adapter", params)
    assert (config.r, config.depth) == (4, 1)
    # The evaluation of the loop is the loss of the merged model over the whole file.
    merged = pj.merge(params, adapters, config)
    rows = run.task.build(make_mesh("data=8"), None, 0).evaluation
    packed = [rows[i] for i in range(len(rows))]
    total, weight = model.apply(
        merged, *(np.stack([row[name] for row in packed]) for name in ("tokens", "labels", "weights")),
        segments=np.stack([row["segments"] for row in packed]), method="loss",
    )  # fmt: skip
    assert len(packed) % run.loop.batch_size, "the last batch is filled up with rows that do not count"
    np.testing.assert_allclose(evaluations[1]["eval/loss"], total / weight, rtol=1e-5)
    assert_identical(whole, load_file(whole / "best/adapter_model.safetensors"))


def assert_identical(folder, want):
    """The adapter of a run's folder, bit for bit that of another folder or those tensors."""
    got, want = load_file(folder / ADAPTER), want if isinstance(want, dict) else load_file(want / ADAPTER)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)


@pytest.fixture
def signalled(monkeypatch):
    """`signalled(step, signal)`: sends this process a signal once metrics of that step are written."""

    def arm(step, number=signal.SIGTERM):
        log = Recorder.log

        def log_and_signal(self, at, metrics):
            log(self, at, metrics)
            if at == step and "train/loss" in metrics:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Recorder, "log", log_and_signal)

    return arm


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.large)])
def test_a_signal_saves_and_a_resume_is_exact(run, whole, tmp_path, signalled, monkeypatch, number):
    signalled(4, number)
    folder = tmp_path / "run"
    before = signal.getsignal(number)
    outcome = train(run, folder)
    assert outcome == Outcome(5, 8, signal=signal.Signals(number).name)  # step 5 was on its way
    assert signal.getsignal(number) == before
    assert not (folder / "adapter").exists()
    monkeypatch.undo()
    assert train(run, folder, resume=True) == Outcome(8, 8)
    assert_identical(folder, whole)
    assert [row["step"] for row in read_metrics(folder)] == [2, 3, 4, 4, 5, 6, 8, 8]
    resumed = json.loads((folder / "run.json").read_text())["resumed"]
    assert [entry["step"] for entry in resumed] == [5]


def test_a_resume_on_another_mesh(run, whole, tmp_path, signalled, monkeypatch):
    """Saved on eight data devices, resumed on three axes, with rules of the config's own."""
    signalled(4)
    folder = tmp_path / "run"
    train(run, folder)
    monkeypatch.undo()
    other = changed(
        run, mesh="data=2,fsdp=2,tensor=2", rules=((r".*q_proj/kernel", jax.P(None, "tensor")), (".*", jax.P()))
    )
    train(other, folder, resume=True)
    want = load_file(whole / ADAPTER)
    for name, tensor in load_file(folder / ADAPTER).items():
        assert np.linalg.norm(tensor - want[name]) <= 1e-5 * np.linalg.norm(want[name]), name


def test_programs_are_shared_by_runs_of_other_seeds(run, whole, tmp_path):
    """Compiled for seed 1 they train seed 0 as its own would; a run that differs in more is refused."""
    other = changed(run, loop__seed=1)
    task = run.task.build(make_mesh(run.mesh), run.rules, 0)
    programs = compile_programs(other, task, first_state(other, task))
    assert train(run, tmp_path / "run", task=task, programs=programs, quiet=True) == Outcome(8, 8)
    assert_identical(tmp_path / "run", whole)
    with pytest.raises(ValueError, match="the programs were compiled for another adapter, optimizer"):
        train(changed(run, adapter__r=2, optimizer__b1=0.5), tmp_path / "other", task=task, programs=programs)


def test_a_resume_of_a_complete_run_changes_nothing(run, whole):
    before = load_file(whole / ADAPTER)
    assert train(run, whole, resume=True) == Outcome(8, 8)
    assert_identical(whole, before)
    assert len(read_metrics(whole)) == 7


def test_a_damaged_checkpoint_costs_its_steps_alone(run, whole, tmp_path, signalled, monkeypatch, caplog):
    signalled(6)
    folder = tmp_path / "run"
    train(run, folder)
    monkeypatch.undo()
    newest = folder / "checkpoints" / "7"
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    train(run, folder, resume=True)
    assert "checkpoint of step 7" in caplog.text
    assert "step 6 is used instead" in caplog.text
    assert_identical(folder, whole)


def test_a_resume_with_another_config(run, whole):
    """Every field is named, before the model is loaded."""
    other = changed(run, adapter__r=2, optimizer__learning_rate=0.5, task__model="absent")
    with pytest.raises(ValueError, match="holds another run") as error:
        train(other, whole, resume=True)
    for difference in ("config.adapter.r: 4, 2", "config.optimizer.learning_rate: 0.02, 0.5", "config.task.model: "):
        assert difference in str(error.value)


def test_a_run_that_saved_nothing_may_start_with_another_config(run, tmp_path, poisoned, monkeypatch):
    """It failed before its first checkpoint: run.json tells of the config that trains."""
    folder = tmp_path / "deep" / "run"
    for name in ("model", "train"):
        with pytest.raises(FileNotFoundError, match="absent"):
            train(changed(run, **{f"task__{name}": "absent.jsonl"}), folder)
        assert not folder.parent.exists()
    poisoned({0})
    with pytest.raises(ValueError, match="there is no checkpoint yet"):
        train(run, folder)
    monkeypatch.undo()
    other = changed(run, adapter__r=2)
    assert train(other, folder, resume=True) == Outcome(8, 8)
    assert json.loads((folder / "run.json").read_text())["config"]["adapter"]["r"] == 2


def test_fields_that_may_change(run, whole):
    loop_changes = {
        "loop__save_every": 1,
        "loop__log_every": 7,
        "loop__eval_every": 2,
        "loop__keep_last": 5,
        "loop__nonfinite": "skip",
    }
    assert train(changed(run, **loop_changes), whole, resume=True) == Outcome(8, 8)


def test_a_resume_with_other_data(run, whole, tiny):
    data = tiny / "train.jsonl"
    kept = data.read_text()
    try:
        data.write_text("\n".join(kept.splitlines()[::-1]) + "\n")
        with pytest.raises(ValueError, match=r"data\.train\.digest"):
            train(run, whole, resume=True)
    finally:
        data.write_text(kept)


@pytest.mark.parametrize(
    "module",
    ["layers.1.self_attn.q_proj", "embed_tokens"]
    + [pytest.param(name, marks=pytest.mark.large) for name in ("layers.0.self_attn.o_proj", "norm")],
)
def test_a_resume_with_another_base(run, whole, tiny, module):
    """The same path, with other weights in it, of adapted kernels and of what is not adapted."""
    model = tiny / "model" / "model.safetensors"
    kept = model.read_bytes()
    try:
        tensors = load_file(model)
        tensors[f"model.{module}.weight"].reshape(-1)[5] += 1e-3
        save_file(tensors, model, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"base: 1 of \d+ parameters differ, the first 'model\.{module}\."):
            train(run, whole, resume=True)
    finally:
        model.write_bytes(kept)


@pytest.fixture
def poisoned(monkeypatch):
    """`poisoned(numbers)`: the batches of these numbers get a NaN."""

    def arm(numbers):
        def batches_with_nan(*args, **options):
            for i, batch in enumerate(batches(*args, **options)):
                yield {**batch, "weights": batch["weights"] * np.nan} if i in numbers else batch

        monkeypatch.setattr(loop, "batches", batches_with_nan)

    return arm


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path, poisoned):
    poisoned({4})
    folder = tmp_path / "run"
    with pytest.raises(
        ValueError, match=r"step 5: loss nan, .*the worst leaf is 'model/layers/.*checkpoint is of step 4"
    ):
        train(run, folder)
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()) == 4


@pytest.mark.large
def test_steps_that_are_not_finite_can_be_skipped(run, tmp_path, poisoned):
    """The adapters are left as they are; too many in a row end the run."""
    skipping = changed(run, loop__nonfinite="skip", loop__max_skipped=2, loop__log_every=1)
    poisoned({2, 4})
    folder = tmp_path / "run"
    train(skipping, folder)
    losses = [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]
    assert [i for i, loss in enumerate(losses) if np.isnan(loss)] == [2, 4]
    assert all(np.isfinite(tensor).all() for tensor in load_file(folder / ADAPTER).values())
    poisoned({2, 3, 4})
    with pytest.raises(ValueError, match=r"step 5: .* 3 such in a row"):
        train(skipping, tmp_path / "other")


def test_patience(run, tmp_path):
    """With a rate of almost nothing no evaluation is better than the first; a resume does not go on."""
    still = changed(
        run, optimizer=Optimizer(learning_rate=1e-30, schedule="constant"), loop__eval_every=1, loop__patience=2
    )
    folder = tmp_path / "run"
    assert train(still, folder) == Outcome(3, 8, early=True)
    assert train(still, folder, resume=True) == Outcome(3, 8, early=True)


def test_data_that_ends_early(run, tmp_path, monkeypatch):
    real = loop.batches
    monkeypatch.setattr(loop, "batches", lambda *args, stop, **options: real(*args, stop=5, **options))
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="the data ended after step 5 of 8; the checkpoint of that step is saved"):
        train(run, folder)
    assert (folder / "checkpoints" / "5").is_dir()
