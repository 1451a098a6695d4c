"""What a train step will take on a mesh that is not there: the real step, compiled for fake devices, without weights.

Memory and traffic are the compiler's; only the time is an estimate. XLA on CPU, which compiles here, computes in
float32 what is bfloat16 and keeps copies for it, so that a bfloat16 step is compiled as float32 and its temporary
arrays and collectives are counted at half their bytes. (Llama-3-70B's step, compiled for 256 TPU v5e chips by libtpu
0.0.51, takes 4.47 GB of temporaries a chip; counted this way, 4.44 GB.)
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from peanut_jax import hlo
from peanut_jax.adapters import init
from peanut_jax.config import Config
from peanut_jax.kernels import flatten, replace
from peanut_jax.models.decoder import Decoder, kept_dtype, language_loss, variable_shapes
from peanut_jax.models.decoder_config import DecoderConfig
from peanut_jax.sharding import batch_sharding, param_shardings, rules_for, sharded_train_step, state_shardings
from peanut_jax.training import TrainState

# What a well-tuned step reaches of a chip's peak rates; for the time estimate alone.
COMPUTE_SHARE, LINK_SHARE = 0.5, 0.7


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak rates of one device.

    Attributes:
        flops: bfloat16 FLOP/s, dense.
        memory: Bytes.
        link: Bytes/s to the devices of its pod or node, both directions together.
        network: Bytes/s to devices of another node.
        node: Devices of a node; 0 where all are linked alike (a TPU pod).
    """

    flops: float
    memory: float
    link: float
    network: float = 0.0
    node: int = 0


# Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e system architecture); NVIDIA's data sheets of A100 80 GB, H100 and
# H200 SXM; a 400 Gb/s (A100: 200 Gb/s) network port a GPU, as in DGX systems.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(197e12, 16e9, 200e9),
    "v5p": Chip(459e12, 95e9, 600e9),
    "v6e": Chip(918e12, 32e9, 448e9),
    "a100": Chip(312e12, 80e9, 600e9, 25e9, 8),
    "h100": Chip(989e12, 80e9, 900e9, 50e9, 8),
    "h200": Chip(989e12, 141e9, 900e9, 50e9, 8),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A train step on one of its devices.

    Attributes:
        params: Bytes of the base.
        state: Bytes of adapters and optimizer.
        batch: Bytes of the batch.
        temporary: Bytes of activations, gathered kernels and all else that lives within the step.
        flops: Of the matrix products, what is recomputed included.
        collectives: Every collective, at the bytes that the real dtype moves.
        trainable: Parameters of the adapters, over all devices.
    """

    params: int
    state: int
    batch: int
    temporary: int
    flops: int
    collectives: tuple[hlo.Collective, ...]
    trainable: int

    @property
    def total(self) -> int:
        """Bytes that the device must hold."""
        return self.params + self.state + self.batch + self.temporary

    def traffic(self) -> dict[str, int]:
        """Bytes a step by kind of collective."""
        found: dict[str, int] = {}
        for one in self.collectives:
            found[one.kind] = found.get(one.kind, 0) + one.bytes * one.times
        return found

    def seconds(self, chip: Chip) -> float:
        """An estimate: products and ring collectives at a share of the peak rates, one after the other."""
        compute = self.flops / (chip.flops * COMPUTE_SHARE)
        return compute + sum(_link_seconds(one, chip) for one in self.collectives)


def _link_seconds(one: hlo.Collective, chip: Chip) -> float:
    share = (one.group_size - 1) / one.group_size
    sent = one.bytes * one.times * {"all-reduce": 2 * share, "collective-permute": 1}.get(one.kind, share)
    crosses = chip.node and any(len({device // chip.node for device in group}) > 1 for group in one.groups)
    # A direction carries half of a link's rate.
    return sent / (chip.network if crosses else chip.link / 2) / LINK_SHARE


def plan(
    config: DecoderConfig,
    mesh: Mesh,
    adapter: Config,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str = "bfloat16",
    accumulate_steps: int = 1,
) -> Plan:
    """Compiles the train step of a decoder with AdamW for the mesh, with abstract arrays.

    Args:
        config: The model.
        mesh: Of CPU devices, as many as there will be.
        batch_size: Rows of a step over all devices.
        seq_len: Tokens of a row.
        dtype: "bfloat16" or "float32", of the base and the activations.

    Raises:
        ValueError: sizes that do not divide over the mesh, as `sharding.param_shardings`; a bad dtype or batch.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be bfloat16 or float32, got {dtype!r}")
    shards = math.prod(mesh.shape[name] for name in batch_sharding(mesh).spec[0])
    if batch_size < 1 or seq_len < 1 or batch_size % (shards * accumulate_steps):
        raise ValueError(
            f"a batch of {batch_size} rows does not divide over {shards} data shards and {accumulate_steps} "
            "microbatches"
        )
    model = Decoder(config, jnp.dtype("float32"))
    params = _placed(variable_shapes(model), mesh, config)
    tx = optax.adamw(1e-3)

    def create(key, params):
        return TrainState.create(init(key, params, adapter), tx, key)

    state = jax.eval_shape(create, jax.eval_shape(jax.random.key, 0), params)
    state = jax.tree.map(_on, state, state_shardings(state, params, adapter))
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, seq_len), kind, sharding=batch_sharding(mesh))
        for name, kind in (("tokens", "int32"), ("labels", "int32"), ("weights", "float32"), ("segments", "int32"))
    }
    step = sharded_train_step(language_loss(model), tx, adapter, state, params, accumulate_steps=accumulate_steps)
    compiled = step.lower(state, params, batch).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None  # of a CPU both are known
    assert memory is not None
    half = 2 if dtype == "bfloat16" else 1
    return Plan(
        params=sum(_bytes(leaf, kept_dtype(path, dtype)) for path, leaf in flatten(params).items()),
        state=sum(_bytes(leaf) for leaf in jax.tree.leaves(state)),
        batch=sum(_bytes(leaf) for leaf in batch.values()),
        temporary=memory.temp_size_in_bytes // half,
        flops=hlo.dot_flops(text),
        collectives=tuple(
            dataclasses.replace(one, bytes=one.bytes // (half if _in_model(one) else 1))
            for one in hlo.collectives(text)
        ),
        trainable=sum(leaf.size for leaf in jax.tree.leaves(state.adapters)),
    )


def _in_model(one: hlo.Collective) -> bool:
    """Whether it moves what the model computes in its own dtype; the tweaker and the optimizer are float32."""
    return "Decoder" in one.op_name or "sharding_constraint" in one.op_name


def _placed(shapes: PyTree, mesh: Mesh, config: DecoderConfig) -> PyTree:
    shardings = param_shardings(shapes, mesh, rules_for(config.model_type, scan_layers=config.scan_layers))
    placed: dict[str, Any] = {path: _on(leaf, shardings[path]) for path, leaf in flatten(shapes).items()}
    return replace(shapes, placed)


def _on(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes(leaf: jax.ShapeDtypeStruct, dtype: str | None = None) -> int:
    """Of one device's shard."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.dtype("uint32").itemsize * 2
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(dtype or leaf.dtype).itemsize
