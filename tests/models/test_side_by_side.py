"""Several adapters' low-rank updates in one batch: each row's own, on either road, whatever is in the others'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peanut_jax.models.serving import by_row, repeated
from peanut_jax.models.side_by_side import side_by_side
from peanut_jax.updates import LowRank

D_IN, D_OUT = 12, 10


def low_rank(seed, r):
    left, right = jax.random.split(jax.random.key(seed))
    return LowRank(jax.random.normal(left, (D_IN, r)), jax.random.normal(right, (r, D_OUT)))


@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize("ranks", [(3, 8), (100, 60)])  # in both roads' sizes
def test_each_row_has_its_own(seq, ranks):
    updates = [low_rank(0, ranks[0]), None, low_rank(1, ranks[1])]
    rows = [2, 0, 1, -1, 2]
    x = jax.random.normal(jax.random.key(2), (len(rows), seq, D_IN))
    y = jnp.zeros((len(rows), seq, D_OUT))
    got = side_by_side(updates, rows, jnp.float32)(x, y)
    for row, adapter in enumerate(rows):
        update = updates[adapter] if adapter >= 0 else None
        want = y[row] if update is None else update(x[row], y[row])
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_adapter_breaks_its_own_rows_alone(seq, side, value):
    good, bad = low_rank(0, 100), low_rank(1, 60)
    bad = bad._replace(**{side: getattr(bad, side).at[0, 0].set(value)})
    x, y = jnp.ones((3, seq, D_IN)), jnp.zeros((3, seq, D_OUT))
    got = side_by_side([bad, good], [0, 1, -1], jnp.float32)(x, y)
    np.testing.assert_allclose(got[1], good(x[1], y[1]), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got[2], 0)
    assert not jnp.isfinite(got[0]).all()


def test_factors_are_held_once_whatever_the_rows():
    """Those of the adapters that a row takes: not of the others, not for each row, not for each beam."""
    adapters = [{"kernel": low_rank(seed, 16)} for seed in range(6)]
    served = by_row(adapters, [4, 1, 4, 4, 1], 8, jnp.bfloat16)
    for update in (served["kernel"], repeated(served, 3)["kernel"]):
        assert update.left.shape == (32, D_IN)
        assert update.right.shape == (32, D_OUT)
        assert update.left.dtype == update.right.dtype == jnp.bfloat16
    assert repeated(served, 3)["kernel"].columns.shape == (24, 16)
    other = by_row(adapters, [0, 5], 8, jnp.bfloat16)  # others compile nothing
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, served)
