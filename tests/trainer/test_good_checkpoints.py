"""Which checkpoint counts as good: never one of a streak of steps that are not finite, nor one that only seems whole."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peanut_jax.run_checkpoint_keep import Keep
from peanut_jax.run_checkpoints import Checkpoints
from peanut_jax.sharding import make_mesh
from peanut_jax.trainer import Optimizer, Run, loop, train
from peanut_jax.trainer.data import batches
from peanut_jax.trainer.guard import not_finite
from peanut_jax.trainer.loop import Outcome
from peanut_jax.trainer.programs import first_state
from peanut_jax.trainer.recorder import Recorder
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


@pytest.fixture
def skipping(run) -> Run:
    """Without evaluations; a checkpoint is due after every step."""
    every = {"loop__save_every": 1, "loop__eval_every": None, "loop__log_every": 3}
    return changed(run, task__evaluation=None, loop__nonfinite="skip", loop__max_skipped=3, **every)


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_the_last_good_checkpoint_of_a_run_that_blew_up_is_finite_and_kept(skipping, tmp_path):
    """At this rate step 3 leaves numbers so large that every later loss is NaN; all of them are finite."""
    blown = changed(skipping, optimizer=Optimizer(learning_rate=1e10, warmup_steps=2), loop__keep_last=1)
    folder = tmp_path / "run"
    told = r"step 7: loss nan, .* 4 such in a row; .*good checkpoint is of step 2 \(to go back to it, remove 3 in"
    for resume in (False, True):
        with pytest.raises(ValueError, match=told):
            train(blown, folder, resume=resume, quiet=True)
        assert saved(folder) == [2, 3]
    task = blown.task.build(make_mesh(blown.mesh), None, 0)
    with Checkpoints(folder / "checkpoints", loop._about(blown, task)) as checkpoints:
        assert checkpoints.good() == 2
    (folder / "checkpoints" / "3").rename(tmp_path / "3")
    with Checkpoints(folder / "checkpoints", loop._about(blown, task)) as checkpoints:
        state, _ = checkpoints.restore(first_state(blown, task))
    assert int(state.step) == 2
    assert not_finite(state) is None


def test_a_streak_goes_on_after_a_resume(skipping, tmp_path, poisoned, monkeypatch):
    """Nothing is saved in it but for SIGTERM, and that is not called good."""
    poisoned({4, 5, 6, 7})
    log = Recorder.log

    def log_and_stop(self, at, metrics):
        log(self, at, metrics)
        if at == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "log", log_and_stop)
    folder = tmp_path / "run"
    outcome = train(skipping, folder, quiet=True)
    assert outcome == Outcome(6, 8, signal="SIGTERM")
    assert saved(folder) == [2, 3, 6]
    monkeypatch.setattr(Recorder, "log", log)
    with pytest.raises(ValueError, match=r"step 7: .* 4 such in a row; .*no checkpoint is known|of step 2 \(to go"):
        train(skipping, folder, resume=True, quiet=True)
    poisoned({4, 5, 6})
    assert train(skipping, folder, resume=True, quiet=True) == Outcome(8, 8)


def test_a_checkpoint_that_a_streak_put_off_is_written_after_it(run, tmp_path, poisoned):
    poisoned({3, 4})
    loops = {"loop__save_every": 3, "loop__eval_every": None, "loop__nonfinite": "skip", "loop__keep_last": 9}
    train(changed(run, **loops), tmp_path / "run", quiet=True)
    assert saved(tmp_path / "run") == [5, 6, 8]


def test_a_run_that_ends_in_a_streak_fails_unless_an_evaluation_is_finite(skipping, run, tmp_path, poisoned):
    poisoned({2})
    short = changed(skipping, loop__steps=2, optimizer__warmup_steps=0)
    with pytest.raises(ValueError, match=r"ends at step 2 with 1 steps in a row .* the last good|known to be good"):
        train(short, tmp_path / "run", quiet=True)
    evaluated = dataclasses.replace(short, task=run.task)
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
def test_a_leaf_that_is_not_finite_is_named(run, bad):
    state = make_state()
    assert not_finite(state) is None
    adam = state.opt_state[0]
    moments = jax.tree.map(lambda leaf: leaf.at[1, 1].set(bad), adam.nu)
    assert "nu" in not_finite(state.replace(opt_state=(adam._replace(nu=moments), *state.opt_state[1:])))
    adapters = {**state.adapters, "layer/q/kernel": {"a": jnp.full((256, 8), bad)}}
    assert not_finite(state.replace(adapters=adapters)) == "layer/q/kernel a"
