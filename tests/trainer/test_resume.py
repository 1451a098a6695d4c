"""Resumes: what a run began with is kept, what changed is named, and damaged files beside checkpoints stop none."""

import json
import shutil

import numpy as np
import pytest

import peanut_jax as pj
from peanut_jax.sharding import make_mesh
from peanut_jax.trainer import curves, distributed, loop, read
from peanut_jax.trainer.command import main
from peanut_jax.trainer.identity import kept_identity
from peanut_jax.trainer.metrics_file import read_metrics
from peanut_jax.trainer.rows import earlier_identity

CONFIG = """
import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np

import peanut_jax as pj
from peanut_jax.sharding import shard
from peanut_jax.trainer import Loop, Optimizer, Run
from peanut_jax.trainer.tasks.base import Task


class Points:
    def __init__(self, path):
        self.values = json.loads(Path(path).read_text())

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        x = np.sin(np.arange(4) + self.values[i]).astype(np.float32)
        return {"x": x, "y": x[::-1] * 2, "weights": np.ones((), np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    METRICS: ClassVar[tuple[str, ...]] = ("loss",)
    SOURCES: ClassVar[tuple[str, ...]] = ("train", "evaluation")

    model: str
    train: str
    evaluation: str | None = None
    scale: float = 1.0

    def check(self, adapter):
        pass

    def build(self, mesh, rules, seed):
        model = nn.Dense(4)
        params = shard({"params": dict(np.load(self.model))}, mesh, [(".*", jax.P())])

        def sums(params, batch):
            error = ((model.apply(params, batch["x"]) - batch["y"]) ** 2).mean(-1) * batch["weights"]
            return {"loss": error.sum() * self.scale, "weight": batch["weights"].sum()}

        def loss_fn(params, batch, key):
            found = sums(params, batch)
            return found["loss"] / found["weight"], {"weight": found["weight"]}

        rows = Points(self.evaluation) if self.evaluation else None
        return Task(params, loss_fn, sums, Points(self.train), rows, "points", lambda batch: batch["weights"].size)


config = Run(
    task=Regression(model="FOLDER/base.npz", train="FOLDER/train.json"),
    adapter=pj.LoraConfig(r=2, target_modules="all-linear"),
    optimizer=Optimizer(learning_rate=0.1, schedule="constant"),
    loop=Loop(epochs=4, batch_size=8, log_every=2, save_every=2),
)
"""
BEGUN = ["--set", "loop.steps=4", "--set", "task.scale=0.5", "--set", "loop.log_every=1"]


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """No cluster is looked for, which must come before JAX is used; and pictures are drawn in another file's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "start", lambda *_: None)
        patch.setattr(loop, "plot_curves", read_metrics)
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a config, its base and data, and `run`: four steps with the changes of `BEGUN`."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "config.py").write_text(CONFIG.replace("FOLDER", str(folder)))
    draw = np.random.default_rng(0)
    leaves = {"kernel": draw.normal(size=(4, 4)), "bias": draw.normal(size=4)}
    np.savez(folder / "base.npz", **{name: leaf.astype(np.float32) for name, leaf in leaves.items()})
    (folder / "train.json").write_text(json.dumps(list(range(24))))
    assert main([str(folder / "config.py"), "--out", str(folder / "run"), *BEGUN]) == 0
    return folder


@pytest.fixture
def copy(begun, tmp_path):
    """A copy of it to change; its config names the files of the copy."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    for name in ("config.py", "run/run.json", "run/.run.json.copy", "run/checkpoints/about.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace(str(begun), str(tmp_path)))
    return tmp_path


@pytest.fixture
def resume(copy, capsys):
    """`resume(*arguments)`: (exit code, what it said)."""

    def call(*arguments, config=False):
        named = [str(copy / "config.py")] if config else []
        capsys.readouterr()
        code = main([*named, "--out", str(copy / "run"), "--resume", *arguments])
        return code, capsys.readouterr().err

    return call


def described(copy):
    return json.loads((copy / "run" / "run.json").read_text())


def test_what_a_run_began_with_needs_not_be_said_again(copy, resume):
    code, told = resume()
    assert code == 0, told
    assert told.splitlines()[-1].endswith("is complete after step 4")
    assert "note" not in told
    config = described(copy)["config"]
    assert (config["loop"]["steps"], config["loop"]["epochs"], config["task"]["scale"]) == (4, None, 0.5)


def test_more_steps_and_other_safe_changes(copy, resume):
    """They are kept for the next resume, with those of the start."""
    safe = ["loop.steps=6", "loop.save_every=1", "loop.keep_last=3", "loop.eval_every=2", "mesh=data=4,fsdp=2"]
    code, told = resume(*(word for change in safe for word in ("--set", change)))
    assert code == 0, told
    assert "complete after step 6" in told
    assert [row["step"] for row in read_metrics(copy / "run")] == [1, 2, 3, 4, 5, 6]
    code, told = resume()
    assert code == 0, told
    assert "complete after step 6" in told
    config = described(copy)["config"]
    assert (config["loop"]["steps"], config["loop"]["keep_last"], config["mesh"]) == (6, 3, "data=4,fsdp=2")
    assert config["task"]["scale"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loop.steps=3"], "step 4 is taken already, and the run is to have 3"),
        (["loop.batch_size=16"], "config.loop.batch_size: 8, 16"),
        (["task.scale=2"], "config.task.scale: 0.5, 2"),
        (
            ["adapter.r=3", "optimizer.learning_rate=1"],
            "config.adapter.r: 2, 3; config.optimizer.learning_rate: 0.1, 1",
        ),
        (["optimizer.schedule=cosine"], 'config.optimizer.schedule: "constant", "cosine"'),
    ],
)
def test_other_changes_are_refused_by_name(copy, resume, changes, message):
    before = described(copy)
    code, told = resume(*(word for change in changes for word in ("--set", change)))
    assert code == 1
    assert message in told.splitlines()[-1]
    assert len(told.splitlines()[-1]) <= 500
    assert described(copy) == before


def test_more_steps_of_a_schedule_that_spans_them_are_told(copy, resume):
    """As if the run had begun with a cosine, also as an earlier version kept it."""
    for name in ("run.json", "checkpoints/about.json"):
        path = copy / "run" / name
        path.write_text(path.read_text().replace('"constant"', '"cosine"'))
    about = json.loads((copy / "run/checkpoints/about.json").read_text())
    about["config"]["loop"] |= {"steps": 4, "epochs": None}
    (copy / "run/checkpoints/about.json").write_text(json.dumps(about))
    code, told = resume("--set", "optimizer.schedule=cosine", "--set", "loop.steps=6")
    assert code == 0, told
    assert (
        "the run began with loop.steps=4 and epochs=None and now has steps=6 and epochs=None: after step 4 the" in told
    )
    rates = [row["train/learning_rate"] for row in read_metrics(copy / "run")]
    assert rates[4:] == [pytest.approx(0.05 * (1 + np.cos(np.pi * step / 6)), rel=1e-5) for step in (4, 5)]
    code, told = resume()
    assert code == 0, told
    assert "began with" not in told


def test_edits_of_the_config_file(copy, resume):
    """One that is safe holds, one that a change of the start hides is told, and another is refused."""
    path = copy / "config.py"
    plain = path.read_text()
    edits = {"save_every=2": "save_every=1", "log_every=2": "log_every=3", "epochs=4": "epochs=5"}
    for old, new in edits.items():
        path.write_text(path.read_text().replace(old, new))
    code, told = resume()
    assert code == 0, told
    fields = described(copy)["config"]["loop"]
    assert (fields["save_every"], fields["log_every"], fields["steps"]) == (1, 1, 4)
    assert "config.py now has loop.log_every=3, and had 2 when the run began; the run goes on with --set " in told
    assert (
        "config.py now has loop.epochs=5, and had 4 when the run began; the run goes on with --set loop.steps" in told
    )
    path.write_text(plain.replace("r=2", "r=3"))
    code, told = resume()
    assert code == 1
    assert "config.adapter.r: 2, 3" in told
    path.unlink()
    code, told = resume()
    assert code == 1
    assert "there is no config file" in told


def test_moved_data_are_the_same_and_edited_ones_are_refused(copy, resume):
    moved, data = copy / "moved.json", copy / "train.json"
    data.rename(moved)
    code, told = resume("--set", f"task.train={moved}")
    assert code == 0, told
    code, told = resume()
    assert code == 0, told
    values = json.loads(moved.read_text())
    moved.write_text(json.dumps([*values[:5], 99, *values[6:]]))
    code, told = resume()
    assert code == 1
    assert "holds another run (there, here): data.train.digest: " in told.splitlines()[-1]
    moved.write_text(json.dumps(values[:-1]))
    code, told = resume()
    assert "data.train.rows: 24, 23; data.train.digest: " in told.splitlines()[-1]
    moved.write_text(json.dumps(values))
    code, told = resume("--set", f"task.evaluation={moved}")
    assert code == 1
    assert "config.task.evaluation: null, " in told.splitlines()[-1]


@pytest.mark.parametrize("leaf", ["bias", "kernel"])
def test_a_changed_base_is_refused(copy, resume, leaf):
    """Adapted or not."""
    leaves = dict(np.load(copy / "base.npz"))
    leaves[leaf][1] *= -1
    np.savez(copy / "base.npz", **leaves)
    code, told = resume()
    assert code == 1
    assert f"base: 1 of 2 parameters differ, the first '{leaf}'" in told.splitlines()[-1]


DEEP = b'{"config": ' + b"[" * 100_000


def test_a_damaged_run_json_stops_no_resume(copy, resume):
    (copy / "run/run.json").write_bytes(DEEP)
    code, told = resume()
    assert code == 0, told
    assert "run.json is damaged, its copy is used" in told
    assert described(copy)["config"]["task"]["scale"] == 0.5


@pytest.mark.large
def test_without_its_copy_a_run_goes_on_from_what_is_beside_the_checkpoints(copy, resume):
    for name in ("run.json", ".run.json.copy"):
        (copy / "run" / name).write_bytes(DEEP)
    code, told = resume()
    assert code == 1
    assert "name the config file, and give its --set again" in told.splitlines()[-1]
    code, told = resume(config=True)
    assert code == 1
    assert "config.task.scale: 0.5, 1.0" in told.splitlines()[-1]
    code, told = resume(*BEGUN, config=True)
    assert code == 0, told
    assert "it is written anew" in told
    assert described(copy)["source"]["changes"] == BEGUN[1::2]


@pytest.mark.parametrize(
    "content", ["{", DEEP.decode(), "[]", "{}", '{"config": {}, "parameters": [], "data": {}}', None]
)
def test_a_damaged_about_json_is_replaced_by_what_run_json_says(copy, content, caplog):
    about = copy / "run/checkpoints/about.json"
    want = json.loads(about.read_text())
    about.unlink()
    if content is not None:
        about.write_text(content)
    assert kept_identity(copy / "run", tell=True) == want
    assert "about.json is damaged or missing; what run.json says is used instead" in caplog.text
    shutil.rmtree(copy / "run/checkpoints/4")
    shutil.rmtree(copy / "run/checkpoints/2")
    assert kept_identity(copy / "run") is None


def test_a_damaged_about_json_stops_no_resume(copy, resume):
    about = copy / "run/checkpoints/about.json"
    want = about.read_text()
    about.write_text(want[:99])
    code, told = resume("--set", "adapter.r=3")
    assert code == 1
    assert "config.adapter.r: 2, 3" in told
    assert about.read_text() == want[:99]
    code, told = resume()
    assert code == 0, told
    assert about.read_text() == want


def test_neither_says_what_the_checkpoints_are_of(copy, resume):
    for name in ("run.json", ".run.json.copy", "checkpoints/about.json"):
        (copy / "run" / name).write_bytes(DEEP)
    code, told = resume(*BEGUN, config=True)
    assert code == 1
    assert "restore one of the two from a backup, or start in another folder" in told.splitlines()[-1]


@pytest.mark.large
def test_damaged_metrics_stop_no_resume(copy, resume, monkeypatch):
    path = copy / "run/metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = b"\xff" + lines[1]
    monkeypatch.setattr(
        loop, "plot_curves", lambda folder: curves.plot_curves(folder / "checkpoints")
    )  # has no metrics
    path.write_bytes(b"\n".join([DEEP, *lines]))
    code, told = resume("--set", "loop.steps=5")
    assert code == 0, told
    assert "2 of 5 lines of " in told
    assert "no curves were drawn: " in told
    assert [row["step"] for row in read_metrics(copy / "run")] == [1, 3, 4, 5]
    assert (copy / "run/damaged-metrics.jsonl").read_bytes().startswith(DEEP)


def test_a_run_of_an_earlier_version_goes_on(copy, resume):
    """Its run.json and about.json as version 0.9 wrote them: another way to tell data, and no digest of the base."""
    changes = [word for word in BEGUN if word != "--set"]
    run = read(copy / "config.py", changes)
    task = run.task.build(make_mesh("data=8"), None, 0)
    earlier_data = {"train": earlier_identity(task.train)}
    about_path, run_path = copy / "run/checkpoints/about.json", copy / "run/run.json"
    config = {name: value for name, value in run.as_json().items() if name not in ("mesh", "rules")}
    for name in ("log_every", "save_every", "keep_last", "nonfinite", "max_skipped"):
        del config["loop"][name]
    old = {"config": config, "base": pj.fingerprint(task.params, run.adapter), "data": earlier_data}
    about_path.write_text(json.dumps(old))
    content = described(copy)
    run_path.write_text(json.dumps({name: content[name] for name in content if name not in ("source", "identity")}))
    (copy / "run/.run.json.copy").unlink()
    code, told = resume()
    assert code == 1
    assert "does not say with which config file and changes the run began" in told.splitlines()[-1]
    code, told = resume("--set", f"task.train={copy / 'run/../train.json'}", *BEGUN, config=True)
    assert code == 1
    assert "config.task.train: " in told.splitlines()[-1]
    code, told = resume(*BEGUN, config=True)
    assert code == 0, told
    assert "was begun by an earlier version, which kept less" in told
    code, told = resume()
    assert code == 0, told
    assert "earlier version" not in told
    assert "parameters" in json.loads(about_path.read_text())
