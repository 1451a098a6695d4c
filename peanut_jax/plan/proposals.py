"""Which mesh, batch, remat policy and accumulation train the fastest on so many chips of a kind."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from peanut_jax.models.decoder_config import REMAT_POLICIES
from peanut_jax.plan.chips import Chip
from peanut_jax.plan.compiled import planned
from peanut_jax.plan.formulas import SURELY, Held, estimate, held
from peanut_jax.plan.memory import HEADROOM
from peanut_jax.plan.record import Plan
from peanut_jax.plan.step import DoesNotFit, Setting
from peanut_jax.sharding import make_mesh
from peanut_jax.sharding.mesh import AXES

# Tokens of a microbatch on a device beyond which more of them gain nothing that the estimate of time sees.
_LARGEST_TOKENS = 1 << 15
# Programs that are compiled at most, for each proposal that is asked for.
_COMPILES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """A way to train that fits.

    Attributes:
        setting: The step.
        mesh: Axis -> size.
        plan: What it takes, compiled.
        chip: On what.
    """

    setting: Setting
    mesh: dict[str, int]
    plan: Plan
    chip: Chip

    @property
    def rows(self) -> int:
        """Rows of a microbatch on a device."""
        return self.setting.batch_size // (self.mesh["data"] * self.mesh["fsdp"] * self.setting.accumulate_steps)

    @property
    def left(self) -> float:
        """Part of a device's memory that stays free."""
        return 1 - self.plan.total / self.chip.memory

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, by the estimate of time."""
        return _rate(self.setting, self.plan, self.chip)


class _Try(NamedTuple):
    """What might be proposed: sizes of (data, fsdp, tensor), and a step."""

    sizes: tuple[int, int, int]
    setting: Setting

    @property
    def kind(self) -> tuple[Any, ...]:
        """Of one kind are steps whose memory grows with their rows alone."""
        return self.sizes, self.setting.config.remat

    @property
    def sizes_text(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(AXES, self.sizes, strict=True))

    def __str__(self) -> str:
        rows = self.setting.batch_size // (self.sizes[0] * self.sizes[1] * self.setting.accumulate_steps)
        steps = self.setting.accumulate_steps
        again = f", {steps} microbatches" if steps > 1 else ""
        return f"{self.sizes_text}, {rows} rows a device{again}, remat {self.setting.config.remat}"


def search(
    setting: Setting,
    chip: Chip,
    devices: Sequence[Any],
    *,
    batch_size: int | None = None,
    remats: Sequence[str] = REMAT_POLICIES,
    headroom: float = HEADROOM,
    top: int = 3,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Proposal]:
    """Proposals that fit, the one with most tokens a second first, of different meshes.

    All meshes, policies and rows by powers of two are estimated from their sizes, the best of them compiled: what is
    proposed has been found to fit by the compiler.

    Args:
        setting: The model, adapter, dtype and length of rows; rows, microbatches and remat are what is searched.
        chip: What its devices are.
        devices: To compile for: CPU devices, or those of `topologies.slice_devices`.
        batch_size: Rows of a step over all devices, reached by accumulation; None for as many as are fastest.
        remats: Policies to choose from.
        headroom: Part of the chip's memory that is to stay free.
        top: Proposals to find.
        tell: Called with a line on what is done next.

    Raises:
        DoesNotFit: nothing does; a ValueError.
        ValueError: sizes of the model or a batch that divide over no mesh.
    """
    room = chip.memory * (1 - headroom)
    meshes = _meshes(setting, chip, devices)
    tell(f"{len(meshes)} meshes of {len(devices)} devices, {len(remats)} remat policies")
    scales: dict[tuple[Any, ...], float] = {}
    compiled: dict[_Try, Plan] = {}
    found: list[Proposal] = []
    while len(found) < top and len(compiled) < _COMPILES * top:
        proposed = [tuple(one.mesh.values()) for one in found]
        tries = [one for one in _tries(setting, meshes, batch_size, remats) if one.sizes not in proposed]
        likely = {one: _scaled(*meshes[one.sizes], one, scales) for one in tries if one not in compiled}
        best = _best(likely, chip, room)
        if best is None:
            break
        tell(f"compiling {best}")
        plan, ratio = _confirmed(best, devices, meshes[best.sizes][1])
        compiled[best], scales[best.kind] = plan, ratio
        if plan.total <= room:
            mesh = dict(zip(AXES, best.sizes, strict=True))
            found.append(Proposal(setting=best.setting, mesh=mesh, plan=plan, chip=chip))
    if not found:
        smallest = [one.total for one in compiled.values()] or [
            _scaled(*meshes[one.sizes], one, {}).total for one in _tries(setting, meshes, batch_size, remats)
        ]
        raise _nothing(min(smallest), chip, room, len(devices))
    return sorted(found, key=lambda one: -one.tokens_per_second)


def _meshes(setting: Setting, chip: Chip, devices: Sequence[Any]) -> dict[tuple[int, int, int], tuple[Mesh, Held]]:
    """The sizes of (data, fsdp, tensor) over which the model divides: as a mesh, and what a device then holds.

    Raises:
        ValueError: there are none.
    """
    config, count = setting.config, len(devices)
    found, reason = {}, ""
    for tensor in _divisors(math.gcd(count, config.num_key_value_heads, chip.node or count)):
        for fsdp in _divisors(count // tensor):
            sizes = (count // tensor // fsdp, fsdp, tensor)
            one_each = dataclasses.replace(setting, batch_size=count // tensor, accumulate_steps=1)
            try:
                mesh = Mesh(np.asarray(devices).reshape(sizes), AXES)
                found[sizes] = mesh, held(one_each, mesh)
            except ValueError as error:
                reason = str(error)
    if not found:
        raise ValueError(reason)
    return found


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _tries(
    setting: Setting, meshes: Iterable[tuple[int, int, int]], batch_size: int | None, remats: Sequence[str]
) -> Iterator[_Try]:
    """Every mesh, policy and number of rows a device by powers of two.

    Raises:
        ValueError: a batch that divides over none of the meshes.
    """
    divides = False
    for sizes in meshes:
        for rows in (1 << i for i in range(_LARGEST_TOKENS.bit_length())):
            if rows > 1 and rows * setting.seq_len > _LARGEST_TOKENS:
                break
            together = rows * sizes[0] * sizes[1]
            whole = together if batch_size is None else batch_size
            if whole % together:
                break
            divides = True
            for remat in remats:
                config = dataclasses.replace(setting.config, remat=remat)
                yield _Try(sizes, dataclasses.replace(
                    setting, config=config, batch_size=whole, accumulate_steps=whole // together
                ))  # fmt: skip
    if not divides:
        fewest = min(sizes[0] * sizes[1] for sizes in meshes)
        raise ValueError(
            f"a batch of {batch_size} rows divides over no mesh on which the model does: give a multiple of {fewest}"
        )


def _scaled(mesh: Mesh, known: Held, one: _Try, scales: Mapping[tuple[Any, ...], float]) -> Plan:
    """The estimate, with the memory that an earlier compilation of its kind makes likely."""
    plan = estimate(one.setting, mesh, known)
    return dataclasses.replace(plan, temporary=round(plan.temporary * scales.get(one.kind, 1.0)))


def _best(likely: Mapping[_Try, Plan], chip: Chip, room: float) -> _Try | None:
    """The fastest that seems to fit; where none does, the smallest of those that might."""
    fitting = [one for one, plan in likely.items() if plan.total <= room]
    if fitting:
        return max(fitting, key=lambda one: _rate(one.setting, likely[one], chip))
    least = {one: plan.total - (1 - SURELY) * plan.temporary for one, plan in likely.items()}
    return min((one for one in likely if least[one] <= room), key=lambda one: least[one], default=None)


def _confirmed(one: _Try, devices: Sequence[Any], known: Held) -> tuple[Plan, float]:
    """The compiled plan, and its temporaries as a part of their estimate."""
    mesh = make_mesh(one.sizes_text, devices)
    quick = estimate(one.setting, mesh, known)
    try:
        plan = planned(one.setting, mesh)
    except DoesNotFit as error:
        plan = dataclasses.replace(quick, temporary=max(quick.temporary, round(min(error.needed, 1e15))))
    return plan, plan.temporary / quick.temporary


def _rate(setting: Setting, plan: Plan, chip: Chip) -> float:
    """Tokens a second, by the estimate of time."""
    return setting.batch_size * setting.seq_len / plan.seconds(chip)


def _nothing(smallest: float, chip: Chip, room: float, count: int) -> DoesNotFit:
    return DoesNotFit(
        f"nothing fits {count} of these chips: the smallest step found takes {smallest / 1e9:,.2f} GB a device, and "
        f"{room / 1e9:,.2f} of its {chip.memory / 1e9:,.2f} GB are to be used: more chips, shorter rows, a chip with "
        "more memory or less headroom would help",
        smallest, room,
    )  # fmt: skip
