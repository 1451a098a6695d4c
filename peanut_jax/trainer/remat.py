"""The remat policy of a run: the one that recomputes the least of those whose step fits the devices that are there."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from peanut_jax.plan import HEADROOM, DoesNotFit, free_memory, held_bytes
from peanut_jax.plan.step import too_large
from peanut_jax.trainer.config import Run
from peanut_jax.trainer.distributed import several
from peanut_jax.trainer.run_folder import REMAT, read_run, update_run
from peanut_jax.training import LossFn

logger = logging.getLogger(__name__)


class Fitting(NamedTuple):
    """A step and the policy that it was compiled with.

    Attributes:
        policy: Its name.
        step: Compiled.
        reason: Why this one, in words.
    """

    policy: str
    step: jax.stages.Compiled
    reason: str


def first_fitting(
    remats: Mapping[str, LossFn], compile_step: Callable[[LossFn], jax.stages.Compiled], mesh: Mesh
) -> Fitting:
    """Compiles with one policy after the other until a step fits what is free on the devices; at worst the last.

    The parameters and the state are on the devices already. Processes agree.

    Args:
        remats: Policy -> loss_fn, the one that recomputes the least first.

    Raises:
        DoesNotFit: the compiler has found the step of the last policy too large.
    """
    free, last = _free(mesh), list(remats)[-1]
    for policy, loss_fn in remats.items():
        if free is None and policy != last:
            continue
        try:
            with too_large():
                step = compile_step(loss_fn)
        except DoesNotFit:
            if policy == last:
                raise
            continue
        needed = _needed(step)
        if free is None or needed is None:
            return Fitting(policy, step, "the device does not tell its memory")
        fits = needed <= free * (1 - HEADROOM)
        if fits or policy == last:
            said = f"a step needs {needed / 1e9:.3g} GB a device beside what is loaded; {free / 1e9:.3g} GB are free"
            return Fitting(policy, step, said if fits else f"{said}: it may run out of memory")
    raise AssertionError("the last policy returns or raises")


def _needed(step: jax.stages.Compiled) -> int | None:
    """Bytes that a step takes of a device beside its arguments, on the process where that is the most."""
    memory, held = step.memory_analysis(), held_bytes(step)
    if memory is None or held is None:
        return None
    return -_least(-(held - memory.argument_size_in_bytes))


def _free(mesh: Mesh) -> int | None:
    """The least of what is free on any device of any process."""
    found = [free_memory(device) for device in mesh.local_devices]
    known = [one for one in found if one is not None]
    return _least(int(min(known))) if len(known) == len(found) else None


def _least(value: int) -> int:
    """The least over all processes. Float64 is not to be had on all of them, so megabytes travel."""
    if not several():
        return value
    return int(np.min(multihost_utils.process_allgather(np.int32(value >> 20)))) << 20


def kept_policy(folder: Path, run: Run) -> str | None:
    """The policy that the run in a folder took on devices like these; None where there is none, or on others."""
    try:
        kept = read_run(folder).get(REMAT, {})
    except ValueError:  # told where it is written anew
        return None
    here = _devices(run)
    return kept.get("policy") if all(kept.get(name) == value for name, value in here.items()) else None


def keep_policy(folder: Path, run: Run, policy: str) -> None:
    """Writes down in run.json which policy the run takes, and on which devices."""
    update_run(folder, run.as_json(), **{REMAT: {"policy": policy, **_devices(run)}})


def _devices(run: Run) -> dict[str, Any]:
    return {"device": jax.local_devices()[0].device_kind, "devices": jax.device_count(), "mesh": run.mesh}
