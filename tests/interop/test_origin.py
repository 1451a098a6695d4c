"""An adapter names the checkpoint that its base was loaded from, and no other."""

import json

import jax
import jax.numpy as jnp

import peanut_jax as pj
from peanut_jax.interop.peft_folder import CONFIG_FILE
from peanut_jax.models import hf
from peanut_jax.models.loading import load_decoder
from peanut_jax.sharding import make_mesh, rules_for, shard

QUERY = pj.PeanutConfig(r=2, target_modules=["query"])


def named(folder, params, config=QUERY):
    adapters = pj.init(jax.random.key(0), params, config)
    pj.save_adapter(folder, adapters, config, params, overwrite=True)
    return json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"]


def test_what_the_loaders_loaded(family, tmp_path):
    one = family("bert")
    _, params = hf.load(one.folder, "base")
    assert named(tmp_path, params) == str(one.folder)
    sharded = shard(params, make_mesh("data=8"), rules_for("bert"))
    assert named(tmp_path, sharded) == str(one.folder)
    adapters = pj.init(jax.random.key(0), params, QUERY)
    pj.to_lora(adapters, params, QUERY, tmp_path / "lora")
    written = json.loads((tmp_path / "lora" / CONFIG_FILE).read_text())
    assert written["base_model_name_or_path"] == str(one.folder)


def test_a_decoder(family, tmp_path):
    one = family("llama")
    _, params = load_decoder(one.folder, jnp.float32)
    assert named(tmp_path, params, pj.PeanutConfig(r=2, target_modules=["q_proj"])) == str(one.folder)


def test_kernels_that_are_not_the_checkpoints_name_none(family, tmp_path):
    one = family("bert")
    _, params = hf.load(one.folder, "base")
    merged = pj.merge(params, pj.init(jax.random.key(1), params, QUERY), QUERY)
    assert named(tmp_path, merged) is None
    assert named(tmp_path, jax.tree.map(lambda leaf: leaf + 0, params)) is None


def test_a_name_that_the_user_gives_stays(family, tmp_path):
    one = family("bert")
    _, params = hf.load(one.folder, "base")
    config = pj.PeanutConfig(r=2, target_modules=["query"], base_model_name_or_path="hub/name")
    assert named(tmp_path, params, config) == "hub/name"
