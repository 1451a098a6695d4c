"""The decoder against transformers' torch classes, on tiny random checkpoints of every family."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import peanut_jax as pj
from peanut_jax.architectures import ARCHITECTURES
from peanut_jax.base.kernels import flatten
from peanut_jax.models import families
from peanut_jax.models.attention.roads import fits_cudnn
from peanut_jax.models.cache import empty_cache
from peanut_jax.models.decoder_config import from_hf
from peanut_jax.models.head_loss import cross_entropy
from peanut_jax.models.loading import load_decoder, torch_names

SIZES = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# Name -> (config class, fields). Each differs from the first in what its family adds.
FAMILIES = {
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": (transformers.LlamaConfig, {"rope_theta": 500000.0}),
    "llama3.1": (transformers.LlamaConfig, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama3.2": (transformers.LlamaConfig, {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "linear": (transformers.LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 7, "head_dim": 16}),
    "mistral-full": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen2-window": (
        transformers.Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 24, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3-window": (
        transformers.Qwen3Config,
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2,
         "attention_bias": True},
    ),
}  # fmt: skip
LENGTH = 40  # past every sliding window, and past llama3's original context of 16


def build(name, folder):
    """A random torch model of the family, its folder, and ours."""
    config_class, fields = FAMILIES[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **fields})).eval()
    for parameter in model.parameters():  # biases and norms too
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model, *load_decoder(folder, jnp.float32)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    @functools.cache
    def make(name):
        folder = tmp_path_factory.getbasetemp() / f"decoder-{name}"
        return folder, *build(name, folder)

    return make


def tokens_and_mask(padding):
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(3, SIZES["vocab_size"], (3, LENGTH)), np.ones((3, LENGTH), int)
    for row, count in ((1, 9), (2, 30)):
        span = slice(0, count) if padding == "left" else slice(LENGTH - count, None)
        if padding != "none":
            tokens[row, span], mask[row, span] = 0, 0
    return tokens, mask


@pytest.mark.matrix
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(family, name, padding):
    _, torch_model, model, params = family(name)
    tokens, mask = tokens_and_mask(padding)
    with torch.no_grad():
        want = torch_model(torch.from_numpy(tokens), torch.from_numpy(mask)).logits.numpy()
    forward = jax.jit(model.apply)
    got = forward(params, tokens) if padding == "none" else forward(params, tokens, mask)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got)[mask == 1], want[mask == 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama3.1", "mistral", "qwen2-window", "qwen3"])
def test_cache(family, name):
    """A prompt and then one token at a time gives the logits of the whole row at once, padding or none."""
    _, _, model, params = family(name)
    tokens, mask = tokens_and_mask("left")
    whole = jax.jit(model.apply)(params, tokens, mask)
    prompt, step = (jax.jit(functools.partial(model.apply, method=name)) for name in ("prompt", "step"))
    split = LENGTH - 6
    empty = empty_cache(model.config, 3, 64, jnp.float32)
    logits, cache = prompt(params, tokens[:, :split], mask[:, :split] == 1, empty)
    for i in range(split, LENGTH):
        np.testing.assert_allclose(logits, whole[:, i - 1], rtol=0, atol=2e-5)
        logits, cache = step(params, tokens[:, i], cache)
    np.testing.assert_allclose(logits, whole[:, -1], rtol=0, atol=2e-5)
    assert int(cache.filled) == LENGTH


def test_nothing_sees_later_tokens_or_other_sequences(family):
    """Positions that begin again, a segment's number that comes again, padding beside segments."""
    _, _, model, params = family("llama3")
    forward = jax.jit(model.apply)
    tokens, _ = tokens_and_mask("none")
    tokens = tokens[:1, :6]
    later = tokens.copy()
    later[:, 3:] = 20
    again = np.array([[0, 1, 2, 0, 1, 2]])
    np.testing.assert_array_equal(
        forward(params, tokens, positions=again)[:, :3], forward(params, later, positions=again)[:, :3]
    )
    segments = np.array([[1, 1, 1, 2, 1, 1]])
    alone = forward(params, tokens[:, 4:])
    np.testing.assert_allclose(forward(params, tokens, segments=segments)[:, 4:], alone, rtol=0, atol=2e-5)
    mask = np.array([[1, 1, 1, 1, 1, 0]])
    tokens[0, 5] = SIZES["vocab_size"]  # a padding id outside the vocabulary
    padded = forward(params, tokens, mask, segments=np.ones((1, 6), int))
    np.testing.assert_allclose(padded[:, :5], forward(params, tokens[:, :5]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("token", [SIZES["vocab_size"], -1, 2**32 + 3])
def test_ids_outside_the_vocabulary_are_refused(family, token):
    """Where the values are known: outside of `jax.jit`, and as constants within."""
    _, _, model, params = family("llama3")
    tokens = np.array([[5, 6, token], [7, 8, 9]])
    message = rf"hold token {token}, outside the model's vocabulary of 90"
    with pytest.raises(ValueError, match=f"tokens {message}"):
        model.apply(params, tokens)
    with pytest.raises(ValueError, match=f"tokens {message}"):
        jax.jit(lambda params: model.apply(params, tokens))(params)
    with pytest.raises(ValueError, match=f"labels {message}"):
        model.apply(params, tokens % 9, tokens, np.ones((2, 3)), method="loss")


def test_traced_ids_outside_the_vocabulary(family):
    """NaN for the whole row, never another token's numbers: as an index -1 would be the last row."""
    _, _, model, params = family("llama3")
    got = jax.jit(model.apply)(params, np.array([[5, 6, SIZES["vocab_size"]], [5, -1, 6], [7, 8, 9]]))
    assert np.isnan(got[:2]).all()
    assert np.isfinite(got[2]).all()


def test_labels_outside_the_vocabulary():
    """Where they count the loss is NaN, and where they do not any id will do."""
    logits, counts = jnp.arange(12.0).reshape(3, 4) ** 0.5, jnp.array([1.0, 1.0, 0.0])
    want = -jax.nn.log_softmax(logits)[jnp.arange(2), jnp.array([1, 3])].sum()
    for last in (-100, 2, 4):
        np.testing.assert_allclose(cross_entropy(logits, jnp.array([1, 3, last]), counts), want, rtol=1e-6)
    for counted in (-100, -1, 4):
        assert np.isnan(cross_entropy(logits, jnp.array([1, counted, 2]), counts))


@pytest.mark.parametrize(
    "tokens", [np.array([[1.0, 2.0]]), [[1, 2]], np.array([[True]])], ids=["float", "list", "bool"]
)
def test_tokens_are_integers(family, tokens):
    _, _, model, params = family("llama3")
    with pytest.raises(ValueError, match="tokens must be an array of integers, got"):
        model.apply(params, tokens, method="hidden")


@pytest.mark.parametrize("name", ["llama3.1", "mistral"])
def test_packed_rows_are_their_sequences(family, name):
    _, _, model, params = family(name)
    tokens, _ = tokens_and_mask("none")
    forward = jax.jit(model.apply)
    lengths = (13, 20, 5)  # and two of padding
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    packed = forward(params, tokens[:1], segments=segments)
    start = 0
    for length in lengths:
        alone = forward(params, tokens[:1, start : start + length])
        np.testing.assert_allclose(packed[:, start : start + length], alone, rtol=0, atol=2e-5)
        start += length


def test_loss(family):
    """Chunks of any size give the cross-entropy of the weighted tokens, and its gradient."""
    _, _, model, params = family("qwen3")
    tokens, mask = tokens_and_mask("right")
    labels, weights = np.roll(tokens, -1, 1), (mask * (np.arange(LENGTH) % 3 != 0)).astype(np.float32)
    logits = jax.nn.log_softmax(model.apply(params, tokens, mask))
    want = -(np.take_along_axis(np.asarray(logits), labels[..., None], -1)[..., 0] * weights).sum()

    def loss(params, chunk):
        return model.apply(params, tokens, labels, weights, mask, chunk=chunk, method="loss")

    grads = {}
    for chunk in (7, 60, 4096):
        (total, count), grads[chunk] = jax.value_and_grad(lambda p, c=chunk: loss(p, c), has_aux=True)(params)
        np.testing.assert_allclose(total, want, rtol=1e-5)
        assert count == weights.sum()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads[7], grads[4096])


def test_the_loss_holds_one_chunk_of_logits(family):
    """Read from the program: no float32 array of [tokens, vocab]."""
    _, _, model, params = family("llama2")
    tokens = jnp.zeros((4, 32), jnp.int32)

    def loss(params):
        return model.apply(params, tokens, tokens, jnp.ones(tokens.shape), chunk=16, method="loss")[0]

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    vocab = SIZES["vocab_size"]
    assert f"tensor<16x{vocab}xf32>" in text
    assert f"128x{vocab}xf32" not in text
    assert f"4x32x{vocab}xf32" not in text


def test_the_loss_keeps_a_batch_on_its_devices(family):
    """No hidden states are gathered from the devices that the batch is spread over."""
    _, _, model, params = family("llama2")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def loss(params, tokens):
        return model.apply(params, tokens, tokens, jnp.ones(tokens.shape), chunk=64, method="loss")[0]

    text = jax.jit(loss).lower(params, tokens).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_what_remat_keeps(family):
    """Per token and layer: the input, then what the policy names. Of an adapted layer the sum, and not its parts."""
    folder, _, _, params = family("llama3")
    config = pj.PeanutConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"])
    adapters, tokens = pj.init(jax.random.key(0), params, config), jnp.ones((2, 7), jnp.int32)
    q, kv, wide, width = 32, 16, SIZES["intermediate_size"], SIZES["hidden_size"]

    def kept(remat):
        model, _ = load_decoder(folder, jnp.float32, remat=remat)
        forward = pj.adapt(lambda params: model.apply(params, tokens, method="hidden").sum(), config)
        shapes = [
            leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(forward, a, params), adapters)[1])
        ]
        layers = SIZES["num_hidden_layers"]
        return sorted(math.prod(shape[3:]) for shape in shapes if shape[:3] == (layers, 2, 7))

    full = kept("full")
    assert width in full
    assert kept("attention") == sorted([*full, q, kv, kv, width, 3, 3, 3])
    assert kept("dots") == sorted([*full, q, kv, kv, width, 3, 3, 3, wide, wide])


@pytest.mark.matrix
@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_remat_and_unrolling_change_nothing(family, remat, unroll):
    folder, _, model, params = family("llama2")
    tokens, _ = tokens_and_mask("none")
    other, _ = load_decoder(folder, jnp.float32, remat=remat, unroll=unroll)

    def loss(model, params):
        return jnp.square(model.apply(params, tokens)).mean()

    want = jax.grad(functools.partial(loss, model))(params)
    got = jax.grad(functools.partial(loss, other))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


@pytest.mark.parametrize("name", ["llama3.2", "qwen2-window"])
def test_layers_without_a_scan(family, name):
    """The same tensors under `model/layers/0/...`, the same function, the same adapters on disk."""
    folder, _, model, params = family(name)
    apart, own = load_decoder(folder, jnp.float32, scan_layers=False)
    kernel = own["params"]["model"]["layers"]["2"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, params["params"]["model"]["layers"]["mlp"]["up_proj"]["kernel"][2])
    tokens, mask = tokens_and_mask("left")
    got = jax.jit(apart.apply)(own, tokens, mask)
    np.testing.assert_allclose(got, jax.jit(model.apply)(params, tokens, mask), rtol=0, atol=2e-5)
    config = pj.PeanutConfig(r=2, target_modules=["q_proj"])
    assert pj.fingerprint(own, config) == pj.fingerprint(params, config)


def test_bfloat16(family):
    """Weights and activations in bfloat16; logits in float32, within bfloat16's rounding of the layers' sums."""
    folder, torch_model, _, _ = family("llama3")
    tokens, _ = tokens_and_mask("none")
    model, params = load_decoder(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16", "float32"}
    got = model.apply(params, tokens)
    assert got.dtype == jnp.float32
    with torch.no_grad():
        want = torch_model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_module_names_are_transformers(family):
    _, torch_model, _, params = family("qwen3")
    ours = {name for path, leaf in flatten(params).items() for name in torch_names(path, leaf.shape)}
    theirs = {name for name, _ in torch_model.named_parameters()}
    assert ours == theirs


@pytest.mark.parametrize("orientation", ["output", pytest.param("input", marks=pytest.mark.large)])
def test_training(family, orientation):
    """Through scan, remat and the chunked head, itself adapted: the gradient is that of the merged weights."""
    _, _, model, params = family("llama3")
    tokens, _ = tokens_and_mask("none")
    batch = {"tokens": tokens, "segments": np.repeat([1, 2, 0], [25, 10, 5])[None].repeat(3, 0)}
    config = pj.PeanutConfig(
        r=3, depth=1, orientation=orientation, target_modules=["q_proj", "down_proj", "lm_head"], init_weights=False
    )
    adapters = pj.init(jax.random.key(0), params, config)

    def loss_fn(params, batch, key):
        ids, segments = batch["tokens"], batch["segments"]
        labels, weights = jnp.roll(ids, -1, 1), segments != 0
        total, count = model.apply(params, ids, labels, weights, segments=segments, chunk=17, method="loss")
        return total / count, {"weight": count}

    forward = pj.adapt(lambda params: loss_fn(params, batch, None)[0], config)
    got = jax.jit(jax.grad(forward))(adapters, params)
    want = jax.jit(jax.grad(lambda adapters: loss_fn(pj.merge(params, adapters, config), batch, None)[0]))(adapters)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=2e-4 * np.abs(w).max()), got, want)

    tx = optax.adam(3e-3)
    step = pj.make_train_step(loss_fn, tx, config, accumulate_steps=3)
    state = pj.TrainState.create(adapters, tx, jax.random.key(1))
    losses = []
    for _ in range(5):
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        ((jnp.bfloat16, 128, 256, 256), True),
        ((jnp.float16, 64, 2048, 4096), True),
        ((jnp.float32, 128, 256, 256), False),
        ((jnp.bfloat16, 160, 256, 256), False),
        ((jnp.bfloat16, 100, 256, 256), False),
        ((jnp.bfloat16, 128, 255, 256), False),
        ((jnp.bfloat16, 128, 1, 256), False),
    ],
)
def test_what_goes_to_cudnn(shapes, fits):
    assert fits_cudnn(*shapes) is fits


# ---- config.json: what is refused


FIELDS = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
          "num_attention_heads": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, r"model_type 'mixtral' is not one that the decoder runs: llama, mistral"),
        ({"model_type": None}, r"model_type None"),
        ({"hidden_size": None}, r"hidden_size is missing"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported"),
        ({"num_local_experts": 8}, r"num_local_experts=8 is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=.* is not supported"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, r"rope type 'llama3' needs low_freq_factor"),
        ({"num_attention_heads": 3}, r"hidden_size=8 must be a multiple of num_attention_heads=3"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"must be a multiple of num_key_value_heads=3"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be an integer of at least 1"),
        ({"num_hidden_layers": "2"}, r"num_hidden_layers must be an integer of at least 1, got '2'"),
        ({"head_dim": 3}, r"head_dim must be even"),
        ({"rms_norm_eps": "1e-5"}, r"rms_norm_eps must be a number"),
        ({"rope_theta": "x"}, r"rope_theta must be a number above 0, got 'x'"),
        ({"rope_scaling": [1]}, r"rope_scaling must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5 is not supported"),
        (
            {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 0},
            r"sliding_window must be an integer",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            r"layer_types must be .* each of 2 layers",
        ),
    ],
)
def test_configs_that_are_refused(change, message):
    from_hf(FIELDS)
    with pytest.raises(ValueError, match=message):
        from_hf({**FIELDS, **change})


def test_overrides_are_checked():
    with pytest.raises(ValueError, match=r"remat must be one of .*'some'"):
        from_hf(FIELDS, remat="some")
    with pytest.raises(ValueError, match=r"attention must be one of .*'flash'"):
        from_hf(FIELDS, attention="flash")
    with pytest.raises(ValueError, match=r"'rematerialise' is no field of DecoderConfig"):
        from_hf(FIELDS, rematerialise=True)


def test_defaults_of_fields_that_are_left_out():
    """Old files leave out what was added later; transformers' own config classes say what they mean."""
    for model_type, (config_class, _) in {f[0].model_type: f for f in FAMILIES.values()}.items():
        fields = {**FIELDS, "model_type": model_type, "num_attention_heads": 32, "hidden_size": 128}
        reference = config_class(**{name: value for name, value in fields.items() if name != "model_type"})
        ours, theirs = from_hf(fields), from_hf(reference.to_dict())
        assert dataclasses.replace(ours, rms_norm_eps=1e-6) == dataclasses.replace(theirs, rms_norm_eps=1e-6)


def test_fields_that_a_family_does_not_read():
    """transformers' Mistral and Qwen2 have no such biases; a null num_key_value_heads means as many as heads."""
    mistral = from_hf({**FIELDS, "model_type": "mistral", "num_key_value_heads": None, "attention_bias": True})
    assert (mistral.num_key_value_heads, mistral.qkv_bias) == (2, False)
    assert not from_hf({**FIELDS, "model_type": "qwen2", "num_key_value_heads": 1, "mlp_bias": True}).mlp_bias
    with pytest.raises(ValueError, match=r"windows must be a tuple with one of 1 layers each"):
        from_hf(FIELDS, num_hidden_layers=1)


def test_every_family_can_be_sharded_and_adapted():
    rows = {name for row in ARCHITECTURES if row.rules and row.layer_rules for name in row.model_types}
    assert rows == set(families.FAMILIES)


def test_rope_parameters_of_transformers_5():
    scaling = {**LLAMA3, "rope_theta": 5e5}
    assert from_hf({**FIELDS, "rope_parameters": scaling}) == from_hf(
        {**FIELDS, "rope_theta": 5e5, "rope_scaling": LLAMA3}
    )
