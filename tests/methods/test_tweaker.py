"""The facts of PEANuT's mathematics, each as a property (design: W = W0 + scaling * f(W0; theta))."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import peanut_jax as pj
from peanut_jax.matrices import Plain
from peanut_jax.methods import tweaker
from peanut_jax.methods.activations import ACTIVATIONS

D_IN, D_OUT, R = 10, 7, 4
SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def theta_of(seed, orientation="output", depth=2, zero_b=False, r=R, stack=()):
    config = pj.PeanutConfig(r=r, depth=depth, orientation=orientation, init_weights=zero_b)
    return config.start(jax.random.key(seed), Plain(jnp.zeros((*stack, D_IN, D_OUT))))


def kernel_of(seed, stack=(), dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed + 1), (*stack, D_IN, D_OUT)).astype(dtype)


@partial(jax.jit, static_argnames=("act_fn", "orientation"))
def delta_of(kernel, theta, act_fn="relu", orientation="output", scaling=1.0):
    update = tweaker.factors(Plain(kernel), theta, act=ACTIVATIONS[act_fn], scaling=scaling, orientation=orientation)
    return update.delta()


def relative_error(actual, expected):
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("orientation", ["output", "input"])
@pytest.mark.parametrize("depth", [0, 2])
def test_parameters_a_kernel(orientation, depth):
    side = D_OUT if orientation == "output" else D_IN
    leaves = jax.tree.leaves(theta_of(0, orientation, depth))
    assert sum(leaf.size for leaf in leaves) == 2 * side * R + 2 * depth * R**2


def test_init_is_uniform_in_one_over_root_fan_in():
    config, kernel = pj.PeanutConfig(r=16, depth=2), Plain(jnp.zeros((64, 400)))
    theta = config.start(jax.random.key(0), kernel)
    for name, fan_in in (("a", 400), ("encoders", 16), ("decoders", 16)):
        bound = fan_in**-0.5
        assert float(jnp.abs(theta[name]).max()) <= bound
        np.testing.assert_allclose(float(theta[name].std()), bound / 3**0.5, rtol=0.1)
    assert not theta["b"].any()
    drawn = dataclasses.replace(config, init_weights=False).start(jax.random.key(0), kernel)
    np.testing.assert_allclose(float(drawn["b"].std()), 16**-0.5 / 3**0.5, rtol=0.1)
    np.testing.assert_array_equal(drawn["a"], theta["a"])


@pytest.mark.parametrize("act_fn", sorted(ACTIVATIONS))
@pytest.mark.parametrize("orientation", ["output", "input"])
def test_zero_b_is_an_exact_no_op_and_only_b_has_a_gradient(act_fn, orientation):
    theta, kernel = theta_of(3, orientation, zero_b=True), kernel_of(3)
    probe = jax.random.normal(jax.random.key(9), kernel.shape)

    def loss(theta):
        update = delta_of(kernel, theta, act_fn, orientation)
        return jnp.sum(update * probe), update

    grads, update = jax.grad(loss, has_aux=True)(theta)
    assert not update.any()
    assert float(jnp.abs(grads.pop("b")).max()) > 0
    for name, grad in grads.items():
        assert not grad.any(), name


@given(SEEDS, st.sampled_from([2, 5, 9]))
def test_rows_of_the_kernel_are_independent(seed, row):
    """Output orientation: row i of dW depends on row i of W0 alone, so a row-sharded kernel needs no collective."""
    kernel, theta = kernel_of(seed), theta_of(seed)
    changed = delta_of(kernel.at[row].multiply(-2.0), theta) - delta_of(kernel, theta)
    others = np.delete(np.asarray(changed), row, axis=0)
    np.testing.assert_array_equal(others, 0)
    assert jnp.abs(changed[row]).max() > 0


@given(SEEDS)
def test_columns_are_independent_in_the_input_orientation(seed):
    kernel, theta = kernel_of(seed), theta_of(seed, "input")
    changed = delta_of(kernel.at[:, 3].multiply(-2.0), theta, "relu", "input")
    changed -= delta_of(kernel, theta, "relu", "input")
    np.testing.assert_array_equal(np.delete(np.asarray(changed), 3, axis=1), 0)
    assert jnp.abs(changed[:, 3]).max() > 0


@given(SEEDS)
def test_the_input_orientation_is_the_same_network_on_the_transpose(seed):
    kernel = kernel_of(seed)
    theta = pj.PeanutConfig(r=R, depth=2, init_weights=False).start(jax.random.key(seed), Plain(kernel.T))
    there = delta_of(kernel, theta, "gelu", "input")
    np.testing.assert_allclose(there, delta_of(kernel.T, theta, "gelu", "output").T, atol=1e-6)


@given(SEEDS, st.floats(0.1, 8.0))
def test_relu_is_positively_homogeneous(seed, scale):
    kernel, theta = kernel_of(seed), theta_of(seed)
    assert relative_error(delta_of(scale * kernel, theta), scale * delta_of(kernel, theta)) < 1e-6


@given(SEEDS, st.floats(0.01, 4.0))
def test_scaling_multiplies_the_update(seed, scaling):
    kernel, theta = kernel_of(seed), theta_of(seed)
    assert relative_error(delta_of(kernel, theta, scaling=scaling), scaling * delta_of(kernel, theta)) < 1e-6


@pytest.mark.parametrize("orientation", ["output", "input"])
@pytest.mark.parametrize("r", [1, 3, 12])
def test_rank_is_at_most_r(orientation, r):
    update = delta_of(kernel_of(5), theta_of(5, orientation, r=r), "tanh", orientation)
    values = np.linalg.svd(np.asarray(update, np.float64), compute_uv=False)
    assert (values[min(r, len(values)) :] < 1e-6 * values[0]).all()
    assert values[0] > 0


@pytest.mark.parametrize("orientation", ["output", "input"])
def test_stacked_kernels_are_their_layers(orientation):
    kernel, theta = kernel_of(2, (3,)), theta_of(2, orientation, stack=(3,))
    together = delta_of(kernel, theta, "silu", orientation)
    for layer in range(3):
        alone = delta_of(kernel[layer], jax.tree.map(lambda a, i=layer: a[i], theta), "silu", orientation)
        np.testing.assert_allclose(together[layer], alone, atol=1e-6)


@pytest.mark.parametrize("orientation", ["output", "input"])
@pytest.mark.parametrize("act_fn", ["tanh", "sin"])
def test_the_written_gradient_is_the_derived_one(orientation, act_fn):
    """The custom rule of the first product against autodiff of the same function without it."""
    theta, kernel = theta_of(4, orientation), kernel_of(4)
    probe = jax.random.normal(jax.random.key(1), kernel.shape)

    def plain(theta):
        act = ACTIVATIONS[act_fn]
        w = kernel if orientation == "output" else kernel.T
        z0 = act(w @ theta["a"])
        z1 = act(z0 @ theta["encoders"][0])
        z2 = act(z1 @ theta["encoders"][1])
        z3 = act(z2 @ theta["decoders"][0]) + z1
        z4 = act(z3 @ theta["decoders"][1]) + z0
        update = z4 @ theta["b"]
        return jnp.sum((update if orientation == "output" else update.T) * probe)

    ours = jax.grad(lambda t: jnp.sum(delta_of(kernel, t, act_fn, orientation) * probe))(theta)
    # sin multiplies by 2 pi at each of the five layers: rounding of z grows by 1e4 before it reaches A.
    tolerance = 1e-4 if act_fn == "sin" else 1e-6
    for name, grad in jax.grad(plain)(theta).items():
        assert relative_error(ours[name], grad) < tolerance, name


@pytest.mark.parametrize("orientation", ["output", "input"])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_kernel_is_read_once_in_each_direction(orientation, depth):
    """Read from the traced step: what takes W0 is one product forward and one in the pullback."""
    kernel, theta = kernel_of(0, dtype=jnp.bfloat16), theta_of(0, orientation, depth)

    def step(kernel, theta):
        made, pullback = jax.vjp(
            lambda theta: tweaker.factors(
                Plain(kernel), theta, act=jax.nn.relu, scaling=1.0, orientation=orientation
            ), theta,
        )  # fmt: skip
        return made, pullback(made)

    assert reads(jax.make_jaxpr(step)(kernel, theta).jaxpr) == ["dot_general", "dot_general"]


def reads(jaxpr, kernel=0):
    """The primitives that take an argument of the program, within its inner calls too."""
    found = []
    for equation in jaxpr.eqns:
        places = [i for i, one in enumerate(equation.invars) if one is jaxpr.invars[kernel]]
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr") and hasattr(value, "consts")]
        for place in places:
            found += reads(inner[0].jaxpr, place) if inner else [equation.primitive.name]
    return found


@pytest.mark.parametrize("orientation", ["output", "input"])
def test_a_bfloat16_kernel_keeps_float32_factors_and_is_never_widened(orientation):
    theta, kernel = theta_of(6, orientation), kernel_of(6, dtype=jnp.bfloat16)

    def loss(theta):
        left, right = tweaker.factors(
            Plain(kernel), theta, act=ACTIVATIONS["gelu"], scaling=1.0, orientation=orientation
        )
        assert left.dtype == right.dtype == jnp.float32
        return jnp.sum(left) + jnp.sum(right**2)

    grads = jax.grad(loss)(theta)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    wide = delta_of(kernel.astype(jnp.float32), theta, "gelu", orientation)
    assert (
        0 < relative_error(delta_of(kernel, theta, "gelu", orientation), wide) < 2**-7
    )  # A is rounded to bfloat16 once: 8 bits
    program = str(jax.make_jaxpr(jax.grad(loss))(theta))
    assert f"f32[{D_IN},{D_OUT}]" not in program
    assert f"bf16[{D_IN},{D_OUT}]" in program


@given(SEEDS)
def test_a_lora_becomes_a_peanut_of_twice_the_rank(seed):
    """Prop. 3.2: A = [W0^+ A*, -W0^+ A*], B = [B*; -B*] gives the LoRA projected on W0's left singular space."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(D_IN, D_OUT))
    lora_a, lora_b = rng.normal(size=(D_IN, 3)), rng.normal(size=(3, D_OUT))
    a = np.linalg.pinv(kernel) @ lora_a
    theta = {"a": np.concatenate([a, -a], 1), "b": np.concatenate([lora_b, -lora_b], 0)}
    theta = {name: jnp.asarray(value, jnp.float32) for name, value in theta.items()}
    left_space = np.linalg.svd(kernel, full_matrices=False)[0]
    expected = left_space @ left_space.T @ lora_a @ lora_b
    np.testing.assert_allclose(delta_of(jnp.asarray(kernel, jnp.float32), theta), expected, atol=2e-4)


def test_sin_with_one_hidden_unit_fits_any_numbers():
    """Prop. B.1 on a small case: sin(2 pi w a) with one free frequency a comes as close as wished to given targets.

    The entries of W0 are linearly independent over the rationals, so the multiples a * W0 are dense modulo 1.
    """
    kernel = jnp.array([[2.0**0.5], [3.0**0.5]])
    targets = np.array([0.8, -0.6])
    frequencies = jnp.arange(0.0, 400.0, 0.05)
    theta = {"a": frequencies[None, :], "b": jnp.zeros((frequencies.size, 1))}
    z = tweaker.hidden(Plain(kernel), theta, act=ACTIVATIONS["sin"], orientation="output")
    assert float(np.abs(np.asarray(z) - targets[:, None]).max(axis=0).min()) < 0.02


def test_lora_is_blind_to_the_kernel():
    config, kernel = pj.LoraConfig(r=R, scaling=0.5), Plain(jnp.full((D_IN, D_OUT), jnp.nan))
    theta = config.start(jax.random.key(0), kernel)
    theta["b"] += 1.0
    left, right = config.update(theta, kernel)
    np.testing.assert_array_equal(left, theta["a"])
    np.testing.assert_array_equal(right, 0.5 * theta["b"])
