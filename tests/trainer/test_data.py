"""Batches: a function of the step, and every row once in an evaluation."""

import jax
import numpy as np
import pytest

from peanut_jax.trainer.data import batches, in_order, local_rows


class Numbers:
    """Row i is i."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"tokens": np.full(2, i), "weights": np.ones(2)}


def test_batches_are_a_function_of_the_step():
    """Each epoch holds every row once, in another order; a later start gives the same batches."""
    sharding = jax.sharding.NamedSharding(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), jax.P("data"))
    options = {"batch_size": 4, "seed": 3, "sharding": sharding}
    found = [np.asarray(b["tokens"])[:, 0] for b in batches(Numbers(), start=0, stop=10, **options)]
    rows = np.concatenate(found)
    epochs = rows.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    later = [np.asarray(b["tokens"])[:, 0] for b in batches(Numbers(), start=6, stop=10, **options)]
    np.testing.assert_array_equal(later, found[6:])


def test_an_evaluation_sees_every_row_once():
    sharding = jax.sharding.NamedSharding(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), jax.P("data"))
    found = list(in_order(Numbers(), batch_size=4, sharding=sharding))
    rows = np.concatenate([np.asarray(b["tokens"])[:, 0] for b in found])
    counts = np.concatenate([np.asarray(b["weights"])[:, 0] for b in found])
    assert rows[counts == 1].tolist() == list(range(10))
    assert counts.sum() == 10


def test_a_batch_that_does_not_divide():
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    with pytest.raises(ValueError, match=r"a batch of 12 rows does not divide over 8 data shards"):
        local_rows(12, sharding)
