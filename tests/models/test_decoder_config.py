"""config.json of a decoder, which anyone may have written: typed, bounded, and one error for what cannot be."""

import json
import random
import time

import pytest
import transformers

from peanut_jax.models import families
from peanut_jax.models.config_fields import SIZES
from peanut_jax.models.decoder_config import DecoderConfig, from_hf, read_config, runs
from peanut_jax.models.rope import Rope
from tests.models.test_decoder import FAMILIES, FIELDS, LLAMA3
from tests.models.test_decoder import SIZES as SMALL

HUGE = 10**400  # a JSON integer that no float holds
QWEN = {**FIELDS, "model_type": "qwen2", "num_key_value_heads": 1, "use_sliding_window": True}


@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("unroll", "original_max_position_embeddings")])
@pytest.mark.parametrize("value", ["2", 2.0, True, [], {}, -1, HUGE, 2**31, 10**5000], ids=range(9))
def test_every_size_is_typed_and_bounded(name, value):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"{name}.* must be ") as error:
        from_hf({**QWEN, name: value})
    assert len(str(error.value)) < 300
    assert time.perf_counter() - start < 1


def test_the_bounds_themselves_are_read():
    """The largest sizes give a config, in no time: nothing is made of a size before it is checked."""
    fields = {**QWEN, **{name: bound for name, bound in SIZES.items() if name != "unroll"}}
    start = time.perf_counter()
    config = from_hf(fields)
    assert config.windows == (None,) * SIZES["num_hidden_layers"]
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_null_heads_of_keys_are_as_many_as_those_of_queries(model_type):
    assert from_hf({**FIELDS, "model_type": model_type, "num_key_value_heads": None}).num_key_value_heads == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "x" * 10**5}, r"model_type 'xxx.*\.\.\..* is not one that"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not one that"),
        ({"layer_types": 3}, r"layer_types must be a list .* got 3"),
        ({"layer_types": [[], "full_attention"]}, r"layer_types must be a list .* got \[\[\]"),
        ({"layer_types": ["full_attention"] * 10**5}, r"layer_types must be a list .* each of 2 layers"),
        ({"layer_types": "ab"}, r"layer_types must be a list .* got 'ab'"),
        ({"use_sliding_window": 1}, r"use_sliding_window must be true or false, got 1"),
        ({"max_window_layers": "x"}, r"max_window_layers must be an integer of at least 0, got 'x'"),
        ({"sliding_window": 1.5}, r"sliding_window must be an integer of at least 1, got 1\.5"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings must be true or false, got 'false'"),
        ({"rms_norm_eps": HUGE}, r"rms_norm_eps must be a number in \[0, 1\)"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps must be a number in \[0, 1\), got nan"),
        ({"head_dim": 0}, r"head_dim must be an integer of at least 1, got 0"),
        ({"model_type": "llama", "attention_bias": "no"}, r"attention_bias must be true or false, got 'no'"),
        ({"model_type": "llama", "mlp_bias": 0}, r"mlp_bias must be true or false, got 0"),
        ({"quantization_config": {"a": {"b": ["c" * 10**5]}}}, r"quantization_config=.* is not supported"),
    ],
)
def test_fields_of_other_types(change, message):
    from_hf(QWEN)
    with pytest.raises(ValueError, match=message) as error:
        from_hf({**QWEN, **change})
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("field", ["scan_layers", "qk_norm", "qkv_bias"])
def test_overrides_are_typed_too(field):
    with pytest.raises(ValueError, match=f"{field} must be true or false, got 'no'"):
        from_hf(FIELDS, **{field: "no"})


@pytest.mark.parametrize("config_class", sorted({f[0] for f in FAMILIES.values()}, key=lambda one: one.__name__))
def test_a_head_is_tied_where_transformers_ties_it(config_class):
    """The families' own default, whatever that of PretrainedConfig is (true)."""
    fields = {**FIELDS, "model_type": config_class.model_type, "num_key_value_heads": 1}
    assert transformers.PretrainedConfig().tie_word_embeddings
    assert from_hf(fields).tie_word_embeddings == config_class().tie_word_embeddings
    assert not from_hf({**fields, "tie_word_embeddings": None}).tie_word_embeddings
    assert from_hf({**fields, "tie_word_embeddings": True}).tie_word_embeddings


# ---- rope_parameters of transformers 5 beside rope_scaling and rope_theta of 4


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({}, Rope()),
        ({"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 500000}, Rope(5e5)),
        ({"rope_parameters": LINEAR, "rope_theta": 5e5}, Rope(5e5, "linear", 4.0)),
        (
            {"rope_parameters": {**LINEAR, "rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 4},
             "rope_theta": 5e5},
            Rope(5e5, "linear", 4.0),
        ),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3}, Rope(1e4, "llama3", 8.0, 1.0, 4.0, 16)),
        ({"rope_scaling": {**LINEAR, "type": "linear"}}, Rope(1e4, "linear", 4.0)),
        ({"rope_scaling": {}}, Rope()),
    ],
)  # fmt: skip
def test_ropes(fields, rope):
    assert from_hf({**FIELDS, **fields}).rope == rope


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
            r"rope_parameters=\{'rope_type': 'default'\} and rope_scaling=\{.*4\.0.*\} contradict each other",
        ),
        (
            {"rope_parameters": LINEAR, "rope_scaling": {**LINEAR, "factor": 2.0}},
            r"rope_parameters=.*4\.0.*rope_scaling=.*2\.0.* contradict",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 5e5},
            r"rope_theta=500000\.0 and the rope_theta=1000000\.0 of rope_parameters contradict",
        ),
        (
            {"rope_scaling": {**LINEAR, "rope_theta": 1e6}, "rope_theta": 5e5},
            r"rope_theta=500000\.0 and the rope_theta=1000000\.0 of rope_scaling contradict",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "default"}},
            r"rope_parameters=.* and rope_scaling=.* contradict",
        ),
        (
            {"rope_scaling": {**LINEAR, "type": "llama3"}},
            r"rope_type='linear' and type='llama3' of rope_scaling contrad",
        ),
        (
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}}},
            r"rope_parameters by type of layer \('full_attention'\) is not supported",
        ),
        ({"rope_scaling": {"type": []}}, r"rope type \[\] is not supported, only default, linear, llama3"),
        ({"rope_scaling": {"rope_type": {"a": 1}}}, r"rope_scaling by type of layer"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling has 'factor' and lacks rope_type"),
        ({"rope_scaling": 0}, r"rope_scaling must be an object, got 0"),
        ({"rope_parameters": []}, r"rope_parameters must be an object, got \[\]"),
        ({"rope_scaling": {**LINEAR, "factor": None}}, r"rope type 'linear' needs factor"),
        ({"rope_scaling": {**LINEAR, "factor": HUGE}}, r"factor must be a number above 0, got 1000"),
        ({"rope_scaling": {**LINEAR, "factor": 1e-300}}, r"factor must be between 1e-06 and 1e\+15, got 1e-300"),
        ({"rope_theta": True}, r"rope_theta must be a number above 0, got True"),
        ({"rope_theta": HUGE}, r"rope_theta must be a number above 0"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4}},
            r"low_freq_factor=4\.0 must be below high_freq_factor=4\.0",
        ),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "16"}},
            r"original_max_position_embeddings must be an integer of at least 1, got '16'",
        ),
    ],
)
def test_ropes_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        from_hf({**FIELDS, **fields})
    assert len(str(error.value)) < 500


# ---- anything at all


def value(rng, depth=0):
    """A random JSON value."""
    kind = rng.randrange(9)
    if kind < 2 and depth < 3:
        items = [value(rng, depth + 1) for _ in range(rng.randrange(5))]
        names = ("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "full_attention",
                 "original_max_position_embeddings")  # fmt: skip
        return items if kind else {rng.choice(names): item for item in items}
    if kind == 2:
        nested = []
        for _ in range(rng.choice((10, 2000))):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested
    if kind == 3:
        return rng.choice(("", "x", "default", "linear", "llama3", "silu", "x" * 10**5, "\ud800", "\0"))
    if kind == 4:
        return rng.choice((0.5, 1.0, -1.0, 1e308, 5e-324, float("inf"), float("nan")))
    if kind == 5:
        return rng.choice((None, True, False))
    if kind == 6:
        return rng.choice((0, -1, 1024, 1025, 2**31, 2**63, HUGE, -HUGE, 10**5000))
    return rng.randrange(1, 100)


def test_random_values_in_every_field():
    """A config or one ValueError that fits a screen, in milliseconds."""
    rng = random.Random(0)
    whole = [{**one(**{**SMALL, **own}).to_dict(), "model_type": one.model_type} for one, own in FAMILIES.values()]
    names = sorted({name for fields in whole for name in fields} | {"rope_parameters", "rope_scaling", "layer_types",
                   "repetition_penalty", "quantization_config", "max_window_layers"})  # fmt: skip
    read = 0
    for _ in range(1500):
        fields = {**rng.choice(whole), **{rng.choice(names): value(rng) for _ in range(rng.choice((1, 1, 2)))}}
        start = time.perf_counter()
        said = ""
        try:
            hash(from_hf(fields))
        except ValueError as error:
            said = str(error)
        read += not said
        assert len(said) < 500, fields
        assert time.perf_counter() - start < 1, fields
    assert 500 < read < 1400


def test_files(tmp_path):
    """The same from disk, with the file's name in the error; `runs` says no to what it cannot read as a type."""
    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, "num_hidden_layers": 2147483648}))
    with pytest.raises(ValueError, match=r"config\.json: num_hidden_layers must be at most 1024, got 2147483648"):
        read_config(str(tmp_path))
    assert runs(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ["llama"]}))
    assert not runs(str(tmp_path))
    assert isinstance(from_hf(FIELDS), DecoderConfig)
