"""Many devices: a base laid out on a mesh by rules (`mesh`), and what follows from it (`derived`)."""

from peanut_jax.architectures import Rules, rules_for
from peanut_jax.sharding.derived import (
    constrain,
    init_state,
    sharded_train_step,
    state_shapes,
    state_shardings,
)
from peanut_jax.sharding.mesh import (
    AXES,
    BATCH_AXES,
    batch_axes,
    batch_sharding,
    batch_shards,
    check_batch,
    make_mesh,
    mesh_of,
    mesh_sizes,
    param_shardings,
    shard,
)
from peanut_jax.sharding.tracing import traced_mesh, tracing_for

__all__ = [
    "AXES",
    "BATCH_AXES",
    "Rules",
    "batch_axes",
    "batch_sharding",
    "batch_shards",
    "check_batch",
    "constrain",
    "init_state",
    "make_mesh",
    "mesh_of",
    "mesh_sizes",
    "param_shardings",
    "rules_for",
    "shard",
    "sharded_train_step",
    "state_shapes",
    "state_shardings",
    "traced_mesh",
    "tracing_for",
]
