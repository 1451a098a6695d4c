"""Many devices: rules, derived shardings, and that eight devices train what one does."""

from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from jax.sharding import PartitionSpec

import peanut_jax as pj
from peanut_jax import hlo
from peanut_jax.base.kernels import flatten, replace
from peanut_jax.models import hf, hf_faults
from peanut_jax.models.decoder import Decoder, language_loss, variable_shapes
from peanut_jax.models.decoder_config import from_hf
from peanut_jax.sharding import (
    batch_sharding,
    constrain,
    init_state,
    make_mesh,
    mesh_of,
    param_shardings,
    rules_for,
    shard,
    sharded_train_step,
    state_shardings,
)

BATCH, SEQ, VOCAB = 8, 16, 48


class Case(NamedTuple):
    """A model to train: its parameters as NumPy arrays."""

    model_type: str
    params: dict
    loss_fn: Any
    targets: tuple[str, ...]


@cache
def roberta() -> Case:
    config = transformers.RobertaConfig(
        vocab_size=VOCAB + 1, hidden_size=64, num_hidden_layers=1, num_attention_heads=8, intermediate_size=128,
        max_position_embeddings=SEQ + 2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.FlaxRobertaForSequenceClassification(config, seed=0, input_shape=(1, 4))

    def loss_fn(params, batch, key):
        # With dropout: what is drawn must not depend on the mesh.
        logits = model(batch["tokens"], params=params, dropout_rng=key, train=True).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"][:, 0] % 3).mean()

    return Case("roberta", jax.device_get(model.params), loss_fn, ("query", "value", "dense"))


LLAMA = transformers.LlamaConfig(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=128,
    max_position_embeddings=SEQ, tie_word_embeddings=False,
)  # fmt: skip


@cache
def llama() -> Case:
    model = Decoder(from_hf(LLAMA.to_dict()), jnp.float32)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))

    def loss_fn(params, batch, key):
        total, count = model.apply(
            params, batch["tokens"], batch["labels"], batch["weights"], segments=batch["segments"], chunk=32,
            method="loss",
        )  # fmt: skip
        return total / count, {"weight": count}

    return Case("llama", params, loss_fn, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


TX = optax.adam(1e-2, eps=1e-3)
MODELS = {"roberta": roberta, "llama": llama}
MESHES = ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"]


def config_of(case: Case, orientation: str) -> pj.PeanutConfig:
    # B is drawn, so that every part of theta has a gradient from the first step.
    return pj.PeanutConfig(
        r=4, depth=1, orientation=orientation, target_modules=case.targets, init_weights=False, scaling=0.1,
        dropout=0.1 if case.model_type == "roberta" else 0.0,
    )  # fmt: skip


def batches():
    rng = np.random.default_rng(0)
    for _ in range(5):
        tokens = rng.integers(1, VOCAB, (BATCH, SEQ + 1))
        yield {
            "tokens": tokens[:, :-1].astype(np.int32),
            "labels": tokens[:, 1:].astype(np.int32),
            "weights": (rng.random((BATCH, SEQ)) < 0.7).astype(np.float32),
            "segments": np.repeat([[1, 2]], [5, SEQ - 5], axis=1).repeat(BATCH, 0).astype(np.int32),
        }


@cache
def start(name: str, orientation: str):
    """The state before the first step, on one device."""
    case = MODELS[name]()
    params = shard(case.params, make_mesh("", jax.devices()[:1]), rules_for(name))
    return init_state(jax.random.key(1), params, config_of(case, orientation), TX)


def train(name: str, orientation: str, mesh):
    case = MODELS[name]()
    config = config_of(case, orientation)
    params = shard(case.params, mesh, rules_for(name))
    state = jax.tree.map(jnp.copy, start(name, orientation))  # the step donates it
    shardings = state_shardings(state, params, config)
    state = jax.device_put(state, shardings)
    traced, losses = [], []

    def loss_fn(*args):
        traced.append(len(losses))
        return case.loss_fn(*args)

    step = sharded_train_step(loss_fn, TX, config, state, params, max_grad_norm=1.0)
    for batch in batches():
        state, metrics = step(state, params, jax.device_put(batch, batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    assert set(traced) == {0}  # compiled before the first step, and never again
    return np.array(losses), jax.device_get(state.adapters)


@cache
def one_device(name: str, orientation: str):
    return train(name, orientation, make_mesh("", jax.devices()[:1]))


# In this order the workers of a parallel run share the one-device results.
CASES = [(name, orientation, sizes) for name in MODELS for orientation in ("output", "input") for sizes in MESHES]


EXPLICIT = [
    pytest.param(*case, "explicit", marks=pytest.mark.large) for case in (("roberta", "output"), ("llama", "input"))
]


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "orientation", "sizes"), [*CASES, *EXPLICIT])
def test_eight_devices_train_what_one_does(name, orientation, sizes):
    """Losses and adapters after five steps; with dropout, and packed rows."""
    mesh = make_mesh(MESHES[-1], explicit=True) if sizes == "explicit" else make_mesh(sizes)
    want_losses, want = one_device(name, orientation)
    losses, got = train(name, orientation, mesh)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(leaf - other) <= 1e-5 * np.linalg.norm(other), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_under_pmap(name):
    """pmap over eight devices gives what a plain call gives."""
    case = MODELS[name]()
    config = config_of(case, "output")
    adapters = pj.init(jax.random.key(1), case.params, config)
    forward = pj.adapt(lambda params, batch: case.loss_fn(params, batch, jax.random.key(0)), config)
    batch = next(batches())
    each = jax.tree.map(lambda leaf: leaf.reshape(8, 1, *leaf.shape[1:]), batch)
    got = jax.pmap(forward, in_axes=(None, None, 0))(adapters, case.params, each)
    alone = jax.jit(forward)
    want = [alone(adapters, case.params, jax.tree.map(lambda leaf, i=i: leaf[i], each)) for i in (0, 7)]
    np.testing.assert_allclose(
        jax.tree.leaves(got)[0][jnp.array([0, 7])], [jax.tree.leaves(w)[0] for w in want], rtol=1e-5
    )


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {
    "bert": (transformers.FlaxBertForMaskedLM, transformers.BertConfig(vocab_size=40, **SMALL), ["query", "dense"]),
    "vit": (
        transformers.FlaxViTForImageClassification,
        transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL), ["value", "dense"],
    ),
    "gpt2": (
        transformers.FlaxGPT2LMHeadModel, transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4),
        ["c_attn", "c_fc", "mlp.c_proj"],
    ),
    "t5": (
        transformers.FlaxT5ForConditionalGeneration,
        transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4),
        ["q", "v", "wi", "wo"],
    ),
}  # fmt: skip


@pytest.mark.large
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_every_family(name):
    """Of a model cut on three axes, with what is transposed, fused or tied in it: those of one device."""
    model_class, config, targets = FAMILIES[name]
    model = hf_faults.mended(model_class)(config, seed=0)
    adapter = pj.PeanutConfig(r=4, target_modules=targets, init_weights=False, scaling=0.1)
    rng = np.random.default_rng(0)
    if name == "vit":
        inputs = {"pixel_values": rng.normal(size=(BATCH, 3, 8, 8)).astype(np.float32)}
    else:
        inputs = {"input_ids": rng.integers(1, 40, (BATCH, 12)).astype(np.int32)}
        if name == "t5":
            inputs |= {"decoder_input_ids": rng.integers(1, 40, (BATCH, 6)).astype(np.int32)}

    def fn(params, inputs):
        return jnp.square(model(**inputs, params=params).logits).mean()

    def gradient(mesh, hold):
        params = shard(jax.device_get(model.params), mesh, rules_for(name))
        adapters = pj.init(jax.random.key(0), params, adapter)
        held = constrain(fn, params) if hold else fn
        return jax.jit(jax.grad(pj.adapt(held, adapter)))(
            adapters, params, jax.device_put(inputs, batch_sharding(mesh))
        )

    want = jax.device_get(gradient(make_mesh("", jax.devices()[:1]), hold=False))
    got = jax.device_get(gradient(make_mesh("data=2,fsdp=2,tensor=2"), hold=True))
    for (path, leaf), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(leaf - other) <= 1e-5 * np.linalg.norm(other), jax.tree_util.keystr(path)


def test_general_layers_are_held_by_their_own_axes():
    """Attention cut over its heads moves what one all-reduce of its output moves; with and without biases."""
    mesh = make_mesh("data=2,tensor=4")
    x = jax.ShapeDtypeStruct((4, 16, 32), jnp.float32, sharding=batch_sharding(mesh))
    for use_bias in (True, False):
        model = nn.MultiHeadDotProductAttention(num_heads=8, qkv_features=64, use_bias=use_bias)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        by_head = [
            (r"(query|key|value)/kernel", PartitionSpec(None, "tensor")),
            (r"out/kernel", PartitionSpec("tensor")),
            (r".*", PartitionSpec()),
        ]
        params = shard(shapes, mesh, by_head)
        program = jax.jit(constrain(model.apply, params)).lower(params, x).compile().as_text()
        moved = [(one.kind, one.shapes) for one in hlo.collectives(program)]
        assert moved == [("all-reduce", ("f32[2,16,32]",))]


class Pair(nn.Module):
    """A dense layer that is called by keyword, and a recurrent cell, whose parts return pairs."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(inputs=x)
        cell = nn.OptimizedLSTMCell(16)
        (_, x), _ = cell(cell.initialize_carry(jax.random.key(0), x.shape), x)
        return nn.Dense(8, name="last")(x)


def test_modules_that_are_called_in_other_ways():
    mesh, model = make_mesh("fsdp=4,tensor=2"), Pair()
    x = np.ones((8, 16), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)
    cut = shard(
        params, mesh, [(r".*Dense_0/kernel|last/kernel", PartitionSpec("fsdp", "tensor")), (r".*", PartitionSpec())]
    )
    got = jax.jit(constrain(model.apply, cut))(cut, jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_allclose(got, model.apply(params, x), rtol=1e-5)


def test_a_microbatch_in_which_nothing_counts():
    """The step is that of the other rows; a step in which nothing counts changes nothing."""
    case = llama()
    config = config_of(case, "output")
    batch = next(batches())
    counted = np.arange(BATCH) % 2 == 0  # microbatches are strided: all the others are the second
    batch["weights"] = np.where(counted[:, None], batch["weights"], 0)
    results = []
    for rows, microbatches in ((slice(None), 2), (counted, 1)):
        adapters = pj.init(jax.random.key(1), case.params, config)
        state = pj.TrainState.create(adapters, optax.sgd(0.1), jax.random.key(0))
        model_loss = language_loss(Decoder(from_hf(LLAMA.to_dict()), jnp.float32), chunk=32)
        step = pj.make_train_step(model_loss, optax.sgd(0.1), config, accumulate_steps=microbatches)
        state, metrics = step(state, case.params, {name: leaf[rows] for name, leaf in batch.items()})
        results.append((state.adapters, metrics["loss"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


def test_batches_that_do_not_divide():
    """Else every device would compute the whole of it."""
    case, mesh = llama(), make_mesh("data=8")
    params = shard(case.params, mesh, rules_for("llama"))
    config = config_of(case, "output")
    state = init_state(jax.random.key(0), params, config, TX)
    for microbatches, message in ((1, "4 rows does not divide over 8 data shards"), (2, "8 data shards and 2 micro")):
        step = sharded_train_step(case.loss_fn, TX, config, state, params, accumulate_steps=microbatches)
        rows = {name: leaf[: 4 * microbatches] for name, leaf in next(batches()).items()}
        with pytest.raises(ValueError, match=message):
            step.lower(state, params, rows)
    plain = pj.TrainState.create(pj.init(jax.random.key(0), case.params, config), TX, jax.random.key(0))
    with pytest.raises(ValueError, match="is not on the params' mesh: make it with init_state"):
        sharded_train_step(case.loss_fn, TX, config, plain, params)


def test_a_base_with_a_nan():
    case, mesh = llama(), make_mesh("fsdp=8")
    params = shard(case.params, mesh, rules_for("llama"))
    path = "model/layers/mlp/down_proj/kernel"
    bad = replace(params, {path: flatten(params)[path].at[1, 2, 3].set(np.nan)})
    with pytest.raises(ValueError, match=f"NaN or an infinity: {path}"):
        init_state(jax.random.key(0), bad, config_of(case, "output"), TX)


def test_meshes_of_the_users_own():
    """Any mesh with an axis for the batch."""
    for names in (("data",), ("fsdp",), ("fsdp", "tensor")):
        shape = (8,) if len(names) == 1 else (4, 2)
        kinds = (jax.sharding.AxisType.Auto,) * len(names)
        mesh = jax.make_mesh(shape, names, axis_types=kinds)
        assert batch_sharding(mesh).shard_shape((8, 3)) == (8 // shape[0], 3)
    with pytest.raises(ValueError, match="the mesh has the axes dp, tp: one must be 'data' or 'fsdp'"):
        batch_sharding(jax.make_mesh((4, 2), ("dp", "tp")))


def spec_of(leaf):
    return leaf.sharding.spec


@pytest.mark.parametrize(
    ("orientation", "column_a", "column_b", "row_a", "row_b"),
    [
        ("output", ("tensor", None), (None, "tensor"), ("fsdp", None), (None, "fsdp")),
        ("input", ("fsdp", None), (None, "fsdp"), ("tensor", None), (None, "tensor")),
    ],
)
def test_adapters_and_moments_follow_their_kernels(orientation, column_a, column_b, row_a, row_b):
    """q_proj is cut (fsdp, tensor) and down_proj (tensor, fsdp), each under a replicated layer axis."""
    case, mesh = llama(), make_mesh("data=2,fsdp=2,tensor=2")
    params = shard(case.params, mesh, rules_for("llama"))
    config = pj.PeanutConfig(
        r=4, depth=1, orientation=orientation, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
        layers_to_transform=[1], layers_pattern="layers",
    )  # fmt: skip
    tx = pj.partition(adapters=optax.adamw(1e-3), saved=optax.sgd(1e-3, momentum=0.9))
    state = init_state(jax.random.key(0), params, config, tx)
    q, down = (state.adapters.theta[f"model/layers/{name}/kernel"] for name in ("self_attn/q_proj", "mlp/down_proj"))
    assert (spec_of(q["a"]), spec_of(q["b"])) == (PartitionSpec(None, *column_a), PartitionSpec(None, *column_b))
    assert (spec_of(down["a"]), spec_of(down["b"])) == (PartitionSpec(None, *row_a), PartitionSpec(None, *row_b))
    assert q["encoders"].sharding.is_fully_replicated
    assert spec_of(state.adapters.saved["lm_head/kernel"]) == PartitionSpec("fsdp", "tensor")
    moments = [
        leaf for path, leaf in jax.tree.leaves_with_path(state.opt_state) if "down_proj" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 8
    for leaf, want in zip(jax.tree.leaves(down) * 2, moments, strict=True):
        assert leaf.sharding == want.sharding
    one = pj.init(jax.random.split(jax.random.key(0))[0], case.params, config)
    jax.tree.map(np.testing.assert_array_equal, state.adapters, one)


def test_factors_of_general_kernels():
    """Several output axes: a cut of the first is a cut of their product, any other is none."""
    mesh = make_mesh("fsdp=4,tensor=2")
    params = {"attend": {"kernel": np.zeros((8, 4, 6), np.float32), "bias": np.zeros((4, 6), np.float32)}}
    config = pj.PeanutConfig(r=2, target_modules=["attend"])
    for spec, want in [
        (PartitionSpec("fsdp", "tensor", None), "tensor"),
        (PartitionSpec("fsdp", None, "tensor"), None),
    ]:
        placed = shard(params, mesh, [(".*kernel", spec), (".*", PartitionSpec())])
        state = init_state(jax.random.key(0), placed, config, optax.sgd(1e-3))
        assert spec_of(state.adapters.theta["attend/kernel"]["a"]) == PartitionSpec(want, None)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (transformers.BertConfig(num_hidden_layers=2), "masked-lm"),
        (transformers.RobertaConfig(num_hidden_layers=2), "masked-lm"),
        (transformers.XLMRobertaConfig(num_hidden_layers=2), "question-answering"),
        (transformers.ViTConfig(num_hidden_layers=2), "image-classification"),
        (transformers.T5Config(num_layers=2), "seq2seq-lm"),
        (transformers.MT5Config(num_layers=2), "seq2seq-lm"),
        (transformers.GPT2Config(n_layer=2), "causal-lm"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_every_table_fits_its_architecture(tmp_path, config, task):
    """At the published sizes: every rule is used, and all dense kernels of the layers are cut in both directions."""
    config.save_pretrained(tmp_path)
    model_type, shapes = hf.shapes(tmp_path, task)
    found = param_shardings(shapes, make_mesh("fsdp=4,tensor=2"), rules_for(model_type))
    inside = [path for path in found if path.endswith("kernel") and any(part.isdigit() for part in path.split("/"))]
    assert len(inside) >= 8
    assert all(set(found[path].spec) == {"fsdp", "tensor"} for path in inside)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_of_the_decoder(scan_layers, tied):
    llama_config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=128,
        tie_word_embeddings=tied,
    )  # fmt: skip
    shapes = variable_shapes(Decoder(from_hf(llama_config.to_dict(), scan_layers=scan_layers)))
    found = param_shardings(shapes, make_mesh("fsdp=4,tensor=2"), rules_for("llama", scan_layers=scan_layers))
    kernels = [sharding.spec for path, sharding in found.items() if path.endswith(("kernel", "embedding"))]
    assert all({"fsdp", "tensor"} <= set(spec) for spec in kernels)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("data=16", "16 places and there are 8 devices"),
        ("data=2", "2 places and there are 8 devices"),
        ("data=3,fsdp=-1", "3 must divide 8 devices"),
        ("data=-1,fsdp=-1", "one axis may be -1"),
        ("model=8", "must be like data=2"),
        ("data=two", "must be like data=2"),
        ("data=0", "must be like data=2"),
        ("data=4,data=2", "must be like data=2"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


def test_an_open_axis_takes_what_is_left():
    assert dict(make_mesh("data=-1, tensor=4").shape) == {"data": 2, "fsdp": 1, "tensor": 4}


REST = (".*", PartitionSpec())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("a/kernel", PartitionSpec())], "no rule matches 'b/kernel'"),
        ([("c/kernel", PartitionSpec()), REST], "rule 'c/kernel' matches no parameter"),
        ([REST, ("a/kernel", PartitionSpec())], "rule 'a/kernel' matches no parameter that an earlier rule leaves"),
        ([(".*", PartitionSpec(None, "tensor"))], r"'b/kernel'.*dimension 1 of 3 does not divide by tensor=2"),
        ([(".*", PartitionSpec(None, ("fsdp", "tensor")))], r"'a/kernel'.*4 does not divide by fsdp\*tensor=8"),
        ([(".*", PartitionSpec("model"))], "the mesh has no axis 'model', only data, fsdp, tensor"),
        ([(".*", PartitionSpec(None, None, "fsdp"))], "it has 2 dimensions"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    params = {"a": {"kernel": np.zeros((8, 4))}, "b": {"kernel": np.zeros((8, 3))}}
    with pytest.raises(ValueError, match=message):
        shard(params, make_mesh("fsdp=4,tensor=2"), rules)


def test_bad_arguments():
    with pytest.raises(ValueError, match="no sharding rules for 'gpt_neox'"):
        rules_for("gpt_neox")
    with pytest.raises(ValueError, match="'a/kernel' is not on a mesh"):
        mesh_of({"a": {"kernel": jnp.zeros((8, 4))}})
