"""Steps that are not finite: left out, and traced to the leaf that the NaN began in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peanut_jax.trainer.guard import guard, guarded, leaf_name

GRADS = {"k": {"a": jnp.ones(3), "b": jnp.ones(4)}, "q": {"a": jnp.full(2, 5.0)}}


def with_bad(value, module="k", name="b"):
    leaf = GRADS[module][name].at[1].set(value)
    return {**GRADS, module: {**GRADS[module], name: leaf}}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_leaf_of_a_streak_is_kept(bad):
    """Finite; one bad leaf; all bad, as it is when the adapters are; finite again; another bad leaf."""
    tx = guard(optax.sgd(1.0))
    state = tx.init(GRADS)
    every = jax.tree.map(lambda leaf: jnp.full_like(leaf, bad), GRADS)
    found = []
    for grads in (GRADS, with_bad(bad), every, GRADS, with_bad(bad, "q", "a")):
        updates, state = tx.update(grads, state)
        found.append((int(state[0].streak), leaf_name(grads, int(state[0].worst)), float(updates["q"]["a"][0])))
    assert found == [(0, "q a", -5), (1, "k b", 0), (2, "k b", 0), (0, "q a", -5), (1, "q a", 0)]


@pytest.mark.parametrize("clip", [1.0, None])
def test_an_infinite_norm_leaves_the_moments_alone(clip):
    """Each number finite, their squares not."""
    adam = optax.adam(0.1)
    tx = guard(adam if clip is None else optax.chain(optax.clip_by_global_norm(clip), adam))
    _, state = tx.update(GRADS, tx.init(GRADS))
    updates, after = tx.update(with_bad(3e30), state)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after[1].inner_state, state[1].inner_state)
    assert leaf_name(GRADS, int(after[0].worst)) == "k b"


@pytest.mark.parametrize(("loss", "finite"), [(2.0, True), (np.inf, False), (np.nan, False)])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(loss, finite):
    """The loss itself stays what it is, where it is a number; its gradient here would be 3 whatever it is."""
    fn = guarded(lambda params, batch, key: (3 * params + batch, {}))
    (value, _), grad = jax.value_and_grad(fn, has_aux=True)(1.0, loss - 3, None)
    assert bool(np.isfinite(grad)) == finite
    assert value == loss or not finite
