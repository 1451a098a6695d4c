"""Rows of data as global batches: each process reads the rows that its devices hold, ahead of the step.

The rows of step s are a function of s and the seed alone, so that a resumed run goes on where it was, on any number of
processes.
"""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from peanut_jax.sharding import check_batch
from peanut_jax.trainer.rows import WEIGHTS, Row, Rows

Batch = dict[str, jax.Array]
_THREADS, _AHEAD = 2, 4


def batches(
    rows: Rows, *, batch_size: int, seed: int, start: int, stop: int, sharding: NamedSharding
) -> Iterator[Batch]:
    """The batches of steps `start` to `stop`, shuffled anew each epoch, prefetched by threads.

    Args:
        batch_size: Rows of a step over all processes.
        sharding: Sharding of the batch; the rows of this process's devices are read and no others.

    Raises:
        ValueError: no rows.
    """
    if not len(rows):
        raise ValueError("the training data has no rows")
    stream = grain.MapDataset.source(_Source(rows)).seed(seed).shuffle().repeat()
    mine = local_rows(batch_size, sharding)

    def read(step: int) -> dict[str, np.ndarray]:
        return _stacked([stream[step * batch_size + i] for i in mine])

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    for local in grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options):
        yield placed(local, mine, batch_size, sharding)


def batch_shapes(rows: Rows, batch_size: int, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """What `batches` gives, as shapes."""
    row = {name: np.asarray(value) for name, value in rows[0].items()}
    return {
        name: jax.ShapeDtypeStruct((batch_size, *value.shape), value.dtype, sharding=sharding)
        for name, value in row.items()
    }


def in_order(rows: Rows, *, batch_size: int, sharding: NamedSharding) -> Iterator[Batch]:
    """Every row once, in batches of one size: the last is filled up with rows of weight 0."""
    mine = local_rows(batch_size, sharding)
    for start in range(0, len(rows), batch_size):
        local = _stacked([_row_or_filler(rows, start + i) for i in mine])
        yield placed(local, mine, batch_size, sharding)


def _row_or_filler(rows: Rows, i: int) -> Row:
    if i < len(rows):
        return rows[i]
    row = rows[len(rows) - 1]
    return {**row, WEIGHTS: np.zeros_like(row[WEIGHTS])}


def local_rows(batch_size: int, sharding: NamedSharding) -> list[int]:
    """The rows of a batch that this process's devices hold, in order.

    Raises:
        ValueError: a batch that does not divide.
    """
    check_batch(batch_size, sharding.mesh)
    index = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({i for part in index if part for i in range(*part[0].indices(batch_size))})


def placed(local: Row, mine: list[int], batch_size: int, sharding: NamedSharding) -> Batch:
    """The global arrays, of which this process gives its rows: `mine`, from `local_rows`."""
    at = {row: i for i, row in enumerate(mine)}

    def place(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return array[at[start] : at[stop - 1] + 1]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

    return {name: place(array) for name, array in local.items()}


def _stacked(rows: list[Row]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class _Source:
    """Rows as grain reads them."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Row:
        return self._rows[int(i)]
