"""The remat policy that recomputes the least of those whose step fits."""

import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

from peanut_jax.methods.base import Method
from peanut_jax.models.decoder_config import REMAT_POLICIES, DecoderConfig
from peanut_jax.plan.compiled import planned
from peanut_jax.plan.formulas import SURELY, estimate, held
from peanut_jax.plan.memory import HEADROOM, device_memory
from peanut_jax.plan.record import Plan
from peanut_jax.plan.step import DoesNotFit, Setting


def fitting_remat(
    config: DecoderConfig,
    mesh: Mesh,
    adapter: Method,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str = "bfloat16",
    accumulate_steps: int = 1,
    memory: float | None = None,
    headroom: float = HEADROOM,
) -> str:
    """The first of `REMAT_POLICIES` with which the train step fits a device's memory.

    Steps are compiled, in that order, until one fits; those that surely do not are left out. Arguments that
    are not named below are those of `plan`.

    Args:
        config: The model; its own `remat` does not count.
        memory: Bytes of a device; None for what the mesh's own devices have.
        headroom: Part of the memory that is to stay free.

    Raises:
        DoesNotFit: none fits; a ValueError.
        ValueError: as `plan`; memory that has to be given, as the devices do not tell theirs.

    Examples:
        >>> from peanut_jax.models.decoder_config import from_hf
        >>> from peanut_jax.plan import fitting_remat
        >>> from peanut_jax.sharding import make_mesh
        >>> model = from_hf({
        ...     "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        ...     "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        ... })
        >>> config = pj.PeanutConfig(r=2, target_modules=["q_proj"])
        >>> fitting_remat(model, make_mesh("fsdp=8"), config, batch_size=8, seq_len=16, memory=2e6)
        'none'
    """
    setting = Setting(
        config=config, adapter=adapter, batch_size=batch_size, seq_len=seq_len, dtype=dtype,
        accumulate_steps=accumulate_steps,
    )  # fmt: skip
    return fitting_plan(setting, mesh, memory=memory, headroom=headroom)[0].config.remat


def fitting_plan(
    setting: Setting, mesh: Mesh, *, memory: float | None = None, headroom: float = HEADROOM
) -> tuple[Setting, Plan]:
    """The setting with that policy, and its plan; see `fitting_remat`."""
    room = _memory_of(mesh.devices.flat[0], memory) * (1 - headroom)
    known = held(setting, mesh)
    smallest = math.inf
    for policy in REMAT_POLICIES:
        tried = dataclasses.replace(setting, config=dataclasses.replace(setting.config, remat=policy))
        quick = estimate(tried, mesh, known)
        least = quick.total - (1 - SURELY) * quick.temporary
        if least > room:
            smallest = min(smallest, least)
            continue
        try:
            found = planned(tried, mesh)
        except DoesNotFit as error:
            smallest = min(smallest, known.params + known.state + error.needed)
            continue
        if found.total <= room:
            return tried, found
        smallest = min(smallest, found.total)
    raise DoesNotFit(
        f"the step fits with no remat policy: it takes {smallest / 1e9:,.2f} GB or more, and {room / 1e9:,.2f} GB of a "
        "device are to be used. Fewer or shorter rows, more microbatches, more devices along fsdp or tensor take less",
        smallest, room,
    )  # fmt: skip


def _memory_of(device: Any, given: float | None) -> float:
    found = device_memory(device) if given is None else given
    if found is None:
        raise ValueError(f"a {device.device_kind} does not tell its memory: give memory= in bytes")
    return found
