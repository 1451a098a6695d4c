"""Loading the decoder: shards, meshes, and checkpoints that are not what their config.json says."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import load_file, save_file

from peanut_jax.files import torch_checkpoint
from peanut_jax.models.loading import load_decoder
from tests.models.test_decoder import build

INDEX = "model.safetensors.index.json"
RULES = [
    (r".*/(q|k|v|gate|up)_proj/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r".*/(o|down)_proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r".*embedding", PartitionSpec("tensor", "fsdp")),
    (r"lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (r".*", PartitionSpec()),
]


def make_mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "whole"
    torch_model, model, params = build("llama2", folder)
    torch_model.save_pretrained(folder.parent / "shards", max_shard_size="20KB")
    return folder.parent, model, params


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built[0] / "shards", tmp_path / "copy")
    return tmp_path / "copy"


def assert_identical(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_shards(built):
    folder, _, params = built
    assert len(list((folder / "shards").glob("*.safetensors"))) > 3
    assert_identical(load_decoder(folder / "shards", jnp.float32)[1], params)


def test_onto_a_mesh(built):
    """Each device holds its slices; the whole is the same."""
    folder, model, params = built
    mesh = make_mesh()
    _, sharded = load_decoder(folder / "shards", jnp.float32, mesh, RULES)
    assert_identical(sharded, params)
    kernel = sharded["params"]["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (3, 8, 16)
    tokens = np.arange(3, 19)[None]
    want = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(jax.jit(model.apply)(sharded, tokens), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RULES[:-1], r"no rule matches 'model/.*scale'"),
        ([(r".*nothing", PartitionSpec()), *RULES], r"rule '\.\*nothing' matches no parameter"),
        ([(r".*q_proj/kernel", PartitionSpec("fsdp")), *RULES], r"q_proj/kernel' of shape \(3, 32, 32\) cannot be cut"),
    ],
)
def test_rules_that_do_not_fit(built, rules, message):
    mesh = make_mesh()
    with pytest.raises(ValueError, match=message):
        load_decoder(built[0] / "shards", jnp.float32, mesh, rules)


def test_rules_need_a_mesh(built):
    with pytest.raises(ValueError, match="rules need a mesh"):
        load_decoder(built[0] / "whole", rules=RULES)


def edit(copy, change):
    """Changes the tensors of the shard that holds the last layer's down_proj."""
    file = copy / json.loads((copy / INDEX).read_text())["weight_map"][NAME]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


NAME = "model.layers.2.mlp.down_proj.weight"


def config_with(copy, **fields):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rename_in_index(copy):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"][NAME] = "model-99999-of-99999.safetensors"
    (copy / INDEX).write_text(json.dumps(index))


def drop(copy):
    edit(copy, lambda tensors: tensors.pop(NAME))
    index = json.loads((copy / INDEX).read_text())
    del index["weight_map"][NAME]
    (copy / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda c: (c / "config.json").unlink(), FileNotFoundError, r"has no config\.json"),
        (lambda c: (c / "config.json").write_text("{"), ValueError, r"not valid JSON"),
        (lambda c: (c / "config.json").write_text("{}"), ValueError, r"model_type None"),
        (lambda c: config_with(c, hidden_act="relu"), ValueError, r"config\.json: hidden_act='relu'"),
        (lambda c: config_with(c, intermediate_size=64), ValueError, r"is \(32, 48\), and its config\.json makes it"),
        (lambda c: config_with(c, num_hidden_layers=4), ValueError, r"lacks 9 tensors .* first 'model\.layers\.3"),
        (
            lambda c: config_with(c, num_hidden_layers=2),
            ValueError,
            r"holds 9 tensors that the decoder has no",
        ),
        (lambda c: config_with(c, attention_bias=True), ValueError, r"lacks 12 tensors .*bias"),
        (lambda c: sorted(c.glob("*.safetensors"))[1].unlink(), FileNotFoundError, r"lists model-00002.* missing"),
        (lambda c: (c / "generation_config.json").write_text("[]"), ValueError, r"generation_config\.json must hold"),
        (
            lambda c: (c / "generation_config.json").write_text('{"eos_token_id": "2"}'),
            ValueError,
            r"generation_config\.json: eos_token_id must be an integer or a list",
        ),
        (rename_in_index, FileNotFoundError, r"lists model-99999.* missing"),
        (drop, ValueError, r"lacks 1 tensors .* first 'model\.layers\.2\.mlp\.down_proj\.weight'"),
        (
            lambda c: edit(c, lambda t: t[NAME].__setitem__((3, 5), np.nan)),
            ValueError,
            r"layers\.2.* holds a NaN",
        ),
        (lambda c: edit(c, lambda t: t.update({NAME: t[NAME].astype(np.int8)})), ValueError, r"dtype I8: quantised"),
    ],
)
def test_damaged_checkpoints(copy, damage, error, message):
    damage(copy)
    with pytest.raises(error, match=message):
        load_decoder(copy, jnp.float32)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A checkpoint whose config ties the head, its parameters, and its tensors."""
    folder = tmp_path_factory.mktemp("tied")
    _, _, params = build("qwen2", folder)
    return folder, params, load_file(folder / "model.safetensors")


def with_head(tied, tmp_path, head):
    shutil.copy(tied[0] / "config.json", tmp_path)
    save_file({**tied[2], "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


EMBEDDING = "model.embed_tokens.weight"


def test_a_tied_head_may_be_in_the_file_too(tied, tmp_path):
    """Some checkpoints hold a copy of the embedding as lm_head; the dtype is not what matters."""
    folder = with_head(tied, tmp_path, tied[2][EMBEDDING])
    assert_identical(load_decoder(folder, jnp.float32)[1], tied[1])
    with_head(tied, tmp_path, tied[2][EMBEDDING].astype(np.float64))
    assert_identical(load_decoder(folder, jnp.float32)[1], tied[1])


@pytest.mark.parametrize("row", [0, 89])
def test_a_tied_head_that_differs(tied, tmp_path, row, monkeypatch):
    """Which of the two is meant, only the user can say."""
    monkeypatch.setattr(torch_checkpoint, "_BLOCK_BYTES", 1000)  # blocks of some rows
    head = tied[2][EMBEDDING].copy()
    head[row, 5] += 1e-3
    folder = with_head(tied, tmp_path, head)
    with pytest.raises(
        ValueError, match=r"ties the head .*'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"
    ):
        load_decoder(folder, jnp.float32)
    _, params = load_decoder(folder, jnp.float32, tie_word_embeddings=False)
    np.testing.assert_array_equal(params["params"]["lm_head"]["kernel"], head.T)


def test_a_head_that_is_missing(tied):
    with pytest.raises(ValueError, match=r"first 'lm_head\.weight'; if the head is the embedding, set tie_word_emb"):
        load_decoder(tied[0], jnp.float32, tie_word_embeddings=False)


def test_rotary_buffers_of_old_checkpoints_are_left_out(copy, built):
    edit(copy, lambda tensors: tensors.update({"model.layers.2.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.layers.2.self_attn.rotary_emb.inv_freq"] = index["weight_map"][NAME]
    (copy / INDEX).write_text(json.dumps(index))
    assert_identical(load_decoder(copy, jnp.float32)[1], built[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_files(built, tmp_path, dtype):
    folder, _, params = built
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder / "whole", torch_dtype=dtype)
    torch_model.save_pretrained(tmp_path)
    _, loaded = load_decoder(tmp_path, jnp.float32)
    name = {torch.float16: jnp.float16, torch.bfloat16: jnp.bfloat16}[dtype]
    assert_identical(loaded, jax.tree.map(lambda leaf: leaf.astype(name).astype(jnp.float32), params))


def test_integer_dtypes_are_refused(built):
    with pytest.raises(ValueError, match="dtype must be a floating dtype"):
        load_decoder(built[0] / "whole", jnp.int8)
