"""Which checkpoint counts as good: none of a streak of steps that are not finite, and none that began one."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peanut_jax as pj
from peanut_jax.run_checkpoint_keep import Keep
from peanut_jax.run_checkpoints import ABOUT, Checkpoints
from peanut_jax.sharding import make_mesh, shard
from peanut_jax.trainer import Loop, Optimizer, Run, loop, train
from peanut_jax.trainer.data import batches
from peanut_jax.trainer.guard import not_finite
from peanut_jax.trainer.loop import Outcome
from peanut_jax.trainer.programs import compile_programs, first_state
from peanut_jax.trainer.recorder import Recorder
from peanut_jax.trainer.tasks.base import Task
from tests.test_run_checkpoints import make_state
from tests.trainer.test_run import changed


@pytest.fixture
def poisoned(monkeypatch):
    """`poisoned(steps)`: the batches of these steps get a NaN, also after a resume."""

    def arm(steps):
        def batches_with_nan(*args, start, **options):
            for step, batch in enumerate(batches(*args, start=start, **options), start=start + 1):
                yield {**batch, "weights": batch["weights"] * np.nan} if step in steps else batch

        monkeypatch.setattr(loop, "batches", batches_with_nan)

    return arm


class Points:
    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = np.sin(np.arange(4) + i).astype(np.float32)
        return {"x": x, "y": x[::-1] * 2, "weights": np.ones((), np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """One dense layer: what compiles fast."""

    METRICS = {"loss": "min"}  # noqa: RUF012

    model: str | None = None
    evaluation: str | None = None

    def check(self, adapter):
        pass

    def build(self, mesh, rules, seed):
        model = nn.Dense(4)
        params = shard(model.init(jax.random.key(seed), jnp.zeros((1, 4))), mesh, [(".*", jax.P())])

        def sums(params, batch):
            error = ((model.apply(params, batch["x"]) - batch["y"]) ** 2).mean(-1) * batch["weights"]
            return {"loss": error.sum(), "weight": batch["weights"].sum()}

        def loss_fn(params, batch, key):
            found = sums(params, batch)
            return found["loss"] / found["weight"], {"weight": found["weight"]}

        evaluation = Points() if self.evaluation else None
        return Task(params, loss_fn, sums, Points(), evaluation, "points", lambda batch: batch["weights"].size)


@pytest.fixture(scope="module")
def skipping() -> Run:
    """Without evaluations; a checkpoint is due after every step."""
    return Run(
        task=Regression(), adapter=pj.LoraConfig(r=2, target_modules="all-linear"),
        optimizer=Optimizer(learning_rate=0.01),
        loop=Loop(steps=8, batch_size=8, save_every=1, log_every=3, nonfinite="skip", max_skipped=3),
    )  # fmt: skip


def built(run: Run) -> Callable:
    """`train`, with what is built and compiled for a run once, whatever of its loop is changed."""
    task = run.task.build(make_mesh(run.mesh), None, 0)
    programs = compile_programs(run, task, first_state(run, task))

    def start(folder, resume=False, **fields):
        other = changed(run, **fields)
        return train(other, folder, resume=resume, task=task, programs=programs._replace(run=other), quiet=True)

    return start


@pytest.fixture(scope="module")
def start(skipping):
    return built(skipping)


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_the_last_good_checkpoint_of_a_run_that_blew_up_is_finite_and_kept(skipping, tmp_path):
    """At this rate step 2 leaves numbers so large that every later gradient is infinite; all of them are finite."""
    blown = changed(skipping, optimizer=Optimizer(learning_rate=1e12, warmup_steps=2), loop__keep_last=1)
    folder, start = tmp_path / "run", built(blown)
    told = r"step 6: .* gradient norm inf, 4 such in a row; .* of step 1 \(to go back to it, remove 2 in checkpoints/\)"
    for resume in (False, True):
        with pytest.raises(ValueError, match=told):
            start(folder, resume)
        assert saved(folder) == [1, 2]
    task = blown.task.build(make_mesh(blown.mesh), None, 0)
    with Checkpoints(folder / "checkpoints", json.loads((folder / "checkpoints" / ABOUT).read_text())) as checkpoints:
        assert checkpoints.good() == 1
    (folder / "checkpoints" / "2").rename(tmp_path / "2")
    with Checkpoints(folder / "checkpoints", json.loads((folder / "checkpoints" / ABOUT).read_text())) as checkpoints:
        state, _ = checkpoints.restore(first_state(blown, task))
    assert int(state.step) == 1
    assert not_finite(state) is None


def test_a_streak_goes_on_after_a_resume(start, tmp_path, poisoned, monkeypatch):
    """Nothing is saved in it but for SIGTERM, and that is not called good."""
    poisoned({4, 5, 6, 7})
    log = Recorder.log

    def log_and_stop(self, at, metrics):
        log(self, at, metrics)
        if at == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "log", log_and_stop)
    folder = tmp_path / "run"
    assert start(folder) == Outcome(6, 8, signal="SIGTERM")
    assert saved(folder) == [2, 3, 6]
    monkeypatch.setattr(Recorder, "log", log)
    with pytest.raises(
        ValueError, match=r"step 7: .* 4 such in a row; .* is of step 2 \(to go back to it, remove 3 in"
    ):
        start(folder, resume=True)
    poisoned({4, 5, 6})
    assert start(folder, resume=True) == Outcome(8, 8)


@pytest.mark.large
def test_a_checkpoint_that_a_streak_put_off_is_written_after_it(start, tmp_path, poisoned):
    poisoned({3, 4})
    start(tmp_path / "run", loop__save_every=3, loop__keep_last=9)
    assert saved(tmp_path / "run") == [5, 6, 8]


@pytest.mark.large
def test_a_run_that_ends_in_a_streak_fails_unless_an_evaluation_is_finite(skipping, tmp_path, poisoned):
    poisoned({2})
    short = changed(skipping, loop__steps=2)
    with pytest.raises(ValueError, match=r"ends at step 2 with 1 steps in a row .*: no step after step 1 was finite"):
        train(short, tmp_path / "run", quiet=True)
    evaluated = changed(short, task__evaluation="the same points")
    assert train(evaluated, tmp_path / "other", quiet=True) == Outcome(2, 2)


def test_what_was_confirmed_is_kept_and_written_down(tmp_path):
    """Over any number of later ones, and by the next process too; a step that is gone is not good."""
    with Checkpoints(tmp_path, {}, keep_last=1) as checkpoints:
        checkpoints.confirm()
        assert checkpoints.good() is None
        checkpoints.save(make_state(step=1), {})
        checkpoints.confirm()
        for step in (2, 3):
            checkpoints.save(make_state(step=step), {})
            assert checkpoints.steps() == [1, step]
    with Checkpoints(tmp_path, {}, keep_last=1) as checkpoints:
        assert checkpoints.good() == 1
        checkpoints.save(make_state(step=4), {}, good=True)
        assert checkpoints.steps() == [4]
        assert checkpoints.good() == 4
    (tmp_path / "4").rename(tmp_path / "away")
    with Checkpoints(tmp_path, {}) as checkpoints:
        assert checkpoints.good() is None


def test_a_score_that_is_not_finite_is_no_best():
    keep = Keep(1, 1)
    keep.scores = {1: 0.5, 2: None}
    assert keep.ranked([1, 2]) == [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_leaf_that_is_not_finite_is_named(bad):
    state = make_state()
    assert not_finite(state) is None
    adam = state.opt_state[0]
    moments = jax.tree.map(lambda leaf: leaf.at[1, 1].set(bad), adam.nu)
    assert "nu" in not_finite(state.replace(opt_state=(adam._replace(nu=moments), *state.opt_state[1:])))
    adapters = {**state.adapters, "layer/q/kernel": {"a": jnp.full((256, 8), bad)}}
    assert not_finite(state.replace(adapters=adapters)) == "layer/q/kernel a"
