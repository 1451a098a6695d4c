"""The rotation, whose backward pass is written, against the plain formula and its derived one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peanut_jax.models.rope import Rope, inverse_frequencies, rotate


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_written_gradient_is_the_derived_one(dtype):
    x, slope = (jax.random.normal(jax.random.key(seed), (2, 5, 3, 8)).astype(dtype) for seed in range(2))
    positions = jnp.arange(10).reshape(2, 5)

    def plain(x):
        angles = (positions[..., None] * inverse_frequencies(Rope(), 8))[:, :, None, :]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = first * jnp.cos(angles) - second * jnp.sin(angles), second * jnp.cos(angles) + first * jnp.sin(angles)
        return jnp.concatenate(turned, axis=-1).astype(dtype)

    for fn in (jax.jit, lambda fn: fn):
        want, want_pullback = jax.vjp(fn(plain), x)
        got, got_pullback = jax.vjp(fn(lambda x: rotate(x, positions, Rope())), x)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 1e-2, "atol": 1e-2}
        np.testing.assert_allclose(np.float32(got), np.float32(want), **close)
        np.testing.assert_allclose(np.float32(got_pullback(slope)[0]), np.float32(want_pullback(slope)[0]), **close)
