"""A trained PEANuT as LoRA in torch, and LoRA as factors and as the start of a PEANuT."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import peanut_jax as pj
from peanut_jax.interop.lora import to_lora_folder
from peanut_jax.interop.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from peanut_jax.updates import LowRank
from tests.interop.conftest import scanned
from tests.interop.test_peft import TASK_TYPES, assert_identical, drawn, torch_copy
from tests.oracle import bridge

ALL = sorted([*TASK_TYPES, "gpt2"])


def assert_logits_close(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.matrix
@pytest.mark.parametrize("orientation", ["output", "input"])
@pytest.mark.parametrize(("depth", "act_fn"), [(0, "sin"), (1, "relu"), (2, "gelu")])
@pytest.mark.parametrize("name", ALL)
def test_export(family, tmp_path, name, depth, act_fn, orientation):
    """PEFT's LoRA gives the adapted model's logits; from folders alone comes the same directory."""
    one = family(name)
    config = pj.PeanutConfig(
        r=3, depth=depth, act_fn=act_fn, orientation=orientation, scaling=0.3, target_modules=one.targets,
        init_weights=False, task_type=TASK_TYPES.get(name),
    )  # fmt: skip
    adapters = drawn(one.params, config)
    lora, lora_config = pj.to_lora(adapters, one.params, config, tmp_path / "lora")
    want = one.logits(pj.merge(one.params, adapters, config))
    assert np.abs(want - one.logits(one.params)).max() > 1e-2
    assert_logits_close(one.logits(pj.merge(one.params, lora, lora_config)), want)
    loaded = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path / "lora")
    assert_logits_close(one.torch_logits(loaded), want)

    pj.save_adapter(tmp_path / "adapter", adapters, config, one.params)
    to_lora_folder(tmp_path / "adapter", one.folder, tmp_path / "again")
    assert (tmp_path / "again" / CONFIG_FILE).read_text() == (tmp_path / "lora" / CONFIG_FILE).read_text()
    ours, theirs = (load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("again", "lora"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-6 * max(1, np.abs(theirs[key]).max()))


def peft_updates(model):
    """dW of every module, as PEFT computes it."""
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    with torch.no_grad():
        return {name: module.get_delta_weight("default").numpy() for name, module in modules.items()}


@pytest.mark.parametrize(("orientation", "scalings"), [("output", (0.01, 0.25, 1.0)), ("input", (0.01,))])
def test_the_exported_update_is_the_adapters_own(family, tmp_path, orientation, scalings):
    """Bit for bit, with lora_alpha = r; a power of two as the scaling gives PEFT's dW bit for bit, too."""
    one, deltas = family("bert"), {}
    fields = {"r": 8, "depth": 1, "orientation": orientation, "target_modules": ["query"], "init_weights": False}
    adapters = drawn(one.params, pj.PeanutConfig(**fields))
    for scaling in scalings:
        config, folder = pj.PeanutConfig(**fields, scaling=scaling), tmp_path / str(scaling)
        lora, lora_config = pj.to_lora(adapters, one.params, config, folder)
        assert (lora_config.scaling, lora_config.r) == (1.0, 8)
        written, tensors = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
        assert (written["lora_alpha"], written["r"], type(written["lora_alpha"])) == (8, 8, int)
        assert written["rank_pattern"] == written["alpha_pattern"] == {}
        own = jax.jit(lambda adapters, config=config: pj.factors(adapters, one.params, config))(adapters)
        for path, update in own.items():
            name = f"base_model.model.{path.removesuffix('/kernel').replace('/', '.')}"
            for side, leaf in zip(("lora_A", "lora_B"), ("left", "right"), strict=True):
                np.testing.assert_array_equal(tensors[f"{name}.{side}.weight"].T, getattr(update, leaf))
            np.testing.assert_array_equal(lora.theta[path]["b"], update.right)
        if orientation == "output":
            deltas[scaling] = peft_updates(peft.PeftModel.from_pretrained(torch_copy(one), folder))
    for name, whole in deltas.get(1.0, {}).items():
        np.testing.assert_array_equal(deltas[0.25][name], whole * np.float32(0.25))
        # Elsewhere the factors are rounded before the sum, not the product after it: some ulps of the largest element.
        want = whole * np.float32(0.01)
        np.testing.assert_allclose(deltas[0.01][name], want, rtol=0, atol=4e-7 * np.abs(want).max())
        assert np.abs(want).max() > 1e-4


def test_patterns_become_one_rank(family, tmp_path):
    """A LoRA that engines read in different ways, as the one that they read alike, with PEFT's dW and logits."""
    one = family("bert")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=r".*(query|value)", init_lora_weights=False,
        rank_pattern={"layer.0.attention.self.query": 7}, alpha_pattern={"value": 3},
    )  # fmt: skip
    model = peft.get_peft_model(torch_copy(one), config)
    model.save_pretrained(tmp_path / "patterns")
    to_lora_folder(tmp_path / "patterns", one.folder, tmp_path / "lora")
    written = json.loads((tmp_path / "lora" / CONFIG_FILE).read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (7, 7, False)
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert len(written["target_modules"]) == 4
    ranks = {tensor.shape[0] for name, tensor in load_file(tmp_path / "lora" / WEIGHTS_FILE).items() if "_A." in name}
    assert ranks == {7}
    loaded = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path / "lora")
    assert_logits_close(one.torch_logits(loaded), one.torch_logits(model), atol=1e-6)
    got, want = peft_updates(loaded), peft_updates(model)
    assert got.keys() == want.keys()
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=4e-7 * np.abs(want[name]).max())


def test_engines_are_asked_first(family, tmp_path):
    """Before anything is read or written, with the command that helps."""
    one = family("bert")
    config = pj.PeanutConfig(r=2, target_modules=["query"])
    adapters = drawn(one.params, config)
    pj.save_adapter(tmp_path / "adapter", adapters, config, one.params)
    message = r"vLLM serves no LoRA on a model of type 'bert'; merge it instead: peanut-jax merge .*--adapter"
    with pytest.raises(ValueError, match=message):
        to_lora_folder(tmp_path / "adapter", one.folder, tmp_path / "lora", engine="vllm")
    with pytest.raises(ValueError, match=r"SGLang serves no LoRA on the module 'bert\.encoder.*export_merged"):
        pj.to_lora(adapters, one.params, config, tmp_path / "lora", engine="sglang")
    with pytest.raises(ValueError, match=r"engine must be one of peft, vllm, sglang, llama\.cpp, got 'tgi'"):
        pj.to_lora(adapters, one.params, config, engine="tgi")
    assert not (tmp_path / "lora").exists()
    pj.to_lora(adapters, one.params, config, tmp_path / "lora", engine="peft")


def test_export_of_scanned_layers(family, tmp_path):
    one = family("llama")
    params = scanned(one.params, "model", "layers")
    config = pj.PeanutConfig(r=3, target_modules=one.targets, layers_to_transform=[1], init_weights=False)
    adapters = drawn(params, config)
    pj.to_lora(adapters, params, config, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path / "lora")
    pj.save_adapter(tmp_path / "adapter", adapters, config, params)
    apart, config = pj.load_adapter(tmp_path / "adapter", one.params)
    assert_logits_close(one.torch_logits(loaded), one.logits(pj.merge(one.params, apart, config)))


def test_export_in_bfloat16(family, tmp_path):
    """Within bfloat16's own rounding: 2^-8 of the largest logit for the two layers' sums."""
    one = family("llama")
    config = pj.PeanutConfig(r=3, depth=1, target_modules=one.targets, init_weights=False)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), one.params)
    adapters = drawn(params, config)
    pj.to_lora(adapters, params, config, tmp_path)
    model = torch_copy(one).to(torch.bfloat16)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    want = one.torch_logits(peft.PeftModel.from_pretrained(torch_copy(one), tmp_path))
    plain, got = one.torch_logits(torch_copy(one).to(torch.bfloat16)), one.torch_logits(loaded)
    rounding = np.abs(plain - one.torch_logits(torch_copy(one))).max() / np.abs(plain).max()
    assert np.abs(got - want).max() / np.abs(want).max() < max(3 * rounding, 2**-8)
    exact, full = pj.to_lora(adapters, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), config)
    rounded, _ = pj.to_lora(adapters, params, config)
    for path, theta in exact.theta.items():
        update = LowRank(theta["a"], theta["b"]).delta()
        got = LowRank(rounded.theta[path]["a"], rounded.theta[path]["b"]).delta()
        assert float(jnp.abs(got - update).max() / jnp.abs(update).max()) < 2**-6
    assert full.scaling == config.scaling


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {"value": 3}},
    ],
)
def test_import_as_factors(family, fields):
    one = family("bert")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False, **fields)
    model = peft.get_peft_model(torch_copy(one), config)
    folder = one.folder.parent / f"lora-{len(str(fields))}"
    model.save_pretrained(folder)
    pairs = pj.from_lora(folder, one.params)
    got = pj.bind(lambda params: one.twin.flax(**one.twin.batch, params=params).logits, pairs)(one.params)
    assert_logits_close(got, one.torch_logits(model))
    if "rank_pattern" in fields:
        with pytest.raises(ValueError, match=r"from_lora reads it"):
            pj.load_adapter(folder, one.params)
    else:
        adapters, config = pj.load_adapter(folder, one.params)
        assert isinstance(config, pj.LoraConfig)
        assert_logits_close(one.logits(pj.merge(one.params, adapters, config)), one.torch_logits(model))


def test_import_into_a_stack(family, tmp_path):
    """Ranks that differ from layer to layer are filled up with zeros."""
    one = family("llama")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, rank_pattern={"layers.0.self_attn.q_proj": 2}
    )
    peft.get_peft_model(torch_copy(one), config).save_pretrained(tmp_path)
    params = scanned(one.params, "model", "layers")
    apart, stack = pj.from_lora(tmp_path, one.params), pj.from_lora(tmp_path, params)
    (left, right), path = stack["model/layers/self_attn/q_proj/kernel"], "model/layers/{}/self_attn/q_proj/kernel"
    assert left.shape == (2, 32, 4)
    for row in (0, 1):
        got, want = LowRank(left[row], right[row]).delta(), apart[path.format(row)].delta()
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act_fn", ["relu", "leaky_relu", "gelu", "silu", "softplus", "linear"])
@pytest.mark.parametrize("orientation", ["output", "input"])
def test_a_lora_as_the_start_of_a_peanut(family, tmp_path, act_fn, orientation):
    """Exact where the kernel has full rank on the side that is read, the projection elsewhere (Prop. 3.2)."""
    one = family("llama")
    lora = pj.LoraConfig(r=3, target_modules=["up_proj", "down_proj", "q_proj"], scaling=0.7)
    adapters = drawn(one.params, lora)
    adapters = pj.Adapters({p: theta | {"b": jnp.ones_like(theta["b"])} for p, theta in adapters.theta.items()}, {})
    pj.save_adapter(tmp_path, adapters, lora, one.params)
    pairs = pj.from_lora(tmp_path, one.params)
    config = pj.PeanutConfig(
        r=6, act_fn=act_fn, orientation=orientation, target_modules=lora.target_modules, scaling=0.5
    )
    start, errors = pj.init_from_factors(pairs, one.params, config)
    exact, projected = ("up_proj", "down_proj") if orientation == "output" else ("down_proj", "up_proj")
    for path, pair in pj.factors(start, one.params, config).items():
        kernel = one.params["model"]["layers"][path.split("/")[2]][path.split("/")[3]][path.split("/")[4]]["kernel"]
        want, kernel = np.asarray(pairs[path].delta(), np.float64), np.asarray(kernel, np.float64)
        if projected in path:
            assert errors[path] > 0.1
            on = kernel if orientation == "output" else kernel.T
            projector = on @ np.linalg.pinv(on)
            want = projector @ want if orientation == "output" else want @ projector
        elif exact in path:
            assert errors[path] < 1e-4
        else:
            assert errors[path] < 5e-3  # square, so as well conditioned as chance has it
        np.testing.assert_allclose(pair.delta(), want, rtol=0, atol=5e-3 * np.abs(want).max())


def test_the_error_is_the_one_reported(family):
    """Of a stack, one number a layer."""
    one = family("llama")
    params = scanned(one.params, "model", "layers")
    lora = pj.LoraConfig(r=2, target_modules=["down_proj"])
    thetas = drawn(params, lora).theta.items()
    adapters = pj.Adapters({path: theta | {"b": jnp.ones_like(theta["b"])} for path, theta in thetas}, {})
    pairs = pj.factors(adapters, params, lora)
    config = pj.PeanutConfig(r=4, target_modules=["down_proj"])
    start, errors = pj.init_from_factors(pairs, params, config)
    ((path, error),) = errors.items()
    got = np.asarray(pj.factors(start, params, config)[path].delta())
    want = np.asarray(pairs[path].delta())
    norms = np.linalg.norm(got - want, axis=(1, 2)) / np.linalg.norm(want, axis=(1, 2))
    assert error.shape == (2,)
    np.testing.assert_allclose(error, norms, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "tanh"}, r"act\(x\) - act\(-x\) is c x .* act_fn='tanh'"),
        ({"depth": 1}, r"depth=1"),
        ({"r": 5}, r"config\.r must be 4, twice the rank of the update of 'bert/.*got 5"),
        ({"target_modules": ["value"]}, r"differs"),
    ],
)
def test_bad_starts(family, change, message):
    one = family("bert")
    lora = pj.LoraConfig(r=2, target_modules=["query"])
    pairs = pj.factors(pj.init(jax.random.key(0), one.params, lora), one.params, lora)
    config = pj.PeanutConfig(**{"r": 4, "target_modules": ["query"], **change})
    with pytest.raises(ValueError, match=message):
        pj.init_from_factors(pairs, one.params, config)


@pytest.fixture
def lora_folder(family, tmp_path):
    one = family("bert")
    config = pj.LoraConfig(r=2, target_modules=["query"])
    pj.save_adapter(tmp_path, drawn(one.params, config), config, one.params)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"magnitude is missing"),
        ({"bias": "all"}, r"bias='all' is not supported"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=.* is not supported"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' trains on a changed base"),
        ({"init_lora_weights": "lora_ga"}, r"init_lora_weights='lora_ga' trains on a changed base"),
        ({"lora_alpha": -1}, r"lora_alpha must be a number above 0"),
        ({"lora_alpha": None}, r"lora_alpha must be a number above 0"),
    ],
)
def test_loras_that_are_another_function(family, lora_folder, change, message):
    fields = json.loads((lora_folder / CONFIG_FILE).read_text())
    (lora_folder / CONFIG_FILE).write_text(json.dumps(fields | change))
    for read in (pj.from_lora, pj.load_adapter):
        with pytest.raises(ValueError, match=message):
            read(lora_folder, family("bert").params)


def test_from_lora_refuses_what_factors_cannot_hold(family, tmp_path):
    one = family("bert")
    for name, config in {
        "heads": pj.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
        "peanut": pj.PeanutConfig(r=2, target_modules=["query"]),
    }.items():
        pj.save_adapter(tmp_path / name, drawn(one.params, config), config, one.params)
    with pytest.raises(ValueError, match=r"saved modules \('classifier"):
        pj.from_lora(tmp_path / "heads", one.params)
    with pytest.raises(ValueError, match=r"a PEANuT, not a LoRA"):
        pj.from_lora(tmp_path / "peanut", one.params)
    adapters, config = pj.load_adapter(tmp_path / "heads", one.params)
    assert_identical(adapters, drawn(one.params, config))


def test_an_adapter_of_another_base_is_not_exported(family, tmp_path):
    one, checkpoint = family("bert"), tmp_path / "other"
    config = pj.PeanutConfig(r=2, target_modules=["query"])
    pj.save_adapter(tmp_path / "adapter", drawn(one.params, config), config, one.params)
    torch.manual_seed(5)
    shutil.copytree(one.folder, checkpoint)
    type(one.twin.torch)(one.twin.torch.config).save_pretrained(checkpoint)
    with pytest.raises(
        ValueError, match=r"another base than .*'bert\.encoder\.layer\.0\.attention\.self\.query' differs"
    ):
        to_lora_folder(tmp_path / "adapter", checkpoint, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    to_lora_folder(tmp_path / "adapter", checkpoint, tmp_path / "lora", check_base=False)


def test_to_lora_folder_keeps_what_is_there(family, tmp_path):
    one = family("bert")
    for name, config in (
        ("peanut", pj.PeanutConfig(r=2, target_modules=["query"])),
        ("lora", pj.LoraConfig(r=2, target_modules=["query"])),
    ):
        pj.save_adapter(tmp_path / name, drawn(one.params, config), config, one.params)
    with pytest.raises(FileExistsError, match=r"exists; give another folder"):
        to_lora_folder(tmp_path / "peanut", one.folder, tmp_path / "lora")
    to_lora_folder(tmp_path / "peanut", one.folder, tmp_path / "lora", overwrite=True)
    with pytest.raises(ValueError, match=r"is a LoRA already"):
        to_lora_folder(tmp_path / "lora", one.folder, tmp_path / "again")


def test_nans_are_not_exported(family, tmp_path):
    one = family("bert")
    config = pj.PeanutConfig(r=2, target_modules=["query"])
    adapters = drawn(one.params, config)
    path = next(iter(adapters.theta))
    adapters.theta[path]["a"] = adapters.theta[path]["a"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=f"NaNs detected in the factors of {path!r}"):
        pj.to_lora(adapters, one.params, config, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_lora_bridge_matches(family, tmp_path):
    """PEFT's own PEANuT, exported from its directory, is PEFT's LoRA with the same logits."""
    one = family("roberta")
    theirs = bridge.wrap(
        one.twin.torch, r=4, depth=1, target_modules=["query"], init_weights=False, task_type="SEQ_CLS"
    )
    theirs.save_pretrained(tmp_path / "peanut")
    to_lora_folder(tmp_path / "peanut", one.folder, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(torch_copy(one), tmp_path / "lora")
    assert_logits_close(one.torch_logits(loaded), one.torch_logits(theirs))
