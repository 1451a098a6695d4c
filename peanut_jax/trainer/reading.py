"""Reading a run from its config file, with changes from the command line and those that a run began with."""

import dataclasses
import importlib.util
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peanut_jax.messages import short
from peanut_jax.trainer.config import EXCLUSIVE, Run

logger = logging.getLogger(__name__)

_MODULE = "peanut_run_config"


class Origin(NamedTuple):
    """Where the config of a run came from, as run.json keeps it for a resume.

    Attributes:
        config: The config file.
        changes: What was changed, such as "loop.steps=100".
        under: Field -> the config file's own value of what was changed, or excluded by a change.
    """

    config: str
    changes: list[str]
    under: dict[str, Any]


def read(path: Path, changes: Sequence[str] = ()) -> Run:
    """The `config` of a Python file, with changes such as "loop.steps=100".

    All changes are made at once, whatever their order; of two for one field the last counts. One to `loop.steps` or
    `loop.epochs` replaces the other, and a log warning says so.

    Raises:
        ValueError: no such file, no `config` in it; a change that names no field, or whose value the field refuses.
    """
    return _changed(_from_file(path), changes, path)


def read_for(folder: Path, path: Path | None, changes: Sequence[str], *, resume: bool) -> tuple[Run, Origin]:
    """The config of a run that starts in a folder, or of the one there that goes on as it was begun.

    Args:
        path: The config file; None for that of the run in `folder`.
        changes: Those given now. Those that the run in `folder` began with are made again, less what is given anew.
        resume: Whether the run in `folder` goes on.

    Raises:
        ValueError: as `read`; no config file is given, and none is known.
    """
    earlier = _origin(folder, path is None) if resume else None
    if path is None and earlier is None:
        raise ValueError("name a config file, or with --resume the folder of a run: peanut-jax train CONFIG --out DIR")
    path = path or Path(earlier.config)  # type: ignore[union-attr]
    merged = _merged(earlier.changes if earlier else [], changes)
    plain = _from_file(path)
    run = _changed(plain, merged, path, told=changes)
    hidden = {name: None for changed in _fields(merged) for name in (changed, EXCLUSIVE.get(changed, changed))}
    content = plain.as_json()
    under = {name: _get(content, name) for name in hidden}
    if earlier:
        _tell_edits(path, earlier, under, merged, changes)
    return run, Origin(str(path.absolute()), merged, under)


def _tell_edits(
    path: Path, earlier: Origin, under: Mapping[str, Any], merged: Sequence[str], now: Sequence[str]
) -> None:
    """Warns of a field that was edited in the file and stays as a change that the run began with says."""
    kept = {name: f"{name}={text}" for name, text in _fields(merged).items() if name not in _fields(now)}
    kept |= {EXCLUSIVE[name]: change for name, change in kept.items() if name in EXCLUSIVE}
    for name in kept.keys() & earlier.under.keys() & under.keys():
        if under[name] != earlier.under[name]:
            logger.warning(
                "%s now has %s=%s, and had %s when the run began; the run goes on with --set %s of its start: give "
                "--set %s=... to change that",
                path, name, json.dumps(under[name]), json.dumps(earlier.under[name]), kept[name], name,
            )  # fmt: skip


def _origin(folder: Path, needed: bool) -> Origin | None:
    """Where the config of the run in a folder came from; None where that is not known.

    Raises:
        ValueError: it is not known, and `needed`.
    """
    # Imported here: to read a config needs no package of peanut-jax[train].
    from peanut_jax.trainer.run_folder import RUN, SOURCE, check_holds_run, read_run

    check_holds_run(folder)
    try:
        kept = read_run(folder).get(SOURCE, {})
        problem = f"{folder / RUN} does not say with which config file and changes the run began"
    except ValueError as error:
        kept, problem = {}, str(error)
    config, changes, under = (kept.get(name) for name in Origin._fields)
    whole = isinstance(config, str) and isinstance(under, dict) and isinstance(changes, list)
    if whole and all(isinstance(change, str) for change in changes):
        return Origin(config, changes, under)
    advice = "name the config file, and give its --set again"
    if needed:
        raise ValueError(f"{problem}: {advice}")
    logger.warning("%s: %s", problem, advice)
    return None


def _merged(earlier: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Earlier changes, less those of fields that are changed anew or that a new change excludes, and the new ones."""
    new = _fields(changes)
    gone = {*new, *(EXCLUSIVE[name] for name, text in new.items() if name in EXCLUSIVE and _value(text) is not None)}
    kept = {name: text for name, text in _fields(earlier).items() if name not in gone}
    return [f"{name}={text}" for name, text in {**kept, **new}.items()]


def _fields(changes: Sequence[str]) -> dict[str, str]:
    """Field -> text; the last counts."""
    return {name: text for name, _, text in (change.partition("=") for change in changes)}


def _get(config: Mapping[str, Any], name: str) -> Any:
    part, _, field = name.rpartition(".")
    return (config[part] if part else config).get(field)


def _from_file(path: Path) -> Run:
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
    return run


def _changed(run: Run, changes: Sequence[str], path: Path, told: Sequence[str] | None = None) -> Run:
    """The run with all changes made at once, since fields may only make sense together.

    Args:
        told: The changes of which a warning says what they replace; None for all.
    """
    parts: dict[str, dict[str, Any]] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        part, dot, field = name.rpartition(".")
        holder = getattr(run, part, None) if dot else run
        known = dataclasses.is_dataclass(holder) and field in vars(holder)
        if not equals or not known or dataclasses.is_dataclass(getattr(holder, field)):
            raise ValueError(f"--set takes a field of the config, such as loop.steps=100, got {short(change)}")
        parts.setdefault(part, {})[field] = _value(text)
    replaced = _replace_counterparts(run, parts)
    own: Any = parts.pop("", {})
    whole: Any = {part: dataclasses.replace(getattr(run, part), **fields) for part, fields in parts.items()}
    run = dataclasses.replace(run, **whole, **own)
    for name, value in replaced.items():
        if told is None or EXCLUSIVE[name] in _fields(told):
            logger.warning("--set %s replaces %s=%s of %s", EXCLUSIVE[name], name, value, path)
    return run


def _replace_counterparts(run: Run, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sets to None what a change excludes, unless that is changed too; returns the values that this replaces."""
    replaced = {}
    for name, counterpart in EXCLUSIVE.items():
        part, _, field = name.rpartition(".")
        other = counterpart.rpartition(".")[2]
        fields = parts.get(part, {})
        if fields.get(field) is not None and other not in fields:
            if (value := getattr(getattr(run, part), other)) is not None:
                replaced[counterpart] = value
            fields[other] = None
    return replaced


def _value(text: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
