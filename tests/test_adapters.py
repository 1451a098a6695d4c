"""The adapter pytree: what init draws, what does not fit is named, what merge does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

import peanut_jax as pj
from peanut_jax.base.kernels import flatten

QUERY = "bert/encoder/layer/{}/attention/self/query/kernel"


def config_of(**fields):
    return pj.PeanutConfig(**{"r": 3, "target_modules": ["query"], "init_weights": False, **fields})


@pytest.fixture(scope="module")
def params(bert):
    return bert.params


def test_one_key_a_kernel(params):
    """Adding a target changes no other draw, and no two kernels share one."""
    alone = pj.init(jax.random.key(0), params, config_of())
    more = pj.init(jax.random.key(0), params, config_of(target_modules=["query", "value"], layers_to_transform=0))
    jax.tree.map(np.testing.assert_array_equal, alone.theta[QUERY.format(0)], more.theta[QUERY.format(0)])
    draws = [np.asarray(theta["a"]).tobytes() for theta in more.theta.values()] + [
        np.asarray(alone.theta[QUERY.format(1)]["a"]).tobytes()
    ]
    assert len(set(draws)) == 3


def test_init_under_jit_is_init(params):
    config = config_of(task_type="SEQ_CLS")
    eager = pj.init(jax.random.key(1), params, config)
    jax.tree.map(np.testing.assert_array_equal, eager, jax.jit(lambda p: pj.init(jax.random.key(1), p, config))(params))


def test_count(params):
    config = config_of(depth=2, task_type="SEQ_CLS")
    adapters = pj.init(jax.random.key(0), params, config)
    head = sum(leaf.size for leaf in jax.tree.leaves(params["classifier"]))
    assert pj.count(adapters) == 2 * (2 * 16 * 3 + 4 * 3 * 3) + head


def test_r_may_exceed_the_kernel(params):
    """Allowed, as in PEFT: Prop. 3.2 needs 2r hidden units. The update's rank is then bounded by the kernel."""
    config = config_of(r=40)
    adapters = pj.init(jax.random.key(0), params, config)
    left, right = pj.factors(adapters, params, config)[QUERY.format(0)]
    assert (left.shape, right.shape) == ((16, 40), (40, 16))
    assert jnp.linalg.matrix_rank(left @ right) <= 16


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("as_array", [jnp.asarray, np.asarray])
def test_a_kernel_that_is_not_finite_is_named(params, bad, as_array):
    broken = jax.tree.map(np.array, params)
    broken["bert"]["encoder"]["layer"]["1"]["attention"]["self"]["query"]["kernel"][0, 0] = bad
    with pytest.raises(ValueError, match=f"NaN or an infinity: {QUERY.format(1)}$"):
        pj.init(jax.random.key(0), jax.tree.map(as_array, broken), config_of())


def test_merge_refuses_a_broken_adapter(params):
    adapters = pj.init(jax.random.key(0), params, config_of())
    adapters.theta[QUERY.format(0)]["b"] = adapters.theta[QUERY.format(0)]["b"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=f"NaNs detected in the merged weights.*{QUERY.format(0)}"):
        pj.merge(params, adapters, config_of())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4}, r"query/kernel' a is \(16, 3\), expected \(16, 4\)"),
        ({"depth": 1}, r"query/kernel' encoders is missing"),
        (
            {"target_modules": ["query", "value"]},
            r"value/kernel' a is missing; .*; and 1 more|value/kernel' a is missing",
        ),
        ({"target_modules": ["value"]}, r"is missing.*and 3 more"),
        ({"layers_to_transform": 1}, rf"'{QUERY.format(0)}' a is not asked for"),
        ({"task_type": "SEQ_CLS"}, r"'classifier/bias' is missing"),
    ],
)
def test_an_adapter_of_another_config_is_refused(params, fields, message):
    adapters = pj.init(jax.random.key(0), params, config_of())
    for use in (pj.factors, lambda a, p, c: pj.merge(p, a, c)):
        with pytest.raises(ValueError, match=f"does not fit this config and these params: .*({message})"):
            use(adapters, params, config_of(**fields))


def test_an_orientation_shows_where_the_kernel_is_not_square(params):
    config = config_of(target_modules=["intermediate.dense"])
    adapters = pj.init(jax.random.key(0), params, config)
    with pytest.raises(ValueError, match=r"a is \(24, 3\), expected \(16, 3\)"):
        pj.factors(adapters, params, config_of(target_modules=["intermediate.dense"], orientation="input"))


def test_a_config_for_other_params_is_refused(params):
    adapters = pj.init(jax.random.key(0), params, config_of())
    with pytest.raises(ValueError, match="entry 'query' matched none of 1 kernels"):
        pj.factors(adapters, {"mlp": {"kernel": jnp.ones((4, 4))}}, config_of())
    with pytest.raises(ValueError, match="adapters must be the Adapters that init returns, got list"):
        pj.factors([1], params, config_of())


def test_two_adapters_sum_their_updates_of_the_original_kernel(params):
    first, second = config_of(scaling=0.5), config_of(target_modules=["query", "value"], depth=1)
    trees = [pj.factors(pj.init(jax.random.key(i), params, c), params, c) for i, c in enumerate((first, second))]
    both = pj.combine(*trees)
    assert set(both) == set(trees[1])
    for path, (left, right) in both.items():
        expected = sum(tree[path][0] @ tree[path][1] for tree in trees if path in tree)
        np.testing.assert_allclose(left @ right, expected, atol=1e-6)


def test_merge_returns_the_same_kind_of_tree_and_shares_what_it_leaves(params):
    config = config_of()
    adapters = pj.init(jax.random.key(0), params, config)
    merged = pj.merge(params, adapters, config)
    changed = {path for path, leaf in flatten(merged).items() if leaf is not flatten(params)[path]}
    assert changed == {QUERY.format(0), QUERY.format(1)}
    odd = {**params, "dropout": {}}
    assert jax.tree.structure(pj.merge(odd, adapters, config)) == jax.tree.structure(odd)
    frozen = pj.merge(freeze({"params": params, "cache": {"n": jnp.ones(1)}}), adapters, config)
    assert isinstance(frozen, FrozenDict)
    assert set(frozen) == {"params", "cache"}
    np.testing.assert_array_equal(flatten(frozen)[QUERY.format(0)], flatten(merged)[QUERY.format(0)])


def test_saved_modules_are_trained_copies_that_merge_puts_in(params):
    config = config_of(task_type="SEQ_CLS", init_weights=True)
    adapters = pj.init(jax.random.key(0), params, config)
    adapters.saved["classifier/bias"] += 1.0
    np.testing.assert_array_equal(
        pj.merge(params, adapters, config)["classifier"]["bias"], params["classifier"]["bias"] + 1
    )


def test_lora_takes_the_same_road(params):
    config = pj.LoraConfig(r=3, target_modules=["query"], scaling=2.0)
    adapters = pj.init(jax.random.key(0), params, config)
    assert {name: leaf.shape for name, leaf in adapters.theta[QUERY.format(0)].items()} == {"a": (16, 3), "b": (3, 16)}
    assert not adapters.theta[QUERY.format(0)]["b"].any()
    adapters.theta[QUERY.format(0)]["b"] = jnp.ones((3, 16))
    update = pj.merge(params, adapters, config)["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]
    np.testing.assert_allclose(
        update - flatten(params)[QUERY.format(0)],
        2.0 * adapters.theta[QUERY.format(0)]["a"] @ jnp.ones((3, 16)),
        atol=1e-6,
    )
