"""Reading a run from its config file, with changes from the command line."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peanut_jax.trainer.config import Run

_MODULE = "peanut_run_config"


def read(path: Path, changes: Sequence[str] = ()) -> Run:
    """The `config` of a Python file, with changes such as "loop.steps=100".

    Raises:
        ValueError: no such file, no `config` in it; a change that names no field, or whose value the field refuses.
    """
    if not path.is_file():
        raise ValueError(f"there is no config file {path}")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} must be a Python file that builds `config`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # where dataclasses look up the annotations of a task that the file defines
    spec.loader.exec_module(module)
    run = getattr(module, "config", None)
    if not isinstance(run, Run):
        raise ValueError(f"{path} must define `config`, a peanut_jax.trainer.Run, found {type(run).__name__}")
    return _changed(run, changes)


def _changed(run: Run, changes: Sequence[str]) -> Run:
    """The run with all changes made at once, since fields may only make sense together."""
    parts: dict[str, dict[str, Any]] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        part, dot, field = name.rpartition(".")
        holder = getattr(run, part, None) if dot else run
        known = dataclasses.is_dataclass(holder) and field in vars(holder)
        if not equals or not known or dataclasses.is_dataclass(getattr(holder, field)):
            raise ValueError(f"--set takes a field of the config, such as loop.steps=100, got {change!r}")
        parts.setdefault(part, {})[field] = _value(text)
    own: Any = parts.pop("", {})
    whole: Any = {part: dataclasses.replace(getattr(run, part), **fields) for part, fields in parts.items()}
    return dataclasses.replace(run, **whole, **own)


def _value(text: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
