"""PEANuT: the update is a small network that reads the frozen kernel."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Array, Float

from peanut_jax.matrices import Matrix
from peanut_jax.messages import short
from peanut_jax.methods import fields, tweaker
from peanut_jax.methods.activations import ACTIVATIONS
from peanut_jax.methods.base import Leaf, RankMethod, uniform, zeros
from peanut_jax.updates import LowRank

ORIENTATIONS = ("output", "input")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeanutConfig(RankMethod):
    """PEANuT: W = W0 + scaling * f(W0; theta), with f a small network that reads the frozen kernel itself.

    Args:
        depth: Encoder/decoder pairs between A and B. The paper's depth counts layers: its 2, 4, 6 are 0, 1, 2 here.
        act_fn: The nonlinearity, a key of `activations.ACTIVATIONS`. `"linear"` with depth 0 is multiplicative LoRA.
        orientation: `"output"` reads the rows of W0 [d_in, d_out] (HF PEFT, the authors' vision and NLU code);
            `"input"` applies the same network to W0^T (the authors' LLM code).
        init_weights: True starts from B = 0, an exact no-op; False draws B too.

    See `RankMethod` and `AdapterConfig` for the other fields.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Examples:
        >>> pj.PeanutConfig(r=8, depth=1, target_modules=["query", "value"]).shapes(16, 24)
        {'a': (24, 8), 'b': (8, 24), 'encoders': (1, 8, 8), 'decoders': (1, 8, 8)}

    References:
        arXiv:2410.01870v3, sections 3.1 and 3.2; `peft/tuners/peanut/config.py` of huggingface/peft 0.21.2.
    """

    NAME: ClassVar[str] = "PEANuT"

    depth: int = 0
    act_fn: str = "relu"
    init_weights: bool = True
    orientation: str = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("depth", fields.integer("depth", self.depth, minimum=0))
        fields.activation("act_fn", self.act_fn)
        self._set("init_weights", fields.flag("init_weights", self.init_weights))
        if self.orientation not in ORIENTATIONS:
            raise ValueError(f"orientation must be one of {ORIENTATIONS}, got {short(self.orientation)}")

    def leaves(self) -> dict[str, Leaf]:
        """A, B and the stacked encoders and decoders; A and B lie along the side that the network reads across."""
        side = "out" if self.orientation == "output" else "in"
        pairs = {name: Leaf(("depth", "r", "r")) for name in ("encoders", "decoders")} if self.depth else {}
        return {"a": Leaf((side, "r")), "b": Leaf(("r", side), zeros if self.init_weights else uniform), **pairs}

    def update(
        self,
        theta: Mapping[str, Float[Array, "..."]],
        kernel: Matrix,
        bias: Float[Array, "*stack d_out"] | None = None,
    ) -> LowRank:
        """(z, scaling * B), mirrored for the input orientation; see `tweaker`."""
        act = ACTIVATIONS[self.act_fn]
        return tweaker.factors(kernel, theta, act=act, scaling=self.scaling, orientation=self.orientation)
