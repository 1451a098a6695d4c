"""The search for a mesh: what it proposes fits, is the fastest that does, and divides as the model does."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import peanut_jax as pj
from peanut_jax.cli import main
from peanut_jax.models.decoder_config import REMAT_POLICIES, from_hf
from peanut_jax.plan import CHIPS, DoesNotFit, Setting, estimate, search
from peanut_jax.plan.formulas import held
from peanut_jax.sharding.mesh import AXES
from peanut_jax.topologies import slice_devices
from tests.test_plan import ADAPTER, LLAMA, LLAMA_70B

LARGE = Setting(
    config=from_hf(LLAMA_70B),
    adapter=pj.PeanutConfig(r=32, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
    batch_size=1,
    seq_len=2048,
)


class Compiler:
    """Gives estimates for compiled plans, their temporaries times a factor; `seen` is what was asked for."""

    def __init__(self, monkeypatch):
        self.seen, self.factor = [], 1.0
        monkeypatch.setattr("peanut_jax.plan.proposals.planned", self.planned)

    def planned(self, setting, mesh):
        self.seen.append((dict(mesh.shape), setting))
        found = estimate(setting, mesh)
        return dataclasses.replace(found, temporary=round(self.factor * found.temporary))


@pytest.fixture
def compiler(monkeypatch):
    return Compiler(monkeypatch)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_proposals_fit_and_the_fastest_comes_first(compiler, factor):
    """Also where the compiler needs more or less than was estimated."""
    compiler.factor, lines = factor, []
    found = search(LARGE, CHIPS["h200"], jax.devices(), tell=lines.append)
    assert len(found) == 3
    assert len({tuple(one.mesh.values()) for one in found}) == 3
    assert sorted(found, key=lambda one: -one.tokens_per_second) == found
    for one in found:
        sizes = one.mesh
        assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == 8
        assert one.setting.batch_size == one.rows * sizes["data"] * sizes["fsdp"]
        assert one.plan.total <= 0.9 * 141e9
        assert one.left == pytest.approx(1 - one.plan.total / 141e9)
        assert (sizes, one.setting) in compiler.seen
    assert len(lines) == 1 + len(compiler.seen)


def test_nothing_that_fits_is_faster(compiler):
    """By the same estimate of time, over all meshes, policies and powers of two."""
    setting = Setting(config=from_hf(LLAMA), adapter=ADAPTER, batch_size=4, seq_len=4096)
    chip = dataclasses.replace(CHIPS["v5e"], memory=100e6)
    best = search(setting, chip, jax.devices()[:4], top=1)[0]
    rates = {}
    meshes = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
    known = {
        sizes: (mesh := Mesh(np.asarray(jax.devices()[:4]).reshape(sizes), AXES), held(setting, mesh))
        for sizes in meshes
    }
    for sizes, rows, remat in itertools.product(meshes, (1, 2, 4, 8), REMAT_POLICIES):
        config = dataclasses.replace(setting.config, remat=remat)
        tried = dataclasses.replace(setting, config=config, batch_size=rows * sizes[0] * sizes[1])
        plan = estimate(tried, *known[sizes])
        if plan.total <= 0.9 * chip.memory:
            rates[sizes, rows, remat] = tried.batch_size * 4096 / plan.seconds(chip)
    assert len(rates) < len(meshes) * 4 * len(REMAT_POLICIES)
    assert best.tokens_per_second == pytest.approx(max(rates.values()))


def test_tensor_divides_the_heads_and_stays_in_a_node(compiler):
    """Of 8 devices: four meshes without tensor, three with 2, two with 4, one with 8."""
    small = Setting(config=from_hf(LLAMA), adapter=ADAPTER, batch_size=1, seq_len=16)
    grouped = dataclasses.replace(small, config=from_hf({**LLAMA, "num_key_value_heads": 2}))
    for setting, chip, meshes in (
        (grouped, CHIPS["v5e"], 7),
        (small, dataclasses.replace(CHIPS["h100"], node=4), 9),
    ):
        lines = []
        search(setting, chip, jax.devices(), top=1, tell=lines.append)
        assert lines[0] == f"{meshes} meshes of 8 devices, {len(REMAT_POLICIES)} remat policies"


def test_a_wanted_batch_is_reached_by_microbatches(compiler):
    found = search(LARGE, CHIPS["h200"], jax.devices(), batch_size=96, top=2)
    for one in found:
        assert one.setting.batch_size == 96
        assert one.rows * one.setting.accumulate_steps * one.mesh["data"] * one.mesh["fsdp"] == 96
    assert any(one.setting.accumulate_steps > 1 for one in found)


def test_what_fits_nowhere(compiler):
    """One line: the smallest total, the memory, what would help; and nothing was compiled to find out."""
    with pytest.raises(
        DoesNotFit, match=r"nothing fits 2 of these chips: the smallest .* takes 7\d\.\d\d GB .* 72\.00 of"
    ):
        search(LARGE, CHIPS["h100"], jax.devices()[:2])
    assert not compiler.seen
    with pytest.raises(
        ValueError, match=r"a batch of 3 rows divides over no mesh on which the model does: .* multiple of 2"
    ):
        search(LARGE, CHIPS["v5e"], slice_devices("v5e-16"), batch_size=3)


def test_the_command_shows_proposals(compiler, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # a narrow terminal breaks the headings
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = f"plan --config-json {tmp_path} --search --chip V5E --count 8 --seq 16 --top 2 --target-modules q_proj"
    assert main(command.split()) == 0
    shown = capsys.readouterr()
    assert "rows a device" in shown.out
    assert "each of these was compiled" in shown.out
    assert shown.err.startswith("plan: 10 meshes of 8 devices, ")
    assert main([*command.split(), "--json", "--remat", "dots"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["remat"] == second["remat"] == "dots"
    assert first["bytes"]["total"] == sum(size for name, size in first["bytes"].items() if name != "total")
    assert first["estimates"]["v5e"]["tokens_per_second"] >= second["estimates"]["v5e"]["tokens_per_second"]


@pytest.mark.large
def test_a_proposal_has_been_compiled(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = f"plan --config-json {tmp_path} --search --chip l40s --count 8 --seq 16 --top 1 --batch 16 --rank 4"
    assert main(command.split()) == 0
    assert "peanut" not in capsys.readouterr().err
