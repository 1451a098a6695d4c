"""The tweaker against plain NumPy: values for every activation, orientation and depth; gradients by differences."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peanut_jax import PeanutConfig
from peanut_jax.matrices import Plain
from peanut_jax.methods import tweaker
from peanut_jax.methods.activations import ACTIVATIONS

from . import numpy_peanut

D_IN, D_OUT, R, LAYERS = 7, 5, 3, 2
SCALING = 0.3
DEPTHS = range(4)
ORIENTATIONS = ("output", "input")
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed, depth, orientation, stack=(), act_fn="relu"):
    """A kernel and theta of ordinary size, B not zero.

    E and D keep the size of their input, the sine's slope of 2 pi counted, for six layers of them multiply rounding.
    """
    rng = np.random.default_rng(seed)
    slope = 2 * math.pi if act_fn == "sin" else 1
    keep = 1 / (slope * math.sqrt(R))
    scales = {"a": 1, "b": 1, "encoders": keep, "decoders": keep}
    shapes = PeanutConfig(r=R, depth=depth, orientation=orientation).shapes(D_IN, D_OUT)
    theta = {name: rng.normal(0, scales[name], stack + shape).astype(np.float32) for name, shape in shapes.items()}
    return rng.normal(size=(*stack, D_IN, D_OUT)).astype(np.float32), theta


def ours(kernel, theta, act_fn, orientation):
    left, right = tweaker.factors(
        Plain(jnp.asarray(kernel)), jax.tree.map(jnp.asarray, theta),
        act=ACTIVATIONS[act_fn], scaling=SCALING, orientation=orientation,
    )  # fmt: skip
    assert left.dtype == right.dtype == jnp.float32
    assert left.shape[-1] == right.shape[-2] == R
    return np.asarray(left, np.float64) @ np.asarray(right, np.float64)


def numpys(kernel, theta, act_fn, orientation):
    return numpy_peanut.delta_weight(kernel, theta, act_fn=act_fn, scaling=SCALING, orientation=orientation)


def assert_close(got, want, rtol=5e-6):
    """Within `rtol` of the largest magnitude: entries near zero are differences of large terms."""
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


def test_every_activation_has_an_oracle():
    assert set(numpy_peanut.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("act_fn", sorted(ACTIVATIONS))
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_values(orientation, depth, act_fn, seed):
    kernel, theta = draw(seed, depth, orientation, act_fn=act_fn)
    # The sine's slope multiplies the rounding of A's layer by 2 pi before six layers that only on average keep it.
    rtol = 5e-5 if act_fn == "sin" else 5e-6
    assert_close(ours(kernel, theta, act_fn, orientation), numpys(kernel, theta, act_fn, orientation), rtol)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_values_of_a_bfloat16_kernel(orientation, depth, seed):
    """A is rounded to the kernel's dtype and nothing else is: the rest accumulates in float32."""
    kernel, theta = draw(seed, depth, orientation)
    kernel = kernel.astype(ml_dtypes.bfloat16)
    got = ours(kernel, theta, "gelu", orientation)
    rounded = {**theta, "a": theta["a"].astype(ml_dtypes.bfloat16)}
    assert_close(got, numpys(kernel, rounded, "gelu", orientation))
    # bfloat16 keeps 8 bits; a layer of R or D_OUT terms may grow the relative error of its input.
    assert_close(got, numpys(kernel, theta, "gelu", orientation), rtol=2**-8 * 8)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_values_of_a_layer_stack(orientation, depth):
    kernels, thetas = draw(0, depth, orientation, stack=(LAYERS,))
    got = ours(kernels, thetas, "tanh", orientation)
    for layer in range(LAYERS):
        theta = {name: value[layer] for name, value in thetas.items()}
        assert_close(got[layer], numpys(kernels[layer], theta, "tanh", orientation))


@pytest.mark.parametrize("name", ["a", "b", "encoders", "decoders"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_gradients_are_the_differences_of_numpy(orientation, name):
    """d<dW, G>/dtheta along a random direction, against a central difference in float64."""
    kernel, theta = draw(1, 2, orientation)
    rng = np.random.default_rng(2)
    weight, direction = rng.normal(size=kernel.shape), rng.normal(size=theta[name].shape)

    def loss(theta):
        update = tweaker.factors(
            Plain(jnp.asarray(kernel)), theta, act=ACTIVATIONS["tanh"], scaling=SCALING, orientation=orientation
        )
        return jnp.sum(update.delta() * weight)

    def numpy_loss(step):
        return np.sum(numpys(kernel, {**theta, name: theta[name] + step * direction}, "tanh", orientation) * weight)

    gradient = np.asarray(jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, theta))[name])
    difference = (numpy_loss(1e-5) - numpy_loss(-1e-5)) / 2e-5
    scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
    assert abs(np.sum(gradient * direction) - difference) < 1e-5 * scale
