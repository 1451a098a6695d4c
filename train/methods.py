"""The methods that the quickstart compares, one row each.

Sizes: the adapters read the query and value kernels (the default targets of a ViT), d x d with d = 64. A kernel costs
2 d r in PEANuT of depth 0 and in every LoRA, and 2 d r + 4 r^2 in PEANuT of depth 2: 1,280 parameters for r = 10 and
for r = 8.

Learning rates: the best of 30 pairs for each method, without a look at the test pictures. Mean accuracy over three
draws of 112 validation pictures out of the 448 training pictures, each with a head of its own, at the quickstart's
number of steps; a tie goes to the lower rates. Grid: 1e-3, 3e-3, 1e-2, 3e-2, 1e-1 for the adapter or the body, by 1e-3,
3e-3, 1e-2, 3e-2, 1e-1, 3e-1 for the head; the linear probe, which has only a head, was tried at these and 1.0. Several
runners-up are within 0.01, less than the spread of the draws.
"""

import dataclasses
from typing import Literal

import peanut_jax as pj

HEAD = "classifier"


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to adapt a pretrained model whose head is new.

    Attributes:
        name: As the table shows it.
        how: An adapter's config; "probe" trains the head alone and "full" every parameter.
        learning_rate: Peak, of the adapter or of the body of the model; 0 where the head alone is trained.
        head_learning_rate: Peak, of the new head.
    """

    name: str
    how: pj.PeanutConfig | pj.LoraConfig | Literal["probe", "full"]
    learning_rate: float
    head_learning_rate: float


_NEW = (HEAD,)
METHODS = (
    Method("PEANuT, depth 0", pj.PeanutConfig(r=10, modules_to_save=_NEW), 1e-2, 1e-1),
    Method("PEANuT, depth 2", pj.PeanutConfig(r=8, depth=2, modules_to_save=_NEW), 3e-2, 1e-1),
    Method("LoRA", pj.LoraConfig(r=10, modules_to_save=_NEW), 1e-2, 1e-2),
    Method("nonlinear LoRA", pj.LoraConfig(r=10, act_fn="relu", modules_to_save=_NEW), 1e-2, 1e-2),
    Method("multiplicative LoRA", pj.PeanutConfig(r=10, act_fn="linear", modules_to_save=_NEW), 1e-2, 3e-2),
    Method("linear probe", "probe", 0.0, 1e-1),
    Method("full fine-tuning", "full", 1e-3, 1e-1),
)
