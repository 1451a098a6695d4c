"""A plan: the bytes, FLOPs and collectives of a train step on one of its devices."""

import dataclasses

from peanut_jax import hlo
from peanut_jax.plan.chips import Chip


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
        other: Bytes of the program itself, of what its tiles pad, and of outputs that do not take an argument's place;
            0 where the compiler was not the device's own.
        notes: What else there is to know of the figures, such as which compiler a part of them is of.
    """

    params: int
    state: int
    batch: int
    temporary: int
    flops: int
    collectives: tuple[hlo.Collective, ...]
    trainable: int
    other: int = 0
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes that the device must hold."""
        return self.params + self.state + self.batch + self.temporary + self.other

    def traffic(self) -> dict[str, int]:
        """Bytes a step by kind of collective."""
        found: dict[str, int] = {}
        for one in self.collectives:
            found[one.kind] = found.get(one.kind, 0) + one.bytes * one.times
        return found

    def seconds(self, chip: Chip) -> float:
        """An estimate: products and ring collectives at a share of the peak rates, one after the other."""
        return chip.seconds(self.flops, self.collectives)
