"""PEANuT (arXiv:2410.01870) for Flax: weight-aware adapters at LoRA's cost."""

from peanut_jax.adapters import combine, count, factors, init, merge, with_saved
from peanut_jax.base.select import select
from peanut_jax.frontends.linen import adapt, intercept, kernel_axes
from peanut_jax.interop.fingerprint import fingerprint
from peanut_jax.interop.lora import from_lora, init_from_factors, to_lora
from peanut_jax.interop.merged import export_merged
from peanut_jax.interop.peft import load_adapter, save_adapter
from peanut_jax.methods.base import LoraConfig, PeanutConfig
from peanut_jax.training import TrainState, freeze, make_train_step, partition, trainable_mask

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "PeanutConfig",
    "TrainState",
    "adapt",
    "combine",
    "count",
    "export_merged",
    "factors",
    "fingerprint",
    "freeze",
    "from_lora",
    "init",
    "init_from_factors",
    "intercept",
    "kernel_axes",
    "load_adapter",
    "make_train_step",
    "merge",
    "partition",
    "save_adapter",
    "select",
    "to_lora",
    "trainable_mask",
    "with_saved",
]
