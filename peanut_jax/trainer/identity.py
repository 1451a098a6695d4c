"""What a run is: its config, its base and its data, by which a resume is told from another run."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peanut_jax as pj
from peanut_jax.base.kernels import flatten
from peanut_jax.base.select import saved_paths, select
from peanut_jax.base.torch_names import slots
from peanut_jax.base.whole import digests
from peanut_jax.files.atomic import write_text
from peanut_jax.files.untrusted import read_json
from peanut_jax.messages import one_line
from peanut_jax.run_checkpoints import ABOUT, differences
from peanut_jax.trainer.config import Run, binding
from peanut_jax.trainer.rows import earlier_identity, identity
from peanut_jax.trainer.run_folder import IDENTITY, read_run
from peanut_jax.trainer.tasks.base import Task

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
# Digests of every leaf of the base; earlier versions kept the fingerprint of the adapted kernels alone.
PARAMETERS, EARLIER_BASE = "parameters", "base"
_DATA = ("train", "evaluation")
# Characters of an error that name what differs.
_TOLD = 240


def identify(run: Run, task: Task) -> dict[str, Any]:
    """The config of a run, and digests of its base and of its data.

    Of the base every leaf counts but those of saved modules, which are trained and so in the checkpoint.

    Raises:
        ValueError, NotImplementedError: an adapter that does not fit the base, or could not be saved in the end.
    """
    slots(select(task.params, run.adapter).values())
    trained = saved_paths(flatten(task.params), run.adapter)
    return {
        "config": run.identity(),
        PARAMETERS: digests(task.params, trained),
        "data": {name: identity(rows) for name in _DATA if (rows := getattr(task, name)) is not None},
    }


def kept_identity(folder: Path, *, tell: bool = False) -> dict[str, Any] | None:
    """What the checkpoints in a run's folder are of; None where none was saved yet.

    It is in `about.json` beside them, and where that is damaged in `run.json`.

    Args:
        tell: Log a warning where it is damaged.

    Raises:
        ValueError: there are checkpoints, and neither file says what they are of.
    """
    path = folder / CHECKPOINTS / ABOUT
    try:
        return _typed(read_json(path), path)
    except (OSError, ValueError) as error:
        if not _any_checkpoint(path.parent):
            return None  # all that a first save that was killed may have left
        try:
            kept = _typed(read_run(folder).get(IDENTITY), folder)
        except ValueError:
            raise ValueError(
                f"{path} is damaged or missing, and run.json does not say either what the checkpoints are of "
                f"({one_line(error)}): restore one of the two from a backup, or start in another folder"
            ) from error
        if tell:
            logger.warning("%s is damaged or missing; what run.json says is used instead: %s", path, one_line(error))
        return kept


def keep_identity(folder: Path, here: Mapping[str, Any]) -> None:
    """Brings the `about.json` of earlier checkpoints up to date with a run that may go on from them."""
    path = folder / CHECKPOINTS / ABOUT
    if _any_checkpoint(path.parent):
        write_text(path, json.dumps(here, indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)  # the first save writes it


def check_config(there: Mapping[str, Any], run: Run, folder: Path) -> None:
    """Refuses a run of another config than that of the checkpoints in its folder.

    Raises:
        ValueError: naming the fields that differ, there and here.
    """
    _refuse(folder, list(_config_differences(there, run)))


def check_identity(there: Mapping[str, Any], here: Mapping[str, Any], run: Run, task: Task, folder: Path) -> None:
    """Refuses a run of another config, base or data than those of the checkpoints in its folder.

    What an earlier version kept less of is compared as far as it goes, with a warning.

    Raises:
        ValueError: naming what differs, there and here.
    """
    data = dict(here["data"])
    earlier = [name for name in data if _is_earlier(there["data"].get(name))]
    data |= {name: earlier_identity(getattr(task, name)) for name in earlier}
    if PARAMETERS in there:
        base = _base_differences(there[PARAMETERS], here[PARAMETERS])
    else:
        base = differences(there[EARLIER_BASE], pj.fingerprint(task.params, run.adapter), EARLIER_BASE)
    _refuse(folder, [*_config_differences(there, run), *base, *differences(there["data"], data, "data")])
    if earlier or PARAMETERS not in there:
        logger.warning(
            "%s was begun by an earlier version, which kept less: of the base only the adapted kernels, and of the "
            "data only three rows could be compared with those of the start", folder,
        )  # fmt: skip


def tell_new_length(folder: Path, run: Run, step: int) -> None:
    """Logs a warning where a run that goes on after `step` is to have another number of steps than it began with, and
    the learning rate depends on it."""
    try:
        earlier = read_run(folder)["config"].get("loop")
    except ValueError:  # told where it is written anew
        return
    lengths = [(one.get("steps"), one.get("epochs")) for one in (earlier, dataclasses.asdict(run.loop)) if one]
    if len(set(lengths)) == 2 and run.optimizer.schedule != "constant":
        before, now = ("steps={} and epochs={}".format(*one) for one in lengths)
        logger.warning(
            "the run began with loop.%s and now has %s: after step %d the learning rate is that of a %s schedule over "
            "the new length", before, now, step, run.optimizer.schedule,
        )  # fmt: skip


def _config_differences(there: Mapping[str, Any], run: Run) -> Iterator[str]:
    config, own = binding(there["config"]), run.identity()
    # Only a digest of all rows tells that another place holds the same data.
    if not any(_is_earlier(one) for one in there["data"].values()) and isinstance(config.get("task"), dict):
        for name in getattr(run.task, "SOURCES", ()):
            if config["task"].get(name) is not None and own["task"].get(name) is not None:
                config = {**config, "task": {**config["task"], name: own["task"][name]}}
    if isinstance(config.get("task"), dict):
        free = {name: own["task"][name] for name in getattr(run.task, "FREE", ()) if name in own["task"]}
        config = {**config, "task": {**config["task"], **free}}
    yield from differences(config, own, "config")


def _base_differences(there: Mapping[str, Any], here: Mapping[str, str]) -> Iterator[str]:
    every = {**there, **here}
    if names := [name for name in every if there.get(name) != here.get(name)]:
        yield f"base: {len(names)} of {len(every)} parameters differ, the first {names[0]!r}"


def _refuse(folder: Path, found: Sequence[str]) -> None:
    """Raises a ValueError that names what was found to differ, unless that is nothing."""
    if not found:
        return
    told = "; ".join(sorted(found, key=len))  # to name as many as there is room for
    if len(told) > _TOLD:
        told = f"{told[:_TOLD]}... ({len(found)} differences)"
    advice = "undo the change, or start in another folder"
    if all(one.startswith("data.") for one in found):
        advice = "rows were changed since the start: restore them, or start in another folder"
    raise ValueError(f"{folder} holds another run (there, here): {told}: {advice}")


def _typed(content: Any, path: Path) -> dict[str, Any]:
    sections = content if isinstance(content, dict) else {}
    base = sections.get(PARAMETERS, sections.get(EARLIER_BASE))
    if not all(isinstance(section, dict) for section in (sections.get("config"), sections.get("data"), base)):
        raise ValueError(f"{path} must hold the objects config, {PARAMETERS} and data")
    return content


def _any_checkpoint(folder: Path) -> bool:
    return any(path.name.isdecimal() for path in folder.glob("*"))


def _is_earlier(data: Any) -> bool:
    return isinstance(data, dict) and "checksum" in data
