"""The mesh that a program is traced for, told to what cannot see it: inside `jax.jit` arrays do not say where they lie.

A kernel of Pallas is one: XLA cannot divide it over devices, so that it runs in a `jax.shard_map` over this mesh.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from jax.sharding import Mesh

_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextlib.contextmanager
def tracing_for(mesh: Mesh) -> Iterator[None]:
    """What is traced inside runs on this mesh, with its batches sharded as `batch_sharding` does.

    `constrain`, and so `sharded_train_step`, does this. Use it around a model that is called, lowered or compiled
    without them.

    Args:
        mesh: Of devices, or of a slice that is only compiled for. One device is a mesh too.

    Examples:
        >>> with tracing_for(mesh):
        ...     logits = jax.jit(model.apply)(params, tokens)
    """
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def traced_mesh() -> Mesh | None:
    """The mesh of the innermost `tracing_for`; None outside."""
    return _MESH.get()
