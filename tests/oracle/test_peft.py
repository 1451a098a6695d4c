"""The same model, adapter and batch in HF PEFT and here: updates, logits, gradients, merging, what is trainable.

Figures are compared relative to the largest magnitude of each array. 1e-5 is about a hundred units of float32 rounding:
two layers of two frameworks that sum in different orders stay within it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import peanut_jax as pj
from peanut_jax.base.kernels import flatten

from . import bridge

RTOL = 1e-5
R, SCALING = 6, 0.5


@functools.cache
def build(name, folder):
    return bridge.build(name, folder / name)


@pytest.fixture(scope="session", params=["bert", "llama", "roberta"])
def twin(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return build("bert", tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def roberta(tmp_path_factory):
    return build("roberta", tmp_path_factory.getbasetemp())


def fields(twin, **overrides):
    """What both configs are given: the fields have the same names and meanings."""
    return {
        "r": R,
        "scaling": SCALING,
        "target_modules": list(twin.targets),
        "init_weights": False,
        **overrides,
    }


def logits_with(pairs, twin):
    """Op by op, so that no compiler fuses one model otherwise than the other; no pairs is the plain model."""
    return pj.bind(lambda params: twin.flax(**twin.batch, params=params).logits, pairs)(twin.params)


def loss_weights(shape):
    """A fixed random direction: the loss is the mean of weighted logits, so that every logit has its own cotangent."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@functools.cache
def value_and_grad(twin, config):
    """A compiled (adapters, params) -> ((loss, logits), gradients) through `pj.adapt`."""
    forward = pj.adapt(lambda params: twin.flax(**twin.batch, params=params).logits, config)

    def loss(adapters, params):
        logits = forward(adapters, params)
        return (logits * loss_weights(logits.shape)).mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def peft_logits(model, twin):
    return model(**twin.torch_batch()).logits


def peft_backward(model, twin):
    """PEFT's logits, with the gradients of the same loss left on its parameters."""
    logits = peft_logits(model, twin)
    (logits * torch.from_numpy(loss_weights(logits.shape))).mean().backward()
    return logits.detach()


def assert_close(got, want, name=""):
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=RTOL * np.abs(want).max(), err_msg=str(name))


def assert_trees_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map_with_path(lambda path, g, w: assert_close(g, w, path), got, want)


@pytest.mark.matrix
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_updates_logits_and_gradients(twin, depth):
    model = bridge.wrap(twin.torch, **fields(twin, depth=depth))
    config, adapters = pj.PeanutConfig(**fields(twin, depth=depth)), bridge.adapters(model)

    pairs = pj.factors(adapters, twin.params, config)
    assert pairs.keys() == bridge.layers(model).keys()
    for path, layer in bridge.layers(model).items():
        assert_close(pairs[path].delta(), layer.get_delta_weight("default").detach().T, path)

    want = peft_backward(model, twin)
    (_, logits), gradients = value_and_grad(twin, config)(adapters, twin.params)
    assert not np.allclose(want, peft_logits(twin.torch, twin).detach(), rtol=0, atol=0.01), "the adapter must matter"
    assert_close(logits, want)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(bridge.gradients(model))), "a gradient of 0 would hide an error"
    assert_trees_close(gradients, bridge.gradients(model))


@pytest.mark.parametrize("act_fn", ["relu", "gelu", "gelu_new", "tanh", "silu"])
def test_activations(bert, act_fn):
    both = fields(bert, depth=1, act_fn=act_fn)
    model = bridge.wrap(bert.torch, **both)
    pairs = pj.factors(bridge.adapters(model), bert.params, pj.PeanutConfig(**both))
    for path, layer in bridge.layers(model).items():
        assert_close(pairs[path].delta(), layer.get_delta_weight("default").detach().T, path)
    assert_close(logits_with(pairs, bert), peft_logits(model, bert).detach())


def test_two_adapters_at_once(roberta):
    """The updates add up, each computed from the original kernel."""
    first = fields(roberta, depth=1)
    second = fields(roberta, depth=0, r=3, scaling=2.0, act_fn="tanh", target_modules=["key", "value"])
    model = bridge.wrap(roberta.torch, **first)
    model.add_adapter("second", bridge.peft.PeanutConfig(**second))
    model.base_model.set_adapter(["default", "second"])
    trees = [
        pj.factors(pj.Adapters(bridge.thetas(model, name), {}), roberta.params, pj.PeanutConfig(**config))
        for name, config in (("default", first), ("second", second))
    ]
    logits = logits_with(pj.combine(*trees), roberta)
    assert_close(logits, peft_logits(model, roberta).detach())


def test_init_is_an_exact_no_op_whose_first_gradient_is_that_of_b_alone(twin):
    both = fields(twin, depth=2, init_weights=True)
    model, config = bridge.wrap(twin.torch, **both), pj.PeanutConfig(**both)
    assert torch.equal(peft_backward(model, twin), peft_logits(twin.torch, twin))
    adapters = pj.init(jax.random.key(0), twin.params, config)
    pairs = pj.factors(adapters, twin.params, config)
    assert jnp.array_equal(logits_with(pairs, twin), logits_with({}, twin))
    _, ours = value_and_grad(twin, pj.PeanutConfig(**fields(twin, depth=2)))(adapters, twin.params)
    for gradients in (ours, bridge.gradients(model)):
        for theta in gradients.theta.values():
            assert {name for name, leaf in theta.items() if np.any(leaf)} == {"b"}


def test_merge(twin):
    both = fields(twin, depth=1)
    model = bridge.wrap(twin.torch, **both)
    adapters = bridge.adapters(model)
    merged = flatten(pj.merge(twin.params, adapters, pj.PeanutConfig(**both)))
    model.merge_adapter()
    for path, layer in bridge.layers(model).items():
        assert_close(merged.pop(path), layer.get_base_layer().weight.detach().T, path)
    assert all(leaf is flatten(twin.params)[path] for path, leaf in merged.items())


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_a_task_trains_what_peft_trains(name, tmp_path_factory):
    """The leaves and their count, with the head; and the head's gradients."""
    twin = build(name, tmp_path_factory.getbasetemp())
    both = fields(twin, depth=2, task_type="SEQ_CLS")
    model, config = bridge.wrap(twin.torch, **both), pj.PeanutConfig(**both)
    trainable = {n: p for n, p in model.get_base_model().named_parameters() if p.requires_grad}
    adapters = pj.init(jax.random.key(0), twin.params, config)
    assert {_leaf_of(n) for n in trainable} == {
        (path, leaf) for path, theta in adapters.theta.items() for leaf in theta
    } | {(path, "") for path in adapters.saved}
    assert sum(p.numel() for p in trainable.values()) == pj.count(adapters)

    peft_backward(model, twin)
    _, gradients = value_and_grad(twin, config)(bridge.adapters(model), twin.params)
    assert_trees_close(gradients, bridge.gradients(model))


def _leaf_of(name):
    """A PEFT parameter name -> (path, leaf of theta or "")."""
    theta = re.fullmatch(r"(.+)\.peanut_(\w+)\.default(\.\d+)?\.weight", name)
    if theta:
        return theta[1].replace(".", "/") + "/kernel", theta[2].lower()
    return name.replace(".modules_to_save.default", "").replace("weight", "kernel").replace(".", "/"), ""


BERT_LIKE = {
    "default": {},
    "list": {"target_modules": ["query", "value", "intermediate.dense"]},
    "last name": {"target_modules": ["dense"]},
    "whole path": {"target_modules": ["layer.0.attention.self.query"]},
    "regex": {"target_modules": r".*\.1\..*(query|dense)"},
    "all-linear": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "exclude list": {
        "target_modules": "all-linear",
        "task_type": "SEQ_CLS",
        "exclude_modules": ["output.dense"],
    },
    "exclude regex": {"target_modules": ["dense"], "exclude_modules": r".*\.0\..*"},
    "one layer": {"target_modules": ["query", "dense"], "layers_to_transform": 1},
    "layers": {"target_modules": ["dense"], "layers_to_transform": [0, 1]},
    "pattern": {"target_modules": ["key"], "layers_to_transform": [0], "layers_pattern": "layer"},
    "saved module": {"target_modules": ["dense"], "modules_to_save": ["intermediate.dense", "classifier"]},
}
LLAMA = {
    "default": {},
    "list": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "regex": {"target_modules": r".*\.(0|1)\..*\.(k|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude list": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["layers"]},
    "saved module": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
}
CASES = [(f, case) for f, cases in (("bert", BERT_LIKE), ("roberta", BERT_LIKE), ("llama", LLAMA)) for case in cases]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_selection(family, case, tmp_path_factory):
    twin = build(family, tmp_path_factory.getbasetemp())
    config = (LLAMA if family == "llama" else BERT_LIKE)[case]
    ours = pj.select(twin.params, pj.PeanutConfig(r=R, **config))
    model = bridge.wrap(twin.torch, r=R, **config)
    assert set(ours) == set(bridge.layers(model))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["proj"]},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [2]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["self_attn.q_proj", "k_proj"]},
    ],
    ids=["part of a name", "regex of part of a path", "layer out of range", "all excluded"],
)
def test_selecting_nothing_is_an_error_in_both(config, tmp_path_factory):
    twin = build("llama", tmp_path_factory.getbasetemp())
    with pytest.raises(ValueError, match=r"target_modules|layers_to_transform"):
        pj.select(twin.params, pj.PeanutConfig(**config))
    with pytest.raises(ValueError, match=r"[Tt]arget modules|excluded"):
        bridge.wrap(twin.torch, **config)


@pytest.mark.parametrize("targets", [r".*\.(query|value)", "all-linear"])
def test_layers_also_narrow_a_regex_where_peft_ignores_them(bert, targets):
    config = {"r": R, "target_modules": targets, "layers_to_transform": [1], "task_type": "SEQ_CLS"}
    ours = pj.select(bert.params, pj.PeanutConfig(**config))
    assert set(ours) == {path for path in bridge.layers(bridge.wrap(bert.torch, **config)) if "/layer/1/" in path}
    assert any("/layer/0/" in path for path in bridge.layers(bridge.wrap(bert.torch, **config)))
