"""LoRA, and with an activation the paper's nonlinear LoRA: the baselines that are blind to W0."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Array, Float

from peanut_jax.matrices import Matrix
from peanut_jax.methods import fields
from peanut_jax.methods.activations import ACTIVATIONS
from peanut_jax.methods.base import Leaf, RankMethod, zeros
from peanut_jax.updates import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(RankMethod):
    """LoRA (dW = scaling * A @ B), and with an activation the paper's nonlinear LoRA (dW = scaling * act(A) @ B).

    The baselines of the paper's table 5, run as PEANuT is.

    Args:
        act_fn: `"linear"` for LoRA, any other activation for nonlinear LoRA.

    See `RankMethod` and `AdapterConfig` for the other fields. `scaling` is LoRA's alpha / r.

    Examples:
        >>> pj.LoraConfig(r=8, scaling=2.0).shapes(16, 24)
        {'a': (16, 8), 'b': (8, 24)}

    References:
        arXiv:2106.09685, section 4.1; arXiv:2410.01870v3, table 5.
    """

    NAME: ClassVar[str] = "LoRA"
    READS_BASE: ClassVar[bool] = False

    act_fn: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.activation("act_fn", self.act_fn)

    def leaves(self) -> dict[str, Leaf]:
        """A and B."""
        return {"a": Leaf(("in", "r")), "b": Leaf(("r", "out"), zeros)}

    def update(
        self,
        theta: Mapping[str, Float[Array, "..."]],
        kernel: Matrix,
        bias: Float[Array, "*stack d_out"] | None = None,
    ) -> LowRank:
        """act(A) and scaling * B."""
        return LowRank(ACTIVATIONS[self.act_fn](theta["a"]), self.scaling * theta["b"])
