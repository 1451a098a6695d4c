"""What a train step will take on a mesh that is not there: the real step, compiled for fake devices, without weights.

Memory and traffic are the compiler's; only the time is an estimate. XLA on CPU, which compiles here, computes in
float32 what is bfloat16 and keeps copies for it, so that a bfloat16 step is compiled as float32 and its temporary
arrays and collectives are counted at half their bytes. (Llama-3-70B's step, compiled ahead of time for 256 TPU v5e by
libtpu 0.0.51, takes 4.47 GB of temporaries a chip; counted this way, 4.50 GB. What is float32 in either, such as the
logits, is then counted too low.)
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from peanut_jax import hlo
from peanut_jax.base.kernels import flatten, replace
from peanut_jax.methods.base import Method
from peanut_jax.models.decoder import CHUNK, Decoder, kept_dtype, language_loss, variable_shapes
from peanut_jax.models.decoder_config import DecoderConfig
from peanut_jax.sharding import (
    batch_sharding,
    batch_shards,
    check_batch,
    rules_for,
    shard,
    sharded_train_step,
    state_shapes,
)

# What a well-tuned step reaches of a chip's peak rates; for the time estimate alone.
COMPUTE_SHARE, LINK_SHARE = 0.5, 0.7


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak rates of one device.

    Attributes:
        flops: bfloat16 FLOP/s, dense.
        memory: Bytes.
        link: Bytes/s that it sends around a ring in its pod or node: one direction, and of a TPU along one axis.
        network: Bytes/s that it sends to another node.
        node: Devices of a node; 0 where all are linked alike (a TPU pod).
    """

    flops: float
    memory: float
    link: float
    network: float = 0.0
    node: int = 0


# Sources: cloud.google.com/tpu/docs, v5e, v5p and v6e: FLOP/s, memory, and the rate of a chip's links, of which a ring
# along one axis takes 2 of 4 (v5e, v6e) or 2 of 6 (v5p). NVIDIA's data sheets of A100 80 GB, H100 and H200 SXM (NVLink
# in one direction), with a port of 400 Gb/s (A100: 200) for each GPU, as in DGX systems.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(197e12, 16e9, 100e9),
    "v5p": Chip(459e12, 95e9, 200e9),
    "v6e": Chip(918e12, 32e9, 224e9),
    "a100": Chip(312e12, 80e9, 300e9, 25e9, 8),
    "h100": Chip(989e12, 80e9, 450e9, 50e9, 8),
    "h200": Chip(989e12, 141e9, 450e9, 50e9, 8),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A train step on one of its devices.

    Attributes:
        params: Bytes of the base.
        state: Bytes of adapters and optimizer.
        batch: Bytes of the batch.
        temporary: Bytes of activations, gathered kernels and all else that lives within the step.
        flops: FLOPs of the matrix products, what is recomputed included.
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
    return sent / min(_rate(group, chip) for group in one.groups) / LINK_SHARE


def _rate(group: tuple[int, ...], chip: Chip) -> float:
    """Bytes/s of a ring over a group; between nodes its members in a node share their ports."""
    nodes = [device // chip.node for device in group] if chip.node else [0]
    together = min(nodes.count(node) for node in nodes)
    return chip.link if len(set(nodes)) == 1 else min(chip.link, chip.network * together)


def plan(
    config: DecoderConfig,
    mesh: Mesh,
    adapter: Method,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str = "bfloat16",
    accumulate_steps: int = 1,
) -> Plan:
    """Compiles the train step of a decoder with AdamW for the mesh, with abstract arrays.

    Args:
        config: The model.
        mesh: CPU devices, as many as there will be.
        batch_size: Rows of a step over all devices.
        seq_len: Tokens of a row.
        dtype: Dtype of the base and the activations, "bfloat16" or "float32".
        accumulate_steps: Microbatches of a step.

    Raises:
        ValueError: sizes that do not divide over the mesh, as `sharding.param_shardings`; a bad dtype or batch.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be bfloat16 or float32, got {dtype!r}")
    if accumulate_steps < 1 or seq_len < 1:
        raise ValueError(f"seq_len and accumulate_steps must be at least 1, got {seq_len} and {accumulate_steps}")
    check_batch(batch_size, mesh, accumulate_steps)
    rules = rules_for(config.model_type, scan_layers=config.scan_layers)
    model, tx = Decoder(config, jnp.dtype("float32")), optax.adamw(1e-3)
    shapes = variable_shapes(model)
    params, batch = shard(shapes, mesh, rules), _batch(batch_size, seq_len, mesh)
    state = state_shapes(params, adapter, tx)
    loss_fn = language_loss(model, CHUNK * batch_shards(mesh))
    step = sharded_train_step(loss_fn, tx, adapter, state, params, accumulate_steps=accumulate_steps)
    text, temporary = program_of(step.lower(state, params, batch).compile())
    kept = shard(_in_dtype(shapes, dtype), mesh, rules)
    half = 2 if dtype == "bfloat16" else 1
    return Plan(
        params=device_bytes(kept),
        state=device_bytes(state_shapes(kept, adapter, tx)),
        batch=device_bytes(batch),
        temporary=temporary // half,
        flops=hlo.dot_flops(text),
        collectives=tuple(_collectives(text, half)),
        trainable=sum(leaf.size for leaf in jax.tree.leaves(state.adapters)),
    )


def program_of(compiled: jax.stages.Compiled) -> tuple[str, int]:
    """The compiled program's text, and the bytes of its temporary arrays; XLA:CPU tells both."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    return text, memory.temp_size_in_bytes


def _batch(batch_size: int, seq_len: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What `language_loss` takes, spread over the mesh."""
    kinds = {"tokens": "int32", "labels": "int32", "weights": "float32", "segments": "int32"}
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((batch_size, seq_len), kind, sharding=sharding) for name, kind in kinds.items()}


def _collectives(text: str, half: int) -> Iterator[hlo.Collective]:
    """The program's collectives; the bytes of what the model computes are divided by `half`."""
    for one in hlo.collectives(text):
        yield dataclasses.replace(one, bytes=one.bytes // half) if _in_model(one) else one


def _in_model(one: hlo.Collective) -> bool:
    """Whether it moves what the model computes in its own dtype; the tweaker and the optimizer are float32."""
    return "Decoder" in one.op_name or "sharding_constraint" in one.op_name


def _in_dtype(shapes: PyTree, dtype: str) -> PyTree:
    """The shapes as `load_decoder` would fill them."""
    flat: dict[str, Any] = {
        path: jax.ShapeDtypeStruct(leaf.shape, kept_dtype(path, dtype)) for path, leaf in flatten(shapes).items()
    }
    return replace(shapes, flat)


def device_bytes(shapes: PyTree) -> int:
    """Bytes that one device holds of `jax.ShapeDtypeStruct`s with shardings."""
    total = 0
    for leaf in jax.tree.leaves(shapes):
        # A typed PRNG key is replicated, and its dtype has no size of its own.
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        raw = jax.eval_shape(jax.random.key_data, leaf) if key else leaf
        total += math.prod(raw.shape if key else leaf.sharding.shard_shape(leaf.shape)) * raw.dtype.itemsize
    return total
