"""Selection: HF PEFT's rules on Flax trees, with an error where a name matches nothing."""

import jax
import jax.numpy as jnp
import pytest
from flax.core import freeze
from flax.traverse_util import unflatten_dict

import peanut_jax as pj
from peanut_jax.architectures import ARCHITECTURES
from peanut_jax.base.kernels import find, flatten


def tree(**shapes):
    """A parameter tree of abstract arrays from `a__b__kernel=(2, 3)`."""
    leaves = {tuple(name.split("__")): jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return unflatten_dict(leaves)


ENCODER = tree(
    **{
        f"encoder__layer__{i}__{name}": shape
        for i in range(3)
        for name, shape in {
            "attention__query__kernel": (8, 8),
            "attention__query__bias": (8,),
            "attention__value__kernel": (8, 8),
            "output__kernel": (16, 8),
            "norm__scale": (8,),
        }.items()
    },
    embeddings__word__embedding=(50, 8),
    embeddings__patch__kernel=(2, 2, 3, 8),
    embeddings__patch__bias=(8,),
    classifier__kernel=(8, 3),
    classifier__bias=(3,),
)
STACK = tree(model__layers__q_proj__kernel=(4, 8, 8), model__layers__v_proj__kernel=(4, 8, 2), lm_head__kernel=(8, 50))


def names(params, **fields):
    return [target.kernel.module for target in pj.select(params, pj.PeanutConfig(**fields)).values()]


@pytest.mark.parametrize(
    ("fields", "count", "some"),
    [
        ({"target_modules": ["query"]}, 3, "encoder.layer.2.attention.query"),
        ({"target_modules": ["attention.query", "value"]}, 6, "encoder.layer.0.attention.value"),
        ({"target_modules": ["encoder.layer.1.output"]}, 1, "encoder.layer.1.output"),
        ({"target_modules": r".*layer\.[01]\.attention\.(query|value)"}, 4, "encoder.layer.1.attention.query"),
        ({"target_modules": "all-linear"}, 9, "encoder.layer.0.output"),
        ({"target_modules": "ALL-linear", "exclude_modules": ["output"]}, 6, "encoder.layer.0.attention.query"),
        ({"target_modules": ["query"], "exclude_modules": r".*\.0\..*"}, 2, "encoder.layer.1.attention.query"),
        ({"target_modules": ["query"], "layers_to_transform": 0}, 1, "encoder.layer.0.attention.query"),
        ({"target_modules": ["query"], "layers_to_transform": [0, 2]}, 2, "encoder.layer.2.attention.query"),
        ({"target_modules": ".*query", "layers_to_transform": [1]}, 1, "encoder.layer.1.attention.query"),
        (
            {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
            1,
            "encoder.layer.1.attention.query",
        ),
        ({"target_modules": ["query", "classifier"]}, 4, "classifier"),
        ({"target_modules": "all-linear", "modules_to_save": ["encoder.layer.0"]}, 6, "encoder.layer.1.output"),
        ({}, 6, "encoder.layer.0.attention.value"),
    ],
)
def test_what_is_selected(fields, count, some):
    chosen = names(ENCODER, **fields)
    assert len(chosen) == count
    assert some in chosen


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"target_modules": ["qurey"]},
            ValueError,
            r"target_modules entry 'qurey' matched none of 10 kernels; closest: 'encoder.layer.0.attention.query'",
        ),
        ({"target_modules": ["query", "valeu"]}, ValueError, r"entry 'valeu' matched none.*'encoder.*attention.value'"),
        ({"target_modules": "query"}, ValueError, r"target_modules='query' \(a regular expression\) matched none"),
        ({"target_modules": ["norm"]}, NotImplementedError, r"'encoder.layer.0.norm' is of type LayerNorm"),
        ({"target_modules": ["word"]}, NotImplementedError, r"'embeddings.word' is of type Embed, with embedding \(50"),
        ({"target_modules": ["patch"]}, NotImplementedError, r"'embeddings.patch' is of type Conv"),
        ({"target_modules": ["attention"]}, NotImplementedError, "is a container of modules"),
        (
            {"target_modules": ["query"], "layers_to_transform": [1, 7]},
            ValueError,
            r"layers \[7\] match no target.*0 to 2",
        ),
        (
            {"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "h"},
            ValueError,
            r"no numbered layer \(layers_pattern='h'\)",
        ),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, ValueError, "leaves no kernel"),
        (
            {"target_modules": ["query"], "exclude_modules": ["value"]},
            ValueError,
            "exclude_modules entry 'value' matched",
        ),
        ({"target_modules": ["query"], "exclude_modules": "value"}, ValueError, "exclude_modules='value'"),
        ({"target_modules": ["query"], "modules_to_save": ["clasifier"]}, ValueError, "closest: 'classifier'"),
        ({"target_modules": ["classifier"], "modules_to_save": ["classifier"]}, ValueError, "leaves no kernel"),
        ({"target_modules": ["query"], "task_type": "QUESTION_ANS"}, ValueError, "trains the head qa_outputs, but"),
    ],
)
def test_what_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        names(ENCODER, **fields)


def test_a_task_type_saves_its_head():
    config = pj.PeanutConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapters = jax.eval_shape(lambda p: pj.init(jax.random.key(0), p, config), ENCODER)
    assert set(adapters.saved) == {"classifier/kernel", "classifier/bias"}


@pytest.mark.parametrize(
    ("model", "targets"), [(row.model_types, row.targets) for row in ARCHITECTURES], ids=lambda v: v[0]
)
def test_every_default_finds_its_architecture(model, targets):
    params = tree(**{f"h__{i}__{name}__kernel": (4, 4) for i in range(2) for name in (*targets, "other")})
    assert set(names(params)) == {f"h.{i}.{name}" for i in range(2) for name in targets}


def test_a_model_without_a_default_needs_targets():
    with pytest.raises(ValueError, match=r"no default target_modules.*\['mixer'\].*roberta"):
        names(tree(block__mixer__kernel=(4, 4)))


def test_rows_of_a_layer_stack():
    config = pj.PeanutConfig(layers_to_transform=[3, 1])
    assert {t.kernel.module: (t.rows, t.stack) for t in pj.select(STACK, config).values()} == {
        "model.layers.q_proj": ((1, 3), (2,)),
        "model.layers.v_proj": ((1, 3), (2,)),
    }
    with pytest.raises(ValueError, match=r"layers \[4\] match no target; the targets have layers 0 to 3"):
        names(STACK, layers_to_transform=4)


@pytest.mark.parametrize(
    ("kernel", "bias", "split"),
    [
        ((8, 6), None, ((), (8,), (6,))),
        ((4, 8, 6), None, ((4,), (8,), (6,))),
        ((4, 8, 6), (4, 6), ((4,), (8,), (6,))),
        ((8, 4, 6), (4, 6), ((), (8,), (4, 6))),
        ((4, 6, 8), (8,), ((), (4, 6), (8,))),
        ((3, 8, 4, 6), (3, 4, 6), ((3,), (8,), (4, 6))),
        ((3, 4, 6, 8), (3, 8), ((3,), (4, 6), (8,))),
        ((2, 2, 3, 8), (8,), None),
        ((3, 8, 4, 6), None, None),
    ],
)
def test_axes_are_read_off_shapes(kernel, bias, split):
    params = tree(m__kernel=kernel, **({"m__bias": bias} if bias else {}))
    found = find(flatten(params))
    assert (found and (found["m/kernel"].stack, found["m/kernel"].ins, found["m/kernel"].outs)) == (split or {})


def test_given_axes_win():
    kernel = find(flatten(tree(m__kernel=(8, 4, 6))), {"m/kernel": (1, 2)})["m/kernel"]
    assert (kernel.stack, kernel.d_in, kernel.d_out) == ((), 8, 24)
    with pytest.raises(ValueError, match=r"axes of kernel 'm/kernel' must be .* within \(8, 4, 6\), got \(2, 2\)"):
        find(flatten(tree(m__kernel=(8, 4, 6))), {"m/kernel": (2, 2)})


def test_only_a_tall_c_attn_is_a_conv1d():
    block = {"h__0__attn__c_proj__kernel": (8, 8), "h__0__mlp__c_fc__kernel": (32, 8)}
    conv = find(flatten(tree(h__0__attn__c_attn__kernel=(24, 8), **block)))
    assert all(kernel.transposed for kernel in conv.values())
    assert (conv["h/0/mlp/c_fc/kernel"].d_in, conv["h/0/mlp/c_fc/kernel"].d_out) == (8, 32)
    dense = find(flatten(tree(h__0__attn__c_attn__kernel=(8, 24), **block)))
    assert not any(kernel.transposed for kernel in dense.values())


@pytest.mark.parametrize("wrap", [lambda p: {"params": p, "cache": {}}, freeze, lambda p: freeze({"params": p})])
def test_collections_and_frozen_dicts_are_seen_through(wrap):
    assert names(wrap(ENCODER), target_modules=["query"]) == names(ENCODER, target_modules=["query"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([1, 2], "nested mapping of arrays, got list"),
        ({}, "params is empty"),
        ({"a": {"kernel": "weights"}}, "'a/kernel' is a str"),
        ({"a": {"kernel": None}}, "'a/kernel' is a NoneType"),
    ],
)
def test_params_must_be_a_mapping_of_arrays(params, message):
    with pytest.raises(ValueError, match=message):
        names(params, target_modules=["a"])


def test_boxed_params_say_how_to_unbox():
    import flax.linen as nn

    model = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.zeros, (None, "model")))
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))
    with pytest.raises(ValueError, match=r"unbox\(params\)"):
        names({"a": params["params"]}, target_modules=["a"])


def test_a_quantised_kernel_is_refused():
    params = {"a": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.int8)}}
    with pytest.raises(NotImplementedError, match="'a' has dtype int8"):
        names(params, target_modules=["a"])
