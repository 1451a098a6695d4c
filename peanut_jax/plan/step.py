"""The real train step of a decoder on abstract arrays, compiled for devices that need not be there."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from peanut_jax.base.kernels import flatten, replace
from peanut_jax.messages import one_line
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
from peanut_jax.training import TrainState

_OPTIMIZER = optax.adamw(1e-3)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# What XLA:TPU says of a program that is too large (libtpu 0.0.51).
_TOO_LARGE = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")


class DoesNotFit(ValueError):
    """A step that takes more memory than a device has.

    Attributes:
        needed: Bytes, of the temporaries alone where the compiler gave up on them.
        memory: Bytes that the device has.
    """

    def __init__(self, message: str, needed: float, memory: float) -> None:
        super().__init__(message)
        self.needed, self.memory = needed, memory


class Shapes(NamedTuple):
    """What a train step takes: `jax.ShapeDtypeStruct`s with shardings."""

    state: TrainState
    params: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A train step with AdamW, but for the mesh.

    Attributes:
        config: The model.
        batch_size: Rows of a step over all devices and microbatches.
        seq_len: Tokens of a row.
        dtype: Dtype of the base and the activations, "bfloat16" or "float32".
        accumulate_steps: Microbatches of a step.
    """

    config: DecoderConfig
    adapter: Method
    batch_size: int
    seq_len: int
    dtype: str = "bfloat16"
    accumulate_steps: int = 1

    def check(self, mesh: Mesh) -> None:
        """Refuses what no step can be made of.

        Raises:
            ValueError: a bad dtype; sizes below 1; rows that do not divide over the mesh and the microbatches.
        """
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be bfloat16 or float32, got {self.dtype!r}")
        if self.accumulate_steps < 1 or self.seq_len < 1:
            raise ValueError(
                f"seq_len and accumulate_steps must be at least 1, got {self.seq_len} and {self.accumulate_steps}"
            )
        check_batch(self.batch_size, mesh, self.accumulate_steps)

    def shapes(self, mesh: Mesh) -> Shapes:
        """The arguments of the step, as `load_decoder` and `init_state` would make them.

        Raises:
            ValueError: as `check`, `sharding.param_shardings` and `init`.
        """
        self.check(mesh)
        model = variable_shapes(Decoder(self.config))
        flat: dict[str, Any] = {
            path: jax.ShapeDtypeStruct(leaf.shape, kept_dtype(path, self.dtype))
            for path, leaf in flatten(model).items()
        }
        rules = rules_for(self.config.model_type, scan_layers=self.config.scan_layers)
        params = shard(replace(model, flat), mesh, rules)
        kinds = {"tokens": "int32", "labels": "int32", "weights": "float32", "segments": "int32"}
        shape, sharding = (self.batch_size, self.seq_len), batch_sharding(mesh)
        batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()}
        return Shapes(state_shapes(params, self.adapter, _OPTIMIZER), params, batch)

    def compile(self, mesh: Mesh) -> jax.stages.Compiled:
        """The step, compiled for the mesh's devices.

        Raises:
            DoesNotFit: the compiler has found that a device's memory is too small for it.
            ValueError: as `shapes`.
        """
        state, params, batch = self.shapes(mesh)
        loss_fn = language_loss(Decoder(self.config, jnp.dtype(self.dtype)), CHUNK * batch_shards(mesh))
        step = sharded_train_step(
            loss_fn, _OPTIMIZER, self.adapter, state, params, accumulate_steps=self.accumulate_steps
        )
        lowered = step.lower(state, params, batch)
        with too_large():
            return lowered.compile()


@contextlib.contextmanager
def too_large() -> Iterator[None]:
    """Makes a `DoesNotFit` of a compiler's error that says so."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _TOO_LARGE.search(str(error))
        if found is None:
            raise DoesNotFit(f"the step does not fit: {one_line(error)}", math.inf, math.nan) from error
        needed, memory = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
        raise DoesNotFit(
            f"the step's temporaries need {needed / 1e9:.2f} GB, and a device has {memory / 1e9:.2f} GB", needed, memory
        ) from error


def program_of(compiled: jax.stages.Compiled) -> tuple[str, int]:
    """The compiled program's text, and the bytes of its temporary arrays; XLA:CPU tells both."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    return text, memory.temp_size_in_bytes


def held_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a device holds while the program runs; None where the compiler does not say.

    Arguments, outputs that do not take an argument's place, temporary arrays and the program itself.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def device_bytes(shapes: PyTree) -> int:
    """Bytes that one device holds of `jax.ShapeDtypeStruct`s with shardings."""
    total = 0
    for leaf in jax.tree.leaves(shapes):
        # A typed PRNG key is replicated, and its dtype has no size of its own.
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        raw = jax.eval_shape(jax.random.key_data, leaf) if key else leaf
        total += math.prod(raw.shape if key else leaf.sharding.shard_shape(leaf.shape)) * raw.dtype.itemsize
    return total
