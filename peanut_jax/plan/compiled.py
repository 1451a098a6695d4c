"""Plans from a compiler: XLA's for CPU, which is everywhere, or the one of the devices themselves."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from peanut_jax import hlo
from peanut_jax.messages import one_line
from peanut_jax.methods.base import Method
from peanut_jax.models.decoder_config import DecoderConfig
from peanut_jax.plan.formulas import estimate
from peanut_jax.plan.record import Plan
from peanut_jax.plan.step import Setting, device_bytes, held_bytes, program_of


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
        mesh: CPU devices, as many as there will be, whose bfloat16 steps are planned as float32 ones at half the
            bytes; or TPU devices, such as those of `topologies.slice_devices`, for which libtpu compiles the step as it
            is.
        batch_size: Rows of a step over all devices.
        seq_len: Tokens of a row.
        dtype: Dtype of the base and the activations, "bfloat16" or "float32".
        accumulate_steps: Microbatches of a step.

    Raises:
        ValueError: sizes that do not divide over the mesh, as `sharding.param_shardings`; a bad dtype or batch.
        DoesNotFit: a ValueError too, of a device's own compiler.
    """
    setting = Setting(
        config=config, adapter=adapter, batch_size=batch_size, seq_len=seq_len, dtype=dtype,
        accumulate_steps=accumulate_steps,
    )  # fmt: skip
    return planned(setting, mesh)


def planned(setting: Setting, mesh: Mesh) -> Plan:
    """The plan of a setting; see `plan`."""
    shapes = setting.shapes(mesh)
    known = {
        "params": device_bytes(shapes.params),
        "state": device_bytes(shapes.state),
        "batch": device_bytes(shapes.batch),
        "trainable": sum(leaf.size for leaf in jax.tree.leaves(shapes.state.adapters)),
    }
    if mesh.devices.flat[0].platform == "cpu":
        work, temporary = _on_cpu(setting, mesh)
        return Plan(**known, temporary=temporary, **work._asdict())
    compiled = setting.compile(mesh)
    memory, held = compiled.memory_analysis(), held_bytes(compiled)
    assert memory is not None
    assert held is not None
    temporary = memory.temp_size_in_bytes
    other = held - temporary - known["params"] - known["state"] - known["batch"]
    return Plan(**known, temporary=temporary, other=other, **_work(compiled, setting, mesh)._asdict())


class Work(NamedTuple):
    """What a step computes and moves, and what to know of these figures."""

    flops: int
    collectives: tuple[hlo.Collective, ...]
    notes: tuple[str, ...] = ()


def _work(compiled: jax.stages.Compiled, setting: Setting, mesh: Mesh) -> Work:
    """From the compiled program's text; where that does not tell, from XLA:CPU's of the same step."""
    # as_text() of libtpu 0.0.51 fails for many programs; others are without the loops' lengths.
    reason = "libtpu's text of a program does not tell"
    if mesh.devices.flat[0].platform != "tpu":
        try:
            text = compiled.as_text()
            assert text is not None
            return Work(hlo.dot_flops(text), tuple(hlo.collectives(text)))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            reason = one_line(error, 120)
    spare = _cpu_devices()[: mesh.size]
    if len(spare) < mesh.size:
        found = estimate(setting, mesh)
        note = f"FLOPs and collectives are estimated from the sizes: {reason}"
        return Work(found.flops, found.collectives, (note,))
    grid = np.asarray(spare).reshape(mesh.devices.shape)
    work, _ = _on_cpu(setting, Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types))
    note = f"FLOPs and collectives are those of XLA:CPU for the same step: {reason}"
    return work._replace(notes=(note,))


def _cpu_devices() -> list[jax.Device]:
    """This process's; none where JAX_PLATFORMS leaves them out."""
    try:
        return jax.local_devices(backend="cpu")
    except RuntimeError:
        return []


def _on_cpu(setting: Setting, mesh: Mesh) -> tuple[Work, int]:
    """The work and the bytes of temporaries; a bfloat16 step is compiled as float32 and counted at half the bytes."""
    compiled = dataclasses.replace(setting, dtype="float32").compile(mesh)
    text, temporary = program_of(compiled)
    half = 2 if setting.dtype == "bfloat16" else 1
    return Work(hlo.dot_flops(text), tuple(_collectives(text, half))), temporary // half


def _collectives(text: str, half: int) -> Iterator[hlo.Collective]:
    """The program's collectives; the bytes of what the model computes are divided by `half`."""
    for one in hlo.collectives(text):
        yield dataclasses.replace(one, bytes=one.bytes // half) if _in_model(one) else one


def _in_model(one: hlo.Collective) -> bool:
    """Whether it moves what the model computes in its own dtype; the tweaker and the optimizer are float32."""
    return "Decoder" in one.op_name or "sharding_constraint" in one.op_name
