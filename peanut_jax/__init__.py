"""PEANuT (arXiv:2410.01870) for Flax: weight-aware adapters at LoRA's cost."""

from typing import NoReturn

from peanut_jax.adapters import Adapters, compute_updates, count, factors, init, merge, with_saved
from peanut_jax.base.select import select
from peanut_jax.frontends.linen import adapt, bind, unbind
from peanut_jax.frontends.linen_modules import kernel_axes
from peanut_jax.interop.fingerprint import fingerprint
from peanut_jax.interop.lora import from_lora, init_from_factors, to_lora
from peanut_jax.interop.merged import export_merged
from peanut_jax.interop.peft import load_adapter, save_adapter
from peanut_jax.methods.dora import DoraConfig
from peanut_jax.methods.lora import LoraConfig
from peanut_jax.methods.peanut import PeanutConfig
from peanut_jax.methods.subset import SubsetConfig
from peanut_jax.training import TrainState, freeze, make_train_step, partition, trainable_mask
from peanut_jax.updates import LowRank, combine

__version__ = "0.1.0"

__all__ = [
    "Adapters",
    "DoraConfig",
    "LoraConfig",
    "LowRank",
    "PeanutConfig",
    "SubsetConfig",
    "TrainState",
    "adapt",
    "bind",
    "combine",
    "compute_updates",
    "count",
    "export_merged",
    "factors",
    "fingerprint",
    "freeze",
    "from_lora",
    "init",
    "init_from_factors",
    "kernel_axes",
    "load_adapter",
    "make_train_step",
    "merge",
    "partition",
    "save_adapter",
    "select",
    "to_lora",
    "trainable_mask",
    "unbind",
    "with_saved",
]


def __getattr__(name: str) -> NoReturn:
    if name == "intercept":
        raise AttributeError(
            "peanut_jax.intercept is gone: it found modules by path, and so changed other models too. "
            "bind(fn, updates) calls a function with updates"
        )
    raise AttributeError(f"module 'peanut_jax' has no attribute {name!r}")
