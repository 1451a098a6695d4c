"""Plans: the bytes of a step that runs, and a model that is larger than this machine."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

import peanut_jax as pj
from peanut_jax import hlo
from peanut_jax.cli import main
from peanut_jax.models.decoder import CHUNK, Decoder, language_loss
from peanut_jax.models.decoder_config import REMAT_POLICIES, from_hf
from peanut_jax.plan import (
    CHIPS,
    DoesNotFit,
    Plan,
    Setting,
    chip_name,
    device_memory,
    estimate,
    fitting_remat,
    free_memory,
    plan,
)
from peanut_jax.plan.memory import free_host_memory
from peanut_jax.sharding import batch_sharding, init_state, make_mesh, rules_for, shard, sharded_train_step
from peanut_jax.topologies import slice_devices

LLAMA = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=128,
    tie_word_embeddings=False,
).to_dict()  # fmt: skip
LLAMA_70B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
ADAPTER = pj.PeanutConfig(r=4, depth=1, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.large), 2])
def test_a_plan_is_what_the_real_step_takes(accumulate):
    """The step on real arrays: the same temporaries, and the same bytes of all that goes in."""
    mesh, config = make_mesh("data=2,fsdp=2,tensor=2"), from_hf(LLAMA)
    found = plan(config, mesh, ADAPTER, batch_size=8, seq_len=16, dtype="float32", accumulate_steps=accumulate)
    model = Decoder(config, jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    params = shard(params, mesh, rules_for("llama"))
    tx = optax.adamw(1e-3)
    state = init_state(jax.random.key(0), params, ADAPTER, tx)
    step = sharded_train_step(language_loss(model, 4 * CHUNK), tx, ADAPTER, state, params, accumulate_steps=accumulate)
    batch = {name: np.ones((8, 16), np.int32) for name in ("tokens", "labels", "segments")}
    batch = jax.device_put({**batch, "weights": np.ones((8, 16), np.float32)}, batch_sharding(mesh))
    compiled = step.lower(state, params, batch).compile()
    memory = compiled.memory_analysis()
    assert found.temporary == memory.temp_size_in_bytes
    assert found.params + found.state + found.batch == memory.argument_size_in_bytes
    assert found.trainable == pj.count(state.adapters)
    assert list(found.collectives) == hlo.collectives(compiled.as_text())
    compiled(state, params, batch)

    setting = Setting(
        config=config, adapter=ADAPTER, batch_size=8, seq_len=16, dtype="float32", accumulate_steps=accumulate
    )
    quick = estimate(setting, mesh)
    for name in ("params", "state", "batch", "trainable"):
        assert getattr(quick, name) == getattr(found, name)
    assert quick.flops == pytest.approx(found.flops, rel=0.15)
    # Of these widths the adapters' own gathers, which the estimate leaves out, are a third.
    assert 0.6 < quick.traffic()["all-gather"] / found.traffic()["all-gather"] <= 1


@pytest.mark.large
def test_a_saved_head_is_counted_in_its_own_dtype():
    """In bfloat16 beside float32 adapters: its values, and AdamW's two moments."""
    mesh = make_mesh("tensor=8")
    saving = pj.PeanutConfig(r=4, depth=1, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    plain, saved = (plan(from_hf(LLAMA), mesh, one, batch_size=8, seq_len=16) for one in (ADAPTER, saving))
    assert saved.state - plain.state == 3 * 2 * 64 * 64 // 8


def test_bfloat16_halves_what_the_model_holds():
    mesh = make_mesh("fsdp=8")
    single, half = (
        plan(from_hf(LLAMA), mesh, ADAPTER, batch_size=8, seq_len=16, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    norms = 5 * 64 * 4
    assert half.params - norms == (single.params - norms) / 2
    assert half.state == single.state
    gathered = {name: one.traffic()["all-gather"] for name, one in (("single", single), ("half", half))}
    assert gathered["half"] == gathered["single"] / 2


def test_the_estimate_counts_links_and_nodes():
    """A ring moves (g - 1) / g of an all-gather's result, twice that for an all-reduce, on one direction of a link."""

    def seconds(kind, groups, chip):
        one = hlo.Collective(kind, (), 7 * 10**9, 2, len(groups[0]), groups, "")
        return Plan(0, 0, 0, 0, 0, (one,), 0).seconds(CHIPS[chip])

    near, far = (tuple(range(4)),), ((0, 8, 16, 24),)
    assert seconds("all-gather", near, "v5e") == pytest.approx(14e9 * 3 / 4 / 100e9 / 0.7)
    assert seconds("all-reduce", near, "v5e") == pytest.approx(14e9 * 6 / 4 / 100e9 / 0.7)
    assert seconds("all-gather", far, "v5e") == seconds("all-gather", near, "v5e")
    assert seconds("all-gather", far, "h100") == pytest.approx(14e9 * 3 / 4 / 50e9 / 0.7)
    # Two nodes with eight and with two members: so many ports, up to the rate of the links within a node.
    assert seconds("all-gather", (tuple(range(16)),), "h100") == pytest.approx(14e9 * 15 / 16 / 400e9 / 0.7)
    assert seconds("all-gather", ((0, 1, 8, 9),), "h100") == pytest.approx(14e9 * 3 / 4 / 100e9 / 0.7)
    assert Plan(0, 0, 0, 0, 10**15, (), 0).seconds(CHIPS["h100"]) == pytest.approx(1e15 / (989e12 * 0.5))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("A100", "a100"), ("a100-80GB", "a100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("A100 40 GB", "a100-40gb"),
        ("H100", "h100"), ("NVIDIA H100 80GB HBM3", "h100"), ("H200", "h200"), ("NVIDIA H200", "h200"),
        ("B200", "b200"), ("L40S", "l40s"), ("NVIDIA L40S", "l40s"), ("v4", "v4"), ("TPU v4", "v4"), ("V5E", "v5e"),
        ("TPU v5 lite", "v5e"), ("v5litepod", "v5e"), ("TPU v5", "v5p"), ("v5p", "v5p"), ("TPU v6 lite", "v6e"),
    ],
)  # fmt: skip
def test_chips_by_their_sold_names(said, name):
    assert chip_name(said) == name
    assert CHIPS[name].memory > 10e9


@pytest.mark.parametrize(
    ("said", "near"), [("h1000", "h100"), ("a10", "a100"), ("tpu", "v5e"), ("", "v5e"), (3, "v5e")]
)
def test_a_chip_that_does_not_exist(said, near):
    with pytest.raises(ValueError, match=f"is not a chip that is known: such as .*{near}"):
        chip_name(said)


def test_the_memory_of_a_device(monkeypatch):
    """A chip's by its kind, what a device tells of itself, and a part of the machine's free memory for a CPU."""
    assert device_memory(slice_devices("v5e-4")[0]) == CHIPS["v5e"].memory
    assert device_memory(slice_devices("v5p-8")[0]) == CHIPS["v5p"].memory
    monkeypatch.setattr("peanut_jax.plan.memory.free_host_memory", lambda: 16 * 10**9)
    assert device_memory(jax.devices()[0]) == free_memory(jax.devices()[0]) == 2 * 10**9
    stats = {"bytes_limit": 60 * 10**9, "bytes_in_use": 20 * 10**9}
    card = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", memory_stats=lambda: stats)
    assert (device_memory(card), free_memory(card)) == (60e9, 40e9)
    unknown = types.SimpleNamespace(platform="gpu", device_kind="a card", memory_stats=lambda: None)
    assert device_memory(unknown) is None
    mesh = types.SimpleNamespace(devices=np.array([unknown]))
    with pytest.raises(ValueError, match="a card does not tell its memory: give memory= in bytes"):
        fitting_remat(from_hf(LLAMA), mesh, ADAPTER, batch_size=8, seq_len=16)


def test_free_memory_of_the_machine():
    assert 10**7 < free_host_memory() < 10**13


def test_the_first_policy_that_fits(monkeypatch):
    """In the order of `REMAT_POLICIES`; those that surely do not fit are not compiled."""
    compiled = []

    def planned(setting, mesh):
        compiled.append(setting.config.remat)
        return Plan(0, 0, 0, takes[setting.config.remat], 0, (), 0)

    def chosen(memory):
        compiled.clear()
        return fitting_remat(from_hf(LLAMA), mesh, ADAPTER, batch_size=8, seq_len=16, memory=memory)

    monkeypatch.setattr("peanut_jax.plan.remat.planned", planned)
    mesh = make_mesh("fsdp=8")
    takes = dict.fromkeys(REMAT_POLICIES, 10**9) | {"dots": 10**8, "full": 10**7}
    assert (chosen(2e9), compiled) == ("none", ["none"])
    assert chosen(1e9) == chosen(1.2e8) == "dots"  # a tenth is to stay free
    assert chosen(1e8) == "full"
    assert compiled == list(REMAT_POLICIES)
    with pytest.raises(DoesNotFit, match=r"fits with no remat policy: it takes 0\.01 GB or more, and 0\.01 GB of a"):
        chosen(1e7)
    with pytest.raises(DoesNotFit):
        chosen(1e3)
    assert compiled == []


@pytest.mark.large
@pytest.mark.parametrize(
    ("mesh", "batch", "seq", "remat"),
    [
        ("fsdp=8", 16, 256, "none"),
        ("fsdp=8", 16, 256, "dots"),
        ("fsdp=8", 16, 256, "full"),
        ("data=2,tensor=4", 8, 1024, "dots"),
        ("fsdp=4,tensor=2", 4, 4096, "full"),
        ("fsdp=4,tensor=2", 4, 2048, "none"),
    ],
)
def test_the_estimate_is_near_the_compiled_plan(mesh, batch, seq, remat):
    """Of a model with Llama-3.2-1B's widths: what the search leaves out without compiling it rests on this."""
    config = from_hf({
        **LLAMA_70B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32,
    }, remat=remat)  # fmt: skip
    adapter = pj.PeanutConfig(r=32, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    setting = Setting(config=config, adapter=adapter, batch_size=batch, seq_len=seq)
    quick, found = (
        estimate(setting, make_mesh(mesh)),
        plan(config, make_mesh(mesh), adapter, batch_size=batch, seq_len=seq),
    )
    assert 0.75 < found.temporary / quick.temporary < 1.33
    assert quick.flops == pytest.approx(found.flops, rel=0.1)
    assert sum(quick.traffic().values()) == pytest.approx(sum(found.traffic().values()), rel=0.1)


@pytest.mark.large
def test_a_slice_is_planned_by_its_own_compiler():
    """In bfloat16 as it is; XLA on CPU, at half the bytes of float32, is near it."""
    config, adapter = from_hf({**LLAMA, "hidden_size": 256, "intermediate_size": 512}), ADAPTER
    meshes = [make_mesh("fsdp=4", devices) for devices in (slice_devices("v5e-4"), jax.devices()[:4])]
    exact, halved = (plan(config, mesh, adapter, batch_size=8, seq_len=256) for mesh in meshes)
    assert (exact.params, exact.state, exact.batch) == (halved.params, halved.state, halved.batch)
    assert exact.other > 0
    assert halved.other == 0
    assert exact.temporary == pytest.approx(halved.temporary, rel=0.5)
    assert exact.flops == halved.flops
    assert exact.notes[0].startswith("FLOPs and collectives are those of XLA:CPU")
    with pytest.raises(DoesNotFit, match=r"and a device has 16\.91 GB"):
        plan(config, meshes[0], adapter, batch_size=1 << 18, seq_len=256)


@pytest.mark.large
def test_llama_70b_on_256_devices(tmp_path):
    """In a process of its own, whose devices are not fixed yet."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    program = "import sys; from peanut_jax.cli import main; sys.exit(main())"
    arguments = f"--config-json {tmp_path}/config.json --mesh data=4,fsdp=16,tensor=4 --batch 64 --seq 2048 --rank 32"
    command = [sys.executable, "-c", program, "plan", *arguments.split(), "--chip", "v5e", "--remat", "full"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    rows = dict(line.strip("│ \n").split("│") for line in done.stdout.splitlines() if line.startswith("│"))
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    # 80 layers, the head and the embedding, over 16 * 4 devices at two bytes.
    per_layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    params = (80 * per_layer + 2 * 128256 * 8192) / 64 * 2 / 1e9
    assert float(rows["parameters"].removesuffix(" GB")) == pytest.approx(params, rel=0.01)
    assert rows["v5e (estimate)"].startswith("fits; ")
    assert float(rows["activations and other temporaries"].removesuffix(" GB")) < 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=-1"], "give the size of every axis"),
        (["--mesh", "data=3"], "this process has 8 devices already"),
        (["--mesh", "data=8", "--batch", "4"], "a batch of 4 rows does not divide over 8 data shards"),
        (["--mesh", "data=8", "--accumulate", "2"], "a batch of 8 rows does not divide over 8 data shards and 2"),
        (["--mesh", "tensor=8", "--target-modules", "query"], "target"),
        (["--mesh", "tensor=8", "--accumulate", "0"], "must be at least 1, got 16 and 0"),
        (["--mesh", "fsdp=8", "--config-json", "absent"], "absent"),
        (["--mesh", "fsdp=8", "--chip", "h1000"], "'h1000' is not a chip that is known: such as h100"),
        (["--mesh", "fsdp=8", "--slice", "v5e-17"], "'v5e-17' is not a TPU slice: such as v5e-1, v5e-4"),
        (["--mesh", "fsdp=8", "--slice", "v5e-16"], "'fsdp=8' has 8 places and v5e-16 16 chips: make them equal"),
        (["--mesh", "fsdp=8", "--slice", "v5e-8", "--chip", "v5e"], "says which chip: leave out --chip"),
        (["--mesh", "fsdp=8", "--compiler", "libtpu"], "give --slice, such as v5e-16"),
        (["--mesh", "fsdp=8", "--headroom", "1"], "--headroom must be at least 0 and below 1, got 1.0"),
        (["--mesh", "fsdp=8", "--count", "8"], "--count is for --search"),
        ([], "give --mesh and --batch, or --search to find them"),
        (["--search", None], "give --slice, or one --chip and --count"),
        (["--search", None, "--chip", "h100", "--count", "0"], "--count 0: there must be at least 1"),
        (["--search", None, "--slice", "v5p-8", "--count", "8"], "v5p-8 has 4 chips: leave out --count 8"),
        (["--search", None, "--slice", "v5e-8", "--mesh", "fsdp=8"], "--search finds the mesh: leave out --mesh"),
        (["--search", None, "--slice", "v5e-8", "--top", "0"], "--top and --batch must be at least 1, got 0 and 8"),
        (["--search", None, "--slice", "v5e-8", "--accumulate", "2"], "--search finds the accumulate: leave out"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("peanut_jax.plan.step.Setting.compile", lambda *_: pytest.fail("compiled"))
    assert jax.device_count() == 8  # looked at, so that they stay
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    defaults = {"--config-json": str(tmp_path), "--batch": "8", "--seq": "16"}
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert main(["plan", *(word for pair in {**defaults, **given}.items() for word in pair if word is not None)]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
