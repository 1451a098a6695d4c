"""Configs: read from files, checked, and turned into schedules and optimizers."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peanut_jax as pj
from peanut_jax.adapters import Adapters
from peanut_jax.trainer import Classification, Loop, Optimizer, Run, read
from peanut_jax.trainer.judging import FRESH, due, judged
from peanut_jax.trainer.reading import _merged
from peanut_jax.trainer.tasks.base import directions


def test_configs_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="there is no config file"):
        read(tmp_path / "absent.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"must define `config`, a peanut_jax\.trainer\.Run, found NoneType"):
        read(tmp_path / "empty.py")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule):
    rate = Optimizer(learning_rate=2.0, schedule=schedule, warmup_steps=4).rate(12)
    assert float(rate(0)) == 0
    assert [float(rate(step)) for step in (2, 4)] == [1.0, 2.0]
    middle = {"cosine": 1.0, "linear": 1.0, "constant": 2.0}[schedule]
    np.testing.assert_allclose(float(rate(8)), middle, rtol=1e-6)
    np.testing.assert_allclose(float(rate(12)), 2.0 if schedule == "constant" else 0.0, atol=1e-6)


def test_epochs():
    assert Loop(epochs=1.5, batch_size=8).total(60) == 12
    assert Loop(steps=7).total(60) == 7


def test_an_evaluation_that_is_no_number_is_no_best():
    record = FRESH
    patient = Run(
        task=Classification(model="m", train="t", evaluation="e"), adapter=pj.LoraConfig(task_type="SEQ_CLS"),
        loop=Loop(steps=9, eval_every=1, patience=2),
    )  # fmt: skip
    for value in (np.nan, 3.0, 2.0, -np.inf):
        record = judged(record, {"loss": value}, patient)
    assert record == {"best": 2.0, "since_best": 1, "done": False}


def test_what_is_due_after_a_step():
    loop = Loop(steps=9, log_every=2, eval_every=3, save_every=4)

    def after(step, *, evaluates=True, ending=False):
        return "".join(
            name[0] for name, on in due(loop, step, 9, evaluates=evaluates, ending=ending)._asdict().items() if on
        )

    assert [after(step) for step in range(1, 10)] == ["", "l", "les", "ls", "", "les", "", "ls", "les"]
    assert after(3, evaluates=False) == ""
    assert after(1, ending=True) == "ls"


def test_a_rate_of_its_own_for_saved_modules():
    """Clipped together with the adapters, then stepped by as much as its own rate says; without one, as before."""
    tree = Adapters({"k": {"a": jnp.full(2, 3.0), "b": jnp.full(2, 4.0)}}, {"head/bias": jnp.full(2, 12.0)})
    both = Optimizer(learning_rate=0.1, saved_learning_rate=0.5, schedule="constant")
    one = dataclasses.replace(both, saved_learning_rate=None)

    def updates(optimizer):
        tx = optimizer.transformation(10)
        return tx.update(tree, tx.init(tree), tree)[0]

    found, plain = updates(both), updates(one)
    jax.tree.map(np.testing.assert_array_equal, found.theta, plain.theta)
    np.testing.assert_allclose(found.saved["head/bias"], 5 * plain.saved["head/bias"], rtol=1e-6)
    want = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda _: 0.1, weight_decay=0.0))
    jax.tree.map(np.testing.assert_array_equal, plain, want.update(tree, want.init(tree), tree)[0])


def test_a_task_that_is_none_is_refused():
    with pytest.raises(ValueError, match="task must be a dataclass with METRICS, model, evaluation, check and build"):
        Run(task={"model": "m"}, adapter=pj.LoraConfig(task_type="SEQ_CLS"), loop=Loop(steps=1))


def test_fields_that_json_cannot_hold_are_refused():
    task = Classification(model=Path("m"), train="t")
    with pytest.raises(ValueError, match=r"one that JSON can hold, for run\.json: Object of type \w+ is not JSON"):
        Run(task=task, adapter=pj.LoraConfig(task_type="SEQ_CLS"), loop=Loop(steps=1)).as_json()


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
@pytest.mark.parametrize(
    "changes",
    [
        ["loop.steps=100"],
        ["loop.steps=100", "loop.epochs=null"],
        ["loop.epochs=null", "loop.steps=100"],
        ["loop.batch_size=64", "loop.steps=100", "loop.steps=100"],
    ],
)
def test_steps_replace_epochs_and_say_so(path, changes, caplog):
    loop = read(path, changes).loop
    assert (loop.steps, loop.epochs) == (100, None)
    told = f"--set loop.steps replaces loop.epochs=3 of {path}"
    assert (told in caplog.text) == ("loop.epochs=null" not in changes)


def test_epochs_replace_steps_and_two_of_them_are_refused(tmp_path, caplog):
    path = tmp_path / "config.py"
    path.write_text((ROOT / "configs" / "stories.py").read_text().replace("epochs=3", "steps=7"))
    assert (read(path, ["loop.epochs=0.5"]).loop.steps, read(path, ["loop.epochs=0.5"]).loop.epochs) == (None, 0.5)
    assert "--set loop.epochs replaces loop.steps=7 of " in caplog.text
    for changes in (["loop.steps=5", "loop.epochs=2"], ["loop.epochs=2", "loop.steps=5"]):
        with pytest.raises(ValueError, match=r"give one of loop\.steps and loop\.epochs, got 5 and 2"):
            read(path, changes)


@pytest.mark.parametrize(
    ("earlier", "now", "merged"),
    [
        (["a=1", "b=2"], ["a=3"], ["b=2", "a=3"]),
        (["loop.steps=5"], ["loop.epochs=2"], ["loop.epochs=2"]),
        (["loop.epochs=null", "loop.steps=5"], ["loop.steps=7"], ["loop.steps=7"]),
        (["loop.steps=5"], ["loop.epochs=null"], ["loop.steps=5", "loop.epochs=null"]),
    ],
)
def test_changes_of_the_start_and_new_ones(earlier, now, merged):
    assert _merged(earlier, now) == merged


class Scored(Classification):
    METRICS = ("loss", "score")


def best_mode(task=Classification, **fields):
    task = task(model="m", train="t", evaluation="e")
    return Run(task=task, adapter=pj.LoraConfig(task_type="SEQ_CLS"), loop=Loop(steps=1, **fields))


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "min"), ({"best": "accuracy"}, "max"), ({"best": "accuracy", "best_mode": "max"}, "max"),
        ({"task": Scored}, "min"), ({"task": Scored, "best": "score", "best_mode": "max"}, "max"),
    ],
)  # fmt: skip
def test_the_direction_is_the_metrics(fields, mode, caplog):
    """It is in what a run is known by, as runs of earlier versions have it, which had to write it out."""
    run = best_mode(**fields)
    assert run.best_mode == mode
    assert run.identity()["loop"]["best_mode"] == run.as_json()["loop"]["best_mode"] == mode
    assert not caplog.text


def test_a_direction_that_contradicts_the_metric_is_taken_and_told(caplog):
    assert best_mode(best="accuracy", best_mode="min").best_mode == "min"
    assert "loop.best_mode='min' keeps the min of 'accuracy' as the best" in caplog.text


def test_a_direction_that_nobody_knows():
    with pytest.raises(ValueError, match=r"METRICS of Scored does not say .* 'score' .* or set loop\.best_mode"):
        best_mode(Scored, best="score")


@pytest.mark.parametrize("metrics", [None, "loss", {}, {"loss": "low"}, {"loss": None}, (1,), {1: "min"}])
def test_metrics_that_are_none(metrics):
    with pytest.raises(ValueError, match="METRICS must"):
        directions(metrics)


def test_the_best_of_an_accuracy_is_the_highest():
    run, record = best_mode(best="accuracy", eval_every=1, patience=2), FRESH
    for value in (0.5, 0.7, 0.6):
        record = judged(record, {"accuracy": value}, run)
    assert record == {"best": 0.7, "since_best": 1, "done": False}
