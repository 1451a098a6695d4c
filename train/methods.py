"""The methods that the quickstart compares, one row each.

Sizes: the adapters read the query and value kernels (the default targets of a ViT), d x d with d = 64. A kernel costs
2 d r in PEANuT of depth 0 and in every LoRA, and 2 d r + 4 r^2 in PEANuT of depth 2: 1,280 parameters for r = 10 and
for r = 8.

Learning rates: the best of 30 pairs for each adapter, without a look at the test pictures. Mean accuracy over three
draws of 112 validation pictures out of the 448 training pictures, each with a head of its own, at the quickstart's
number of steps; a tie goes to the lower rates. Grid: 1e-3, 3e-3, 1e-2, 3e-2, 1e-1 for the adapter, by 1e-3, 3e-3, 1e-2,
3e-2, 1e-1, 3e-1 for the head. The linear probe, which has only a head, was tried at these and 1.0; full fine-tuning,
with one rate for the whole model, at the five of the adapters. Several runners-up are within 0.01, less than the spread
of the draws. The heads of that search were drawn as Flax's class draws them, with more than the 0.02 of PyTorch's.
"""

import dataclasses

import peanut_jax as pj
from peanut_jax.methods.base import Method
from train.digits import BODY, HEAD


@dataclasses.dataclass(frozen=True)
class Entry:
    """One way to adapt a pretrained model whose head is new.

    Attributes:
        name: As the table shows it.
        config: What is trained.
        learning_rate: Peak rate.
        saved_learning_rate: Peak rate of the new head; None for `learning_rate`.
    """

    name: str
    config: Method
    learning_rate: float
    saved_learning_rate: float | None = None


_NEW = (HEAD,)
METHODS = (
    Entry("PEANuT, depth 0", pj.PeanutConfig(r=10, modules_to_save=_NEW), 1e-2, 1e-1),
    Entry("PEANuT, depth 2", pj.PeanutConfig(r=8, depth=2, modules_to_save=_NEW), 3e-2, 1e-1),
    Entry("LoRA", pj.LoraConfig(r=10, modules_to_save=_NEW), 1e-2, 1e-2),
    Entry("nonlinear LoRA", pj.LoraConfig(r=10, act_fn="relu", modules_to_save=_NEW), 1e-2, 1e-2),
    Entry("multiplicative LoRA", pj.PeanutConfig(r=10, act_fn="linear", modules_to_save=_NEW), 1e-2, 3e-2),
    Entry("linear probe", pj.SubsetConfig(modules_to_save=_NEW), 1e-1),
    Entry("full fine-tuning", pj.SubsetConfig(modules_to_save=(BODY, HEAD)), 1e-3),
)
