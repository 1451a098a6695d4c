"""Where interception could be silently wrong, it raises; what it draws, it draws only on the adapter path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D

import peanut_jax as pj


class Two(nn.Module):
    """Two layers, of which a call may skip the second."""

    @nn.compact
    def __call__(self, x, second=True):
        x = nn.Dense(6, name="first")(x)
        return nn.Dense(6, name="second")(x) if second else x


X = jnp.ones((3, 4))
MODEL = Two()
PARAMS = MODEL.init(jax.random.key(0), X)["params"]
CONFIG = pj.PeanutConfig(r=2, target_modules="all-linear", init_weights=False)
ADAPTERS = pj.init(jax.random.key(1), PARAMS, CONFIG)


def run(params, x, **kwargs):
    return MODEL.apply({"params": params}, x, **kwargs)


def test_updates_that_are_known_already():
    inside = pj.bind(run, pj.factors(ADAPTERS, PARAMS, CONFIG))(PARAMS, X)
    np.testing.assert_allclose(inside, pj.adapt(run, CONFIG)(ADAPTERS, PARAMS, X), rtol=1e-6)
    assert float(jnp.abs(inside - run(PARAMS, X)).max()) > 1e-3
    pairs = {path: tuple(update) for path, update in pj.factors(ADAPTERS, PARAMS, CONFIG).items()}
    np.testing.assert_array_equal(pj.bind(run, pairs)(PARAMS, X), inside)


def test_inputs_may_be_named():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="first")(inputs=x)

    params = {"first": PARAMS["first"]}
    config = pj.PeanutConfig(r=2, target_modules=["first"], init_weights=False)
    adapters = pj.init(jax.random.key(1), params, config)
    fn = lambda p, x: Named().apply({"params": p}, x)  # noqa: E731
    merged = fn(pj.merge(params, adapters, config), X)
    np.testing.assert_allclose(pj.adapt(fn, config)(adapters, params, X), merged, rtol=1e-5)


def test_a_kernel_that_is_never_called_is_named():
    with pytest.raises(ValueError, match=r"1 adapted kernels were never called.*: second/kernel\. "):
        pj.adapt(run, CONFIG)(ADAPTERS, PARAMS, X, second=False)


def test_an_error_inside_is_not_hidden():
    def broken(params, x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pj.adapt(broken, CONFIG)(ADAPTERS, PARAMS, X)


def test_a_dense_general_read_wrongly_says_how_to_say_it():
    model = nn.DenseGeneral((2, 5), use_bias=False)
    variables = {"params": {"q": model.init(jax.random.key(0), X)["params"]}}

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral((2, 5), use_bias=False, name="q")(x)

    config = pj.PeanutConfig(r=2, target_modules=["q"])
    adapters = pj.init(jax.random.key(1), variables, config)
    with pytest.raises(ValueError, match=r"set kernel_axes=peanut_jax.kernel_axes\(\.\.\.\)"):
        pj.adapt(Outer().apply, config)(adapters, variables, X)


def test_a_convolution_is_refused_by_its_type():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(5, (3,), name="mix")(x)

    x = jnp.ones((2, 7, 4))
    variables = Outer().init(jax.random.key(0), x)
    config = pj.PeanutConfig(r=2, target_modules=["mix"])
    adapters = pj.init(jax.random.key(1), variables, config)
    with pytest.raises(NotImplementedError, match="'mix/kernel' belongs to a Conv"):
        pj.adapt(Outer().apply, config)(adapters, variables, x)


def test_a_conv1d_outside_gpt2_is_refused():
    """Its square kernel is stored transposed, which nothing in the parameters shows."""

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return FlaxConv1D(4, name="mix")(x)

    variables = Outer().init(jax.random.key(0), X)
    config = pj.PeanutConfig(r=2, target_modules=["mix"])
    adapters = pj.init(jax.random.key(1), variables, config)
    with pytest.raises(NotImplementedError, match=r"'mix/kernel' belongs to a FlaxConv1D.*c_attn"):
        pj.adapt(Outer().apply, config)(adapters, variables, X)


DROPPED = pj.PeanutConfig(r=2, target_modules=["first"], act_fn="tanh", init_weights=False, dropout=0.5)


def first(params, x, key=None):
    rngs = None if key is None else {"dropout": key}
    return MODEL.apply({"params": params}, x, second=False, rngs=rngs)


def test_dropout_falls_on_the_input_of_the_update_alone():
    """With x = I, row i of the update is dropped whole or doubled; the base's part is never touched."""
    adapters = pj.init(jax.random.key(1), PARAMS, DROPPED)
    x = jnp.eye(4)
    whole = pj.adapt(first, DROPPED)(adapters, PARAMS, x) - first(PARAMS, x)
    train = jax.jit(pj.adapt(first, DROPPED, train=True))
    kept = 0
    for seed in range(40):
        update = train(adapters, PARAMS, x, jax.random.key(seed)) - first(PARAMS, x)
        factor = jnp.round(update[:, 0] / whole[:, 0])
        assert set(np.asarray(factor).tolist()) <= {0.0, 2.0}
        np.testing.assert_allclose(update, factor[:, None] * whole, atol=1e-6)
        kept += int((factor == 2).sum())
    assert 50 < kept < 110


def test_dropout_is_off_unless_training_and_needs_an_rng():
    adapters = pj.init(jax.random.key(1), PARAMS, DROPPED)
    np.testing.assert_array_equal(
        pj.adapt(first, DROPPED)(adapters, PARAMS, X, jax.random.key(0)), pj.adapt(first, DROPPED)(adapters, PARAMS, X)
    )
    with pytest.raises(ValueError, match=r"dropout=0.5 needs a 'dropout' rng.*'first/kernel'.*dropout_rng=key"):
        pj.adapt(first, DROPPED, train=True)(adapters, PARAMS, X)


def test_the_models_own_dropout_draws_what_it_drew_before():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(6, name="first")(x))

    def fn(params, x, key):
        return Noisy().apply({"params": params}, x, rngs={"dropout": key})

    params = {"first": PARAMS["first"]}
    config = pj.PeanutConfig(r=2, target_modules=["first"], dropout=0.5)
    adapters = pj.init(jax.random.key(1), params, config)
    x = jax.random.normal(jax.random.key(2), (8, 4))
    np.testing.assert_array_equal(
        pj.adapt(fn, config, train=True)(adapters, params, x, jax.random.key(3)), fn(params, x, jax.random.key(3))
    )
