"""HF PEFT reads what we write and we read what it writes: the same update, the same logits, on real torch models."""

import dataclasses
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

import peanut_jax as pj
from peanut_jax.interop.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from peanut_jax.updates import LowRank
from tests.interop.conftest import scanned
from tests.oracle import bridge

TASK_TYPES = {"roberta": "SEQ_CLS", "bert": "SEQ_CLS", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "vit": None}
DENSE = sorted(TASK_TYPES)


def drawn(params, config, seed=0):
    """An adapter that does something, saved modules included."""
    adapters = pj.init(jax.random.key(seed), params, config)
    return jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 1 else leaf * 1.5, adapters)


def assert_identical(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(jax.tree.leaves(jax.tree.map(lambda g, w: g.dtype == w.dtype, got, want)))


@pytest.mark.matrix
@pytest.mark.parametrize("act_fn", ["relu", "gelu", "tanh", "silu"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("name", DENSE)
def test_both_ways(family, tmp_path, name, depth, act_fn):
    one = family(name)
    fields = {
        "r": 5, "depth": depth, "act_fn": act_fn, "scaling": 0.5, "target_modules": one.targets, "init_weights": False,
        "task_type": TASK_TYPES[name], "modules_to_save": ["classifier"] if name == "vit" else None,
    }  # fmt: skip
    # PEFT's adapter, read here.
    theirs = bridge.wrap(one.twin.torch, seed=1, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    adapters, config = pj.load_adapter(tmp_path / "theirs", one.params)
    assert_identical(adapters, jax.tree.map(jnp.asarray, bridge.adapters(theirs)))
    for path, layer in bridge.layers(theirs).items():
        update = layer.get_delta_weight("default").detach().numpy().T
        pair = pj.factors(adapters, one.params, config)[path]
        np.testing.assert_allclose(pair.delta(), update, rtol=0, atol=1e-5 * np.abs(update).max())
    logits = one.logits(pj.merge(one.params, adapters, config))
    np.testing.assert_allclose(logits, one.torch_logits(theirs), rtol=0, atol=1e-5)

    # Ours, read by PEFT.
    ours = drawn(one.params, config)
    pj.save_adapter(tmp_path / "ours", ours, config, one.params)
    loaded = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path / "ours")
    logits = one.logits(pj.merge(one.params, ours, config))
    assert np.abs(logits - one.logits(one.params)).max() > 1e-2
    np.testing.assert_allclose(one.torch_logits(loaded), logits, rtol=0, atol=1e-5)
    assert_identical(*(tree for tree in (pj.load_adapter(tmp_path / "ours", one.params)[0], ours)))


def torch_copy(one):
    """A fresh copy: PEFT changes the model that it is given."""
    return type(one.twin.torch).from_pretrained(one.folder)


def test_the_files_are_pefts(family, tmp_path):
    """The same tensors under the same names, and the same fields of the config but for bookkeeping."""
    one = family("roberta")
    fields = {"r": 3, "depth": 1, "target_modules": one.targets, "init_weights": False, "task_type": "SEQ_CLS"}
    theirs = bridge.wrap(one.twin.torch, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    adapters, config = pj.load_adapter(tmp_path / "theirs", one.params)
    pj.save_adapter(tmp_path / "ours", adapters, config, one.params)
    ours, reference = (load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("ours", "theirs"))
    assert ours.keys() == reference.keys()
    assert all(np.array_equal(ours[key], reference[key]) for key in ours)
    ours, reference = (json.loads((tmp_path / folder / CONFIG_FILE).read_text()) for folder in ("ours", "theirs"))
    for fields in (ours, reference):
        fields["target_modules"] = sorted(fields["target_modules"])
    assert reference.pop("peft_version")
    assert reference.pop("modules_to_save") == ["classifier", "score"]  # the heads of the task, which it adds itself
    assert ours.pop("modules_to_save") is None
    assert (ours.pop("base_model_name_or_path"), reference.pop("base_model_name_or_path")) == (str(one.folder), None)
    assert ours == reference


@pytest.mark.parametrize("orientation", ["output", "input"])
def test_scanned_layers(family, tmp_path, orientation):
    """A stack is split into torch's numbered layers; either layout reads either."""
    one = family("llama")
    stacked = scanned(one.params, "model", "layers")
    config = pj.PeanutConfig(r=4, depth=1, orientation=orientation, target_modules=one.targets, init_weights=False)
    adapters = drawn(stacked, config)
    pj.save_adapter(tmp_path / "stack", adapters, config, stacked)
    assert_identical(pj.load_adapter(tmp_path / "stack", stacked)[0], adapters)

    apart, config = pj.load_adapter(tmp_path / "stack", one.params)
    updates = pj.factors(adapters, stacked, config)
    for path, pair in pj.factors(apart, one.params, config).items():
        row, path = int(path.split("/")[2]), path.replace("/0/", "/").replace("/1/", "/")
        np.testing.assert_array_equal(pair.delta(), LowRank(*(side[row] for side in updates[path])).delta())
    pj.save_adapter(tmp_path / "apart", apart, config, one.params)
    assert_identical(pj.load_adapter(tmp_path / "apart", stacked)[0], adapters)
    if orientation == "output":
        loaded = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path / "stack")
        want = one.logits(pj.merge(one.params, apart, config))
        np.testing.assert_allclose(one.torch_logits(loaded), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {"target_modules": r".*\.[qk]_proj", "layers_to_transform": [1]},  # PEFT ignores the layers of a regex
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["self_attn.o_proj", "mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": r"model\.layers\.(0\.)?self_attn\.q_proj", "layers_to_transform": [0]},
    ],
)
@pytest.mark.parametrize("layout", ["apart", "stacked"])
def test_selections_reach_the_same_modules(family, tmp_path, selection, layout):
    one = family("llama")
    params = scanned(one.params, "model", "layers") if layout == "stacked" else one.params
    config = pj.PeanutConfig(r=2, init_weights=False, **selection)
    adapters = drawn(params, config)
    pj.save_adapter(tmp_path, adapters, config, params)
    again, _ = pj.load_adapter(tmp_path, params)
    assert_identical(again, adapters)
    loaded = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path)
    apart, config = pj.load_adapter(tmp_path, one.params)
    assert bridge.layers(loaded).keys() == apart.theta.keys()
    want = one.logits(pj.merge(one.params, apart, config))
    np.testing.assert_allclose(one.torch_logits(loaded), want, rtol=0, atol=1e-5)


def test_saved_modules_in_a_stack(family, tmp_path):
    one = family("llama")
    params = scanned(one.params, "model", "layers")
    config = pj.PeanutConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm", "o_proj", "embed_tokens"]
    )
    adapters = drawn(params, config)
    pj.save_adapter(tmp_path, adapters, config, params)
    assert_identical(pj.load_adapter(tmp_path, params)[0], adapters)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    kernel = adapters.saved["model/layers/self_attn/o_proj/kernel"]
    np.testing.assert_array_equal(saved["base_model.model.model.layers.1.self_attn.o_proj.weight"], kernel[1].T)
    np.testing.assert_array_equal(
        saved["base_model.model.model.embed_tokens.weight"], adapters.saved["model/embed_tokens/embedding"]
    )


def test_scalars_and_stacks_that_are_only_saved(tmp_path):
    """A layer norm of a scanned stack in which nothing is adapted, and a parameter without axes."""
    params = {
        "encoder": {"layers": {"q": {"kernel": jnp.ones((2, 4, 4))}}},
        "decoder": {"layers": {"q": {"kernel": jnp.ones((3, 4, 4))}, "ln": {"scale": jnp.ones((3, 4))}}},
        "heat": {"temperature": jnp.ones(())},
    }
    config = pj.PeanutConfig(r=2, target_modules=["encoder.layers.q"], modules_to_save=["ln", "heat"])
    adapters = drawn(params, config)
    pj.save_adapter(tmp_path, adapters, config, params)
    assert load_file(tmp_path / WEIGHTS_FILE)["base_model.model.decoder.layers.2.ln.weight"].shape == (4,)
    assert_identical(pj.load_adapter(tmp_path, params)[0], adapters)


def test_convolutions_among_saved_modules(family, tmp_path):
    """ViT's patch embedding is a convolution, [h, w, in, out] in Flax and [out, in, h, w] in torch."""
    one = family("vit")
    config = pj.PeanutConfig(r=2, target_modules=["query"], modules_to_save=["projection"])
    adapters = drawn(one.params, config)
    pj.save_adapter(tmp_path, adapters, config, one.params)
    assert_identical(pj.load_adapter(tmp_path, one.params)[0], adapters)
    loaded = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path)
    want = one.logits(pj.merge(one.params, adapters, config))
    np.testing.assert_allclose(one.torch_logits(loaded), want, rtol=0, atol=1e-5)


def test_bfloat16_leaves(family, tmp_path):
    """theta is float32 on a bfloat16 base; saved modules keep the base's dtype."""
    one = family("bert")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), one.params)
    config = pj.PeanutConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapters = drawn(params, config)
    assert adapters.saved["classifier/kernel"].dtype == jnp.bfloat16
    pj.save_adapter(tmp_path, adapters, config, params)
    assert_identical(pj.load_adapter(tmp_path, params)[0], adapters)


def test_every_field_comes_back(family, tmp_path):
    one = family("bert")
    config = pj.PeanutConfig(
        r=3, depth=1, act_fn="silu", scaling=0.3, dropout=0.1, orientation="input", init_weights=False,
        target_modules=("query", "key"), exclude_modules=("layer.0.attention.self.key",), layers_to_transform=(0, 1),
        layers_pattern=("layer",), modules_to_save=("pooler",), base_model_name_or_path="bert", task_type="SEQ_CLS",
    )  # fmt: skip
    pj.save_adapter(tmp_path, drawn(one.params, config), config, one.params)
    assert pj.load_adapter(tmp_path, one.params)[1] == config


def test_saving_again_replaces_and_keeps_other_files(family, tmp_path):
    one = family("bert")
    config = pj.PeanutConfig(r=2, target_modules=["query"])
    pj.save_adapter(tmp_path, drawn(one.params, config, 0), config, one.params)
    (tmp_path / "README.md").write_text("mine")
    second = drawn(one.params, config, 1)
    with pytest.raises(FileExistsError, match="exists; give another folder, or overwrite=True"):
        pj.save_adapter(tmp_path, second, config, one.params)
    pj.save_adapter(tmp_path, second, config, one.params, overwrite=True)
    assert_identical(pj.load_adapter(tmp_path, one.params)[0], second)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]


# ---- what PEFT has no function for


@pytest.mark.parametrize(
    "config",
    [
        pj.PeanutConfig(r=2, target_modules=["query"], orientation="input"),
        pj.LoraConfig(r=2, target_modules=["query"], act_fn="relu"),
        pj.PeanutConfig(r=2, target_modules=["query"], act_fn="sin"),
    ],
    ids=["input", "nonlinear", "sin"],
)
def test_peft_refuses_other_functions(family, tmp_path, config):
    """query is square here: the shapes of the input orientation would fit."""
    one = family("bert")
    adapters = drawn(one.params, config)
    pj.save_adapter(tmp_path, adapters, config, one.params)
    with pytest.raises((KeyError, ValueError), match=r"PEANUT_INPUT|NONLINEAR_LORA|sin"):
        peft.PeftModel.from_pretrained(torch_copy(one), tmp_path)
    again, read = pj.load_adapter(tmp_path, one.params)
    assert_identical(again, adapters)
    assert read == dataclasses.replace(config, base_model_name_or_path=str(one.folder))


def test_peft_refuses_conv1d(family, tmp_path):
    one = family("gpt2")
    config = pj.PeanutConfig(r=2, target_modules=["c_attn"])
    adapters = drawn(one.params, config)
    pj.save_adapter(tmp_path, adapters, config, one.params)
    with pytest.raises((ValueError, NotImplementedError, TypeError), match="Conv1D"):
        peft.PeftModel.from_pretrained(torch_copy(one), tmp_path)
    assert_identical(pj.load_adapter(tmp_path, one.params)[0], adapters)


def test_dropout_is_ignored_by_peft(family, tmp_path):
    one = family("bert")
    config = pj.PeanutConfig(r=2, target_modules=["query"], dropout=0.5)
    adapters = drawn(one.params, config)
    pj.save_adapter(tmp_path, adapters, config, one.params)
    with pytest.warns(UserWarning, match="dropout"):
        loaded = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path)
    want = one.logits(pj.merge(one.params, adapters, config))
    np.testing.assert_allclose(one.torch_logits(loaded), want, rtol=0, atol=1e-5)


def test_two_adapters_at_once(family, tmp_path):
    """Their sum, each computed from the original W0, as PEFT has it with two active adapters."""
    one = family("bert")
    config = pj.PeanutConfig(r=3, target_modules=["query"], init_weights=False)
    both = [drawn(one.params, config, seed) for seed in (0, 1)]
    for name, adapters in zip("ab", both, strict=True):
        pj.save_adapter(tmp_path / name, adapters, config, one.params)
    model = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    model.base_model.set_adapter(["a", "b"])
    pairs = pj.combine(*(pj.factors(adapters, one.params, config) for adapters in both))
    got = pj.bind(lambda params: one.twin.flax(**one.twin.batch, params=params).logits, pairs)(one.params)
    np.testing.assert_allclose(got, one.torch_logits(model), rtol=0, atol=1e-5)


def test_hub_names(family, saved, monkeypatch):
    """A name goes through huggingface_hub, without pickles."""
    asked = {}

    def snapshot_download(name, revision, ignore_patterns):  # once: the folder holds the weights already
        asked.update(name=name, ignored=ignore_patterns)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pj.load_adapter("someone/adapter", family("bert").params)
    assert asked["name"] == "someone/adapter"
    assert {"*.bin", "*.pt"} <= set(asked["ignored"])


# ---- the base's fingerprint


def test_another_base_is_refused(family, tmp_path, caplog):
    one = family("llama")
    config = pj.PeanutConfig(r=2, target_modules=["q_proj", "up_proj"])
    pj.save_adapter(tmp_path, drawn(one.params, config), config, one.params)
    kernel = one.params["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    other = jax.tree.map(lambda leaf: leaf.at[3, 5].multiply(1.1) if leaf is kernel else leaf, one.params)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj' .*differs"):
        pj.load_adapter(tmp_path, other)
    pj.load_adapter(tmp_path, other, check_base=False)
    assert not caplog.records

    theirs = bridge.wrap(one.twin.torch, r=2, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path / "theirs")
    pj.load_adapter(tmp_path / "theirs", other)
    assert "no fingerprint" in caplog.text


# ---- bad input


@pytest.fixture
def saved(family, tmp_path):
    one = family("bert")
    config = pj.PeanutConfig(r=2, depth=1, target_modules=["query"], task_type="SEQ_CLS")
    pj.save_adapter(tmp_path, drawn(one.params, config), config, one.params)
    return tmp_path


def edit_config(folder, **fields):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type must be one of PEANUT, .* got 'IA3'"),
        ({"peft_type": None}, r"peft_type must be one of"),
        ({"act_fn": "nope"}, r"act_fn must be one of .* got 'nope'"),
        ({"r": 0}, r"r must be an integer"),
        ({"r": None}, r"r must be an integer"),
        ({"r": 3}, r"a is \(2, 16\)|a is .* expected"),
        ({"depth": 2}, r"encoders is .*expected"),
        ({"depth": 0}, r"(de|en)coders is not expected"),
        ({"rank_pattern": {"query": 3}}, r"rank_pattern=.* is not supported"),
        ({"new_feature": True}, r"new_feature=True is not supported"),
        ({"target_modules": ["query", "value"]}, r"lacks, first 'bert\.encoder\.layer\.0\.attention\.self\.value'"),
        ({"task_type": "NONSENSE"}, r"task_type must be one of"),
        ({"layers_pattern": "("}, r"layers_pattern .*regular expression"),
        ({"scaling": 10**400}, r"scaling must be"),
        ({"r": 10**400}, r"r must be below"),
    ],
)
def test_bad_configs(family, saved, change, message):
    edit_config(saved, **change)
    with pytest.raises(ValueError, match=message):
        pj.load_adapter(saved, family("bert").params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.peanut_A.weight"), r"layer\.1\.attention\.self\.query': a is missing"),
        (lambda t: t.pop(f"{QUERY}.peanut_encoders.0.weight"), r"encoders is missing"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith(QUERY)], r"lacks, first .*layer\.1"),
        (lambda t: t.pop("base_model.model.classifier.bias"), r"'classifier\.bias' of the saved modules is missing"),
        (lambda t: t.update({f"{QUERY}.peanut_C.weight": np.ones((2, 2), np.float32)}), r"peanut_C.*not one of"),
        (lambda t: t.update({"extra": np.ones(2, np.float32)}), r"'extra' does not begin with"),
        (
            lambda t: t.update({"base_model.model.pooler.bias": np.ones(2, np.float32)}),
            r"'pooler\.bias' is in no saved",
        ),
        (
            lambda t: t.update({f"{QUERY}s.peanut_A.weight": np.ones((2, 32), np.float32)}),
            r"querys': b is missing|missing",
        ),
        (lambda t: t.update({f"{QUERY}.peanut_A.weight": np.ones((2, 31), np.float32)}), r"b is .*expected"),
        (lambda t: t.update({f"{QUERY}.peanut_A.weight": np.ones((2,), np.float32)}), r"of shape \(2,\)"),
        (lambda t: t.update({f"{QUERY}.peanut_encoders.00.weight": np.ones((2, 2), np.float32)}), r"there twice"),
        (lambda t: t.update({"base_model.model.classifier.bias": np.ones(7, np.float32)}), r"is \(7,\), and \(3,\)"),
        (lambda t: t.update({f"{QUERY}.peanut_A.weight": np.ones((2, 32), np.int8)}), r"dtype I8"),
        (lambda t: t.clear(), r"no adapter tensors"),
        (lambda t: t[f"{QUERY}.peanut_A.weight"].fill(np.nan), r"'.*peanut_A\.weight' holds a NaN"),
    ],
)
def test_bad_tensors(family, saved, change, message):
    edit_tensors(saved, change)
    with pytest.raises(ValueError, match=message):
        pj.load_adapter(saved, family("bert").params)


def test_an_adapter_of_another_model(family, saved):
    with pytest.raises(ValueError, match=r"no dense kernel of this model, first 'bert\.encoder.*closest: 'roberta\."):
        pj.load_adapter(saved, family("roberta").params)


def test_missing_files_and_pickles(family, saved):
    params = family("bert").params
    (saved / WEIGHTS_FILE).rename(saved / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle file"):
        pj.load_adapter(saved, params)
    (saved / CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        pj.load_adapter(saved, params)
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist"):
        pj.load_adapter(saved / "nowhere", params)


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 1, "r": 2}', "\x00", '{"r":' + "[" * 100000])
def test_a_config_that_is_no_json_object(family, saved, text):
    (saved / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"JSON|twice"):
        pj.load_adapter(saved, family("bert").params)


def test_an_adapter_without_torch_names_is_refused():
    params = {"stack": {"dense": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}}}
    config = pj.PeanutConfig(r=2, target_modules=["dense"])
    adapters = pj.init(jax.random.key(0), params, config)
    with pytest.raises(NotImplementedError, match=r"'stack/dense/kernel' is a stack of layers, and no part"):
        pj.save_adapter("nowhere", adapters, config, params)


def test_names_that_match_nothing_are_left_out(family, saved):
    """As PEFT does with its heads, "classifier" and "score"; they are no regular expressions either."""
    edit_config(saved, modules_to_save=["a(", "score"])
    assert pj.load_adapter(saved, family("bert").params)[1].modules_to_save is None


def test_peft_saves_by_the_end_of_a_name(family, tmp_path):
    """Its modules_to_save=["norm"] takes every layer's norms too; they are read, and named one by one."""
    one = family("llama")
    theirs = bridge.wrap(one.twin.torch, r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    theirs.save_pretrained(tmp_path)
    for params in (one.params, scanned(one.params, "model", "layers")):
        adapters, config = pj.load_adapter(tmp_path, params)
        assert len([name for name in config.modules_to_save if "layers" in name]) == (4 if params is one.params else 2)
        pj.save_adapter(tmp_path / "again", adapters, config, params, overwrite=True)
        again, want = (load_file(folder / WEIGHTS_FILE) for folder in (tmp_path / "again", tmp_path))
        assert again.keys() == want.keys()
