"""Facts about attention dropout in the Flax classes that `hf.load` returns.

- In training each row and head has a mask of its own, as in PyTorch; `dropout_masks="flax"` has one for all of them.
- Outside training nothing changes, and transformers' own modules are left as they are.
- Where Flax's class never drops attention weights, as docs/peft.md says, neither does ours.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.linen.attention import dot_product_attention_weights

from peanut_jax.models import hf, hf_copies, hf_faults
from tests.models.test_hf_init import CONFIGS, OFFERS, make_config

# What asks Linen for attention weights in training. DistilBERT drops them by itself, a mask a row and head, and
# Mistral's class hands its attention no key, so that it cannot train with dropout.
TYPES = sorted(CONFIGS.keys() - {"distilbert", "mistral", "regnet", "resnet"})
# Their layers do not tell their attention that they train.
NEVER_DROP = {"bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "wav2vec2", "whisper", "xglm"}
NEVER_DROP_ACROSS = {"longt5", "mt5", "t5"}
RATE_FIELDS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")
PICTURE = ("pixel_values", np.ones((3, 3, 8, 8), np.float32))
INPUTS = {
    **dict.fromkeys(("beit", "dinov2", "vit"), PICTURE),
    "wav2vec2": ("input_values", np.ones((3, 400), np.float32)),
    "whisper": ("input_features", np.ones((3, 20, 80), np.float32)),
}


def built(model_type, masks):
    """A model that drops half of the attention weights, and parameters from normal(0, 0.05)."""
    config = make_config(model_type, "base")
    for part in (config, getattr(config, "text_config", config), getattr(config, "vision_config", config)):
        for field in RATE_FIELDS:
            if hasattr(part, field):
                setattr(part, field, 0.5)
    flax_class = getattr(transformers, OFFERS[model_type, "base"])
    model = hf_faults.mended(flax_class, masks)(config, _do_init=False)
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: 0.05 * rng.normal(size=leaf.shape), model.params_shape_tree)


def attention_weights(model, params, **call):
    """Those of the first layer for three rows that are the same: name -> [rows, heads, queries, keys]."""
    config, ids = model.config, np.tile(np.arange(5, 17), (3, 1))
    name, values = INPUTS.get(config.model_type, ("input_ids", ids))
    inputs = {name: values}
    if config.model_type == "clip":
        inputs |= dict([PICTURE])
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :6]
    out = model(**inputs, params=params, output_attentions=True, **call)
    towers = [out[tower] for tower in ("text_model_output", "vision_model_output") if tower in out] or [out]
    return {
        f"{number} {name}": layers[0]
        for number, tower in enumerate(towers)
        for name, layers in tower.items()
        if name.endswith("attentions")
    }


def differ(weights, axis):
    """Whether what was dropped differs along an axis."""
    dropped = np.moveaxis(np.asarray(weights) == 0, axis, 0)
    return bool((dropped != dropped[:1]).any())


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name == "bert" else pytest.mark.large) for name in TYPES]
)
def test_each_row_and_head_has_its_own_mask(model_type):
    evaluated = {}
    for masks in ("torch", "flax"):
        model, params = built(model_type, masks)
        train = {"deterministic": False} if model_type == "opt" else {"train": True}
        train["dropout_rng"] = jax.random.key(1)
        run = jax.jit(lambda p, model=model, t=train: (attention_weights(model, p, **t), attention_weights(model, p)))
        trained, evaluated[masks] = run(params)
        assert trained
        for name, weights in trained.items():
            never = model_type in NEVER_DROP or (model_type in NEVER_DROP_ACROSS and "cross" in name)
            heads = 2 if weights.ndim == 5 else 1  # blocks of a local attention come first
            own = masks == "torch" and not never
            assert (differ(weights, 0), differ(weights, heads)) == (own, own), name
            assert never == np.array_equal(weights == 0, evaluated[masks][name] == 0), name
    jax.tree.map(np.testing.assert_array_equal, evaluated["torch"], evaluated["flax"])


@pytest.mark.large
def test_all_architectures_are_known():
    calling = {
        name for name in CONFIGS if hf_copies.calls_attention_weights(getattr(transformers, OFFERS[name, "base"]))
    }
    assert calling == {*TYPES, "mistral"}


@pytest.mark.parametrize(("rate", "keys"), [(0.1, 101), (0.5, 64)])
def test_the_rate_is_kept_and_the_mean_too(rate, keys):
    """With an odd number of keys as well, for two masks share a word of random bits."""
    zeros, key = jnp.zeros((4, keys, 8, 2)), jax.random.key(0)
    weights = keys * np.asarray(hf_copies._weights(zeros, zeros, dropout_rng=key, dropout_rate=rate))
    size = weights.size
    assert weights.shape == (4, 8, keys, keys)
    assert abs((weights == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / size)
    np.testing.assert_allclose(np.unique(weights), [0, 1 / (1 - rate)], rtol=1e-4)
    halves = weights[..., : keys // 2 * 2] == 0
    both = (halves[..., ::2] & halves[..., 1::2]).mean()
    assert abs(both - rate**2) < 5 * rate / np.sqrt(size / 2)


def test_without_dropout_it_is_linens_function():
    query = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    expected = dot_product_attention_weights(query, query)
    for options in ({"deterministic": True, "dropout_rate": 0.5}, {"dropout_rate": 0.0}):
        assert np.array_equal(hf_copies._weights(query, query, **options), expected)
    assert not hf_copies._weights(query, query, dropout_rng=jax.random.key(0), dropout_rate=1.0).any()


def test_transformers_own_modules_stay_as_they_are():
    """And the class stays one of transformers', the same at each call."""
    for name in ("FlaxBertModel", "FlaxT5Model"):
        original = getattr(transformers, name)
        source = sys.modules[original.__module__]
        before = dict(vars(source))
        bucket = getattr(getattr(source, "FlaxT5Attention", None), "_relative_position_bucket", None)
        ours = hf_faults.mended(original)
        assert issubclass(ours, original)
        assert ours is hf_faults.mended(original)
        assert ours.module_class is not original.module_class
        assert vars(source) == before
        assert source.dot_product_attention_weights is dot_product_attention_weights
        assert getattr(getattr(source, "FlaxT5Attention", None), "_relative_position_bucket", None) is bucket


def test_outputs_are_transformers_own():
    ours = sys.modules[hf_faults.mended(transformers.FlaxBertForPreTraining).module_class.__module__]
    source = sys.modules[transformers.FlaxBertForPreTraining.__module__]
    assert ours.FlaxBertForPreTrainingOutput is source.FlaxBertForPreTrainingOutput


def test_an_unknown_kind_of_masks(tmp_path):
    with pytest.raises(ValueError, match="dropout_masks must be one of torch, flax; got 'jax'"):
        hf.load(tmp_path, dropout_masks="jax")
