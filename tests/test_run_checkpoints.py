"""Checkpoints: bitwise round trips over device counts, what is kept, and every kind of damage."""

import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peanut_jax.adapters import Adapters
from peanut_jax.run_checkpoint_leaves import digest
from peanut_jax.run_checkpoints import ABOUT, Checkpoints
from peanut_jax.training import TrainState

ABOUT_RUN = {"config": {"r": 4, "act": "relu"}, "base": {"q": "0123456789abcdef", "k": "fedcba9876543210"}}


def make_state(tx=None, devices=8, step=0, seed=0, dtype=jnp.bfloat16) -> TrainState:
    """Adapters sharded over `devices`, one replicated leaf, and an uncommitted step and key."""
    mesh = Mesh(jax.devices()[:devices], "x")
    a, b = jax.random.split(jax.random.key(seed))
    adapters = {
        "layer/q/kernel": {"a": jax.device_put(jax.random.normal(a, (256, 8)), NamedSharding(mesh, P("x")))},
        "layer/k.v/kernel": {"b": jax.device_put(jax.random.normal(b, (3, 5), dtype), NamedSharding(mesh, P()))},
    }
    state = TrainState.create(adapters, tx or optax.adam(1e-3), jax.random.key(seed + 7))
    return state.replace(step=jnp.asarray(step, jnp.int32))


def partitioned() -> optax.GradientTransformation:
    one = optax.masked(optax.adamw(1e-3), {"layer/q/kernel": True, "layer/k.v/kernel": False})
    labels = {"layer/q/kernel": "one", "layer/k.v/kernel": "two"}
    return optax.partition({"one": one, "two": optax.sgd(1e-2, momentum=0.9)}, labels)


def bits(leaf) -> bytes:
    raw = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(raw).tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))


def save_steps(folder, steps, **kwargs) -> dict[int, TrainState]:
    states = {step: make_state(step=step, seed=step) for step in steps}
    with Checkpoints(folder, ABOUT_RUN, **kwargs) as checkpoints:
        for step, state in states.items():
            checkpoints.save(state, {"position": 10 * step})
    return states


def test_adapters_are_read_from_where_they_were_one_mapping(tmp_path):
    """Both fields of `Adapters` flatten as one mapping from paths would, in the optimizer's state too."""
    theta, saved = {"b/kernel": {"a": jnp.ones(2)}, "d/kernel": {"a": jnp.ones(3)}}, {"a/bias": jnp.ones(1)}
    tx = optax.adam(1e-3)
    before = TrainState.create({**saved, **theta}, tx, jax.random.key(0))
    with Checkpoints(tmp_path, ABOUT_RUN) as checkpoints:
        checkpoints.save(before, {})
        like = jax.tree.map(jnp.zeros_like, TrainState.create(Adapters(theta, saved), tx, jax.random.key(0)))
        found, _ = checkpoints.restore(like)
    assert jax.tree.leaves_with_path(found.adapters)[0][0] == jax.tree.leaves_with_path(before.adapters)[0][0]
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True):
        assert bits(one) == bits(other)
    assert found.adapters.saved.keys() == saved.keys()


@pytest.mark.parametrize(
    "tx",
    [optax.adam(1e-3), partitioned(), optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(1, 0, 9)))],
    ids=["adam", "partition", "chain"],
)
@pytest.mark.parametrize("abstract", [False, True])
def test_round_trip_is_bitwise(tmp_path, tx, abstract):
    state = make_state(tx)
    grads = jax.tree.map(lambda x: x * 0.37, state.adapters)
    state = state.replace(opt_state=tx.update(grads, state.opt_state, state.adapters)[1], step=jnp.int32(5))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    record = {"position": 3, "best": float("inf"), "nested": {"list": [1, "two", None]}}
    with Checkpoints(tmp_path, ABOUT_RUN) as checkpoints:
        checkpoints.save(state, record)
        found, found_record = checkpoints.restore(like if abstract else make_state(tx, seed=9))
    assert_same(found, state)
    assert found_record == record
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert one.sharding == other.sharding
        assert abstract or one.committed == other.committed


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_key_keeps_its_implementation(tmp_path, impl):
    state = make_state().replace(key=jax.random.key(3, impl=impl))
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(state, {})
        found, _ = checkpoints.restore(state)
    assert jax.random.key_impl(found.key) == jax.random.key_impl(state.key)
    assert bits(found.key) == bits(state.key)


@pytest.mark.parametrize("devices", [4, 2, 1])
def test_restores_on_fewer_devices(tmp_path, devices):
    state = make_state(devices=8)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(state, {})
    like = make_state(devices=devices, seed=1)
    with Checkpoints(tmp_path, {}) as checkpoints:
        found, _ = checkpoints.restore(like)
    assert_same(found, state)
    assert found.adapters["layer/q/kernel"]["a"].sharding == like.adapters["layer/q/kernel"]["a"].sharding


def test_digest_is_of_position_and_not_of_sharding():
    x = jax.random.normal(jax.random.key(0), (8, 6, 4))
    sharded = jax.device_put(x, NamedSharding(Mesh(jax.devices(), "x"), P("x")))
    assert digest(x).tolist() == digest(sharded).tolist() == digest(np.asarray(x)).tolist()
    assert digest(x).tolist() != digest(x[:, ::-1]).tolist()
    for axis in range(3):
        assert digest(x).tolist() != digest(jnp.roll(x, 1, axis)).tolist()
    for value in (jnp.arange(5) > 2, jnp.int8(3), jnp.zeros((0, 3)), jnp.ones((2, 2), jnp.float16)):
        assert digest(value).shape == (2,)


def test_state_may_be_donated_right_after_save(tmp_path):
    """The values are those at the time of the call, whatever a train step does to the buffers."""
    state = make_state(seed=4)
    expected = jax.tree.map(bits, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(state, {})
        overwrite((state.adapters, state.opt_state))
        found, _ = checkpoints.restore(make_state())
    assert jax.tree.map(bits, found) == expected


def test_none_where_nothing_was_saved(tmp_path):
    with Checkpoints(tmp_path / "new" / "run", {}, best="loss") as checkpoints:
        assert checkpoints.restore(make_state()) is None
        assert checkpoints.restore_best(make_state()) is None
        assert checkpoints.steps() == []


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
@pytest.mark.parametrize("reopen", [False, True])
def test_keeps_the_newest_and_the_best(tmp_path, mode, best, reopen):
    losses = {1: 0.5, 2: 0.1, 3: 0.9, 4: float("nan"), 5: 0.5, 6: None, 7: 0.4}
    checkpoints = Checkpoints(tmp_path, {}, best="loss", best_mode=mode)
    for step, loss in losses.items():
        checkpoints.save(make_state(step=step, seed=step), {"loss": loss}, None if loss is None else {"loss": loss})
        if reopen:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, {}, best="loss", best_mode=mode)
    with checkpoints:
        assert checkpoints.steps() == [best, 6, 7]
        found, record = checkpoints.restore_best(make_state())
        newest, _ = checkpoints.restore(make_state())
    assert_same(found, make_state(step=best, seed=best))
    assert record == {"loss": losses[best]}
    assert int(newest.step) == 7


def test_same_step_twice_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(make_state(step=3, seed=1), {"which": 1})
        checkpoints.save(make_state(step=3, seed=2), {"which": 2})
        assert checkpoints.steps() == [3]
        found, record = checkpoints.restore(make_state())
    assert record == {"which": 1}
    assert_same(found, make_state(step=3, seed=1))


def largest_file(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file: Path, at: float = 0.5):
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    file.write_bytes(content)


def data_file(step: Path) -> Path:
    """The leaves' values: far larger than the nodes of the database's tree."""
    return largest_file(step / "state" / "ocdbt.process_0" / "d")


DAMAGE = {
    "missing data": lambda step: data_file(step).unlink(),
    "missing note": lambda step: (step / "note" / "metadata").unlink(),
    "missing manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "truncated data": lambda step: data_file(step).write_bytes(data_file(step).read_bytes()[:100]),
    "truncated note": lambda step: (step / "note" / "metadata").write_text('{"leaves": {'),
    "empty manifest": lambda step: (step / "state" / "manifest.ocdbt").write_bytes(b""),
    "flipped data": lambda step: flip(data_file(step)),
    "flipped note": lambda step: (step / "note" / "metadata").write_text(
        (step / "note" / "metadata").read_text().replace('"position": 20', '"position": 21')
    ),
    "swapped arrays": lambda step: (
        shutil.rmtree(step / "state"),
        shutil.copytree(step.parent / "1" / "state", step / "state"),
    ),
    "emptied folder": lambda step: [shutil.rmtree(step / "state"), shutil.rmtree(step / "note")],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back(tmp_path, caplog, kind):
    """The checkpoint before is used, with a warning; the damaged step can be saved anew."""
    states = save_steps(tmp_path, [1, 2])
    DAMAGE[kind](tmp_path / "2")
    with (
        caplog.at_level(logging.WARNING, "peanut_jax.run_checkpoints"),
        Checkpoints(tmp_path, ABOUT_RUN) as checkpoints,
    ):
        found, record = checkpoints.restore(make_state())
        assert_same(found, states[1])
        assert record == {"position": 10}
        assert checkpoints.steps() == [1]
        checkpoints.save(states[2], {"position": 99})
        again, record = checkpoints.restore(make_state())
    (warning,) = [one.getMessage() for one in caplog.records if one.name == "peanut_jax.run_checkpoints"]
    assert "step 2" in warning
    assert "step 1 is used instead" in warning
    assert (tmp_path / "damaged-2").is_dir()
    assert_same(again, states[2])
    assert record == {"position": 99}


def damaged(content: bytes, kind: str, chosen: random.Random) -> bytes:
    at = chosen.randrange(max(len(content), 1))
    return {
        "flip": bytes(byte ^ (0x10 if i == at else 0) for i, byte in enumerate(content)),
        "truncate": content[:at],
        "empty": b"",
        "deep": b'{"leaves":' * 20_000 + b"1" + b"}" * 20_000,
        "not unicode": content[:at] + b"\xff\xfe" + content[at:],
        "another type": b"[1e999, null]",
        "huge number": b'{"item_handlers": ' + b"9" * 5000 + b"}",
    }[kind]


RARER = ("empty", "not unicode", "another type", "huge number", "gone", "a folder")


@pytest.mark.parametrize(
    "kind", ["flip", "truncate", "deep", *(pytest.param(kind, marks=pytest.mark.large) for kind in RARER)]
)
def test_any_damage_to_any_file_is_seen_or_harmless(tmp_path, monkeypatch, kind):
    """Of whatever file: the right state comes back, of this step or of the one before, and nothing else is printed."""
    states = save_steps(tmp_path / "whole", [1, 2])
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    chosen = random.Random(kind)
    fell_back = 0
    for file in sorted(path for path in (tmp_path / "whole/2").rglob("*") if path.is_file()):
        folder = tmp_path / "trial"
        shutil.copytree(tmp_path / "whole", folder)
        path = folder / file.relative_to(tmp_path / "whole")
        path.unlink() if kind in ("gone", "a folder") else path.write_bytes(damaged(path.read_bytes(), kind, chosen))
        if kind == "a folder":
            path.mkdir()
        with Checkpoints(folder, ABOUT_RUN) as checkpoints:
            found, record = checkpoints.restore(make_state())
        assert_same(found, states[int(found.step)])
        assert record == {"position": 10 * int(found.step)}
        fell_back += int(found.step) == 1
        shutil.rmtree(folder)
    assert fell_back >= 2
    assert not printed


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b'{"r": ' * 5000, b"3", b"", None])
def test_a_damaged_about_is_one_line(tmp_path, content):
    (tmp_path / ABOUT).mkdir() if content is None else (tmp_path / ABOUT).write_bytes(content)
    with pytest.raises(ValueError, match=r"about\.json is damaged") as caught:
        Checkpoints(tmp_path, ABOUT_RUN)
    assert len(str(caught.value)) <= 500
    assert "\n" not in str(caught.value)


def test_all_damaged_is_an_error(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in ("1", "2"):
        DAMAGE["missing note"](tmp_path / step)
    with Checkpoints(tmp_path, ABOUT_RUN) as checkpoints:
        with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(2: .*; 1: .*\)"):
            checkpoints.restore(make_state())
        assert checkpoints.steps() == [1, 2]


def test_damaged_best_falls_back_to_the_next_best(tmp_path, caplog):
    with Checkpoints(tmp_path, {}, best="loss") as checkpoints:
        for step, loss in enumerate([0.1, 0.3, 0.2], 1):
            checkpoints.save(make_state(step=step, seed=step), {}, {"loss": loss})
    flip(data_file(tmp_path / "1"))
    with Checkpoints(tmp_path, {}, best="loss") as checkpoints:
        found, _ = checkpoints.restore_best(make_state())
    assert_same(found, make_state(step=3, seed=3))
    assert "step 3 is used instead" in caplog.text


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    states = save_steps(tmp_path, [1])
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", leftover)
    (leftover / "commit_success.txt").unlink(missing_ok=True)
    with Checkpoints(tmp_path, ABOUT_RUN) as checkpoints:
        assert checkpoints.steps() == [1]
        found, _ = checkpoints.restore(make_state())
        checkpoints.save(make_state(step=2), {})
    assert_same(found, states[1])
    assert not leftover.exists()


OTHER_STATES = {
    "shape": (lambda s: {**s, "layer/q/kernel": {"a": jnp.zeros((256, 4))}}, r"'layer/q/kernel'\]\['a'\].*\[256, 8\]"),
    "dtype": (
        lambda s: {**s, "layer/k.v/kernel": {"b": jnp.zeros((3, 5))}},
        r"'layer/k.v/kernel'\]\['b'\].*bfloat16\[3, 5\] there and float32\[3, 5\] here",
    ),
    "missing": (lambda s: {"layer/q/kernel": s["layer/q/kernel"]}, r"'layer/k.v/kernel'\]\['b'\].*\(absent\) here"),
    "extra": (lambda s: {**s, "new": {"a": jnp.zeros(2)}}, r"'new'\]\['a'\] is \(absent\) there"),
}


@pytest.mark.parametrize("kind", OTHER_STATES)
def test_another_structure_is_an_error_and_no_damage(tmp_path, kind):
    change, message = OTHER_STATES[kind]
    states = save_steps(tmp_path, [1, 2])
    other = change(states[2].adapters)
    like = TrainState.create(other, optax.adam(1e-3), jax.random.key(0))
    with Checkpoints(tmp_path, ABOUT_RUN) as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(like)
        assert checkpoints.steps() == [1, 2]


def test_another_key_implementation_is_an_error(tmp_path):
    save_steps(tmp_path, [1])
    with (
        Checkpoints(tmp_path, ABOUT_RUN) as checkpoints,
        pytest.raises(ValueError, match=r"\.key .*key<fry>.*key<rbg>"),
    ):
        checkpoints.restore(make_state().replace(key=jax.random.key(0, impl="rbg")))


def test_another_run_is_refused_with_every_field(tmp_path):
    save_steps(tmp_path, [1])
    other = {"config": {"r": 8, "dropout": 0.1, "act": "x" * 500}, "base": {**ABOUT_RUN["base"], "k": "0" * 16}}
    with pytest.raises(ValueError, match="another run") as caught:
        Checkpoints(tmp_path, other)
    message = str(caught.value)
    assert "config.r: 4, 8" in message
    assert "config.dropout: (absent), 0.1" in message
    assert 'config.act: "relu", "xxx' in message
    assert "base: 1 of 2 kernels differ, the first 'k'" in message
    assert len(message) < 600
    assert json.loads((tmp_path / ABOUT).read_text()) == ABOUT_RUN


def test_about_is_written_by_the_first_save_alone(tmp_path):
    with Checkpoints(tmp_path, {"r": (1, 2)}):
        assert not (tmp_path / ABOUT).exists()
    with Checkpoints(tmp_path, {"r": (1, 2)}) as checkpoints:
        checkpoints.save(make_state(), {})
    Checkpoints(tmp_path, {"r": [1, 2]}).close()
    (tmp_path / ABOUT).write_text("{")
    with pytest.raises(ValueError, match=r"about\.json is damaged \(.*about\.json.*restore it or use another folder"):
        Checkpoints(tmp_path, {"r": [1, 2]})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"keep_last": 0}, "keep_last.*got 0"), ({"best_mode": "low"}, "best_mode.*'low'")],
)
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, {}, **kwargs)


def test_bad_saves(tmp_path):
    with pytest.raises(ValueError, match="about must be a mapping for JSON"):
        Checkpoints(tmp_path, {"r": jnp.ones(3)})
    with Checkpoints(tmp_path, {}, best="loss") as checkpoints:
        checkpoints.save(make_state(step=4), {})
        with pytest.raises(ValueError, match="best='loss', got \\['accuracy'\\]"):
            checkpoints.save(make_state(step=5), {}, {"accuracy": 1.0})
        with pytest.raises(ValueError, match="record must be a mapping for JSON"):
            checkpoints.save(make_state(step=5), {"position": np.int64(3)})
        with pytest.raises(ValueError, match="holds step 4, newer than step 2"):
            checkpoints.save(make_state(step=2), {})
    with Checkpoints(tmp_path, {}) as checkpoints, pytest.raises(ValueError, match="without best="):
        checkpoints.restore_best(make_state())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot open {tmp_path}/file/run: "):
        Checkpoints(tmp_path / "file" / "run", {})


def test_a_folder_that_went_away(tmp_path):
    """Its place is taken by a file: that cannot be written to by root either, unlike a read-only folder."""
    checkpoints = Checkpoints(tmp_path / "run", {})
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match=f"cannot save in {tmp_path}/run: ") as caught:
        checkpoints.save(make_state(), {})
    assert "\n" not in str(caught.value)
    checkpoints.close()


FULL_DISK = """
import resource, signal
import jax, jax.numpy as jnp, optax
from peanut_jax.run_checkpoints import Checkpoints
from peanut_jax.training import TrainState
state = TrainState.create({"a": jax.random.normal(jax.random.key(0), (100_000,))}, optax.identity(), jax.random.key(1))
checkpoints = Checkpoints(FOLDER, {}, keep_last=1)
checkpoints.save(state, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
later = state.replace(step=jnp.int32(2))
for surfaces in (checkpoints.wait, lambda: checkpoints.save(state.replace(step=jnp.int32(3)), {})):
    try:
        checkpoints.save(later, {})
        surfaces()
        print("NOT RAISED")
    except OSError as error:
        print("RAISED", error)
    print("STEPS", checkpoints.steps())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save(later, {})
print("STEPS", checkpoints.steps())
checkpoints.close()
"""


def test_a_full_disk_surfaces_and_loses_nothing(tmp_path):
    """The write fails in the background; a limit on the size of files stands for the full disk."""
    program = f"FOLDER = {str(tmp_path)!r}\n" + FULL_DISK
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("STEPS")] == ["STEPS [0]", "STEPS [0]", "STEPS [2]"]
    raised = [line for line in lines if line.startswith("RAISED")]
    assert len(raised) == 2
    assert all(f"cannot save in {tmp_path}: " in line and "File too large" in line for line in raised)
