"""PEANuT (arXiv:2410.01870) for Flax: weight-aware adapters at LoRA's cost."""

from peanut_jax.adapters import combine, count, factors, init, merge
from peanut_jax.config import LoraConfig, PeanutConfig
from peanut_jax.intercept import adapt, intercept
from peanut_jax.kernels import kernel_axes
from peanut_jax.targets import select
from peanut_jax.training import TrainState, freeze, make_train_step, partition, trainable_mask

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "PeanutConfig",
    "TrainState",
    "adapt",
    "combine",
    "count",
    "factors",
    "freeze",
    "init",
    "intercept",
    "kernel_axes",
    "make_train_step",
    "merge",
    "partition",
    "select",
    "trainable_mask",
]
