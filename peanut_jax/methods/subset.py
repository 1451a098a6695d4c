"""Parts of the base trained in full: a linear probe, or with every module named, full fine-tuning."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NoReturn

from jaxtyping import Array, Float

from peanut_jax.matrices import Matrix
from peanut_jax.methods.base import Leaf, Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubsetConfig(Method):
    """Trains the modules of `modules_to_save`, and the head of `task_type`, and adapts no kernel.

    The head alone is a linear probe; every top-level module is full fine-tuning (a second copy of the base is then
    trained beside the frozen one).

    Raises:
        ValueError: no module to train, or a field that means something for kernels alone.

    Examples:
        >>> pj.SubsetConfig(modules_to_save=["classifier"]).leaves()
        {}
    """

    NAME: ClassVar[str] = "subset"
    ADAPTS_KERNELS: ClassVar[bool] = False
    READS_BASE: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "kernel_axes"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} selects kernels, and SubsetConfig adapts none: name modules in modules_to_save"
                )
        if self.dropout:
            raise ValueError(f"dropout={self.dropout} falls on an adapter's input, and SubsetConfig has none")
        if not (self.modules_to_save or self.task_type):
            raise ValueError("modules_to_save must name the modules to train, got None and no task_type")

    def leaves(self) -> dict[str, Leaf]:
        """None."""
        return {}

    def update(
        self,
        theta: Mapping[str, Float[Array, "..."]],
        kernel: Matrix,
        bias: Float[Array, "*stack d_out"] | None = None,
    ) -> NoReturn:
        """Is never asked for: no kernel is adapted."""
        raise AssertionError("SubsetConfig adapts no kernel")
