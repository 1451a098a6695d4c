"""Training from a config: what `peanut-jax train` runs.

    from peanut_jax.trainer import Classification, LanguageModelling, Loop, Optimizer, Run, read, train

Each name is imported when it is first asked for: a config needs none of the packages of `peanut-jax[train]`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from peanut_jax.trainer.extras import check_extras

if TYPE_CHECKING:
    from peanut_jax.trainer.config import Loop, Optimizer, Run
    from peanut_jax.trainer.loop import train
    from peanut_jax.trainer.reading import read
    from peanut_jax.trainer.tasks.language import LanguageModelling
    from peanut_jax.trainer.tasks.text import Classification

__all__ = ["Classification", "LanguageModelling", "Loop", "Optimizer", "Run", "read", "train"]

_MODULES = {
    "Classification": "tasks.text",
    "LanguageModelling": "tasks.language",
    "Loop": "config",
    "Optimizer": "config",
    "Run": "config",
    "read": "reading",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name] == "loop":
        check_extras()
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
