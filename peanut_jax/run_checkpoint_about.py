"""What a run is, as about.json beside its checkpoints says it, and in what another run differs."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from peanut_jax.files.atomic import write_text
from peanut_jax.files.untrusted import read_json
from peanut_jax.messages import one_line
from peanut_jax.run_checkpoint_leaves import ABSENT

ABOUT = "about.json"


def read_about(folder: Path) -> dict[str, Any] | None:
    """What the run is whose checkpoints are in a folder; None where none was saved yet.

    Raises:
        ValueError: a damaged about.json.
    """
    path = folder / ABOUT
    if not path.exists():
        return None
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{ABOUT} is damaged ({one_line(error, 300)}); restore it or use another folder") from error


def check_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuses a folder with the checkpoints of another run.

    Raises:
        ValueError: another `about` than the folder's, naming every field that differs; a damaged about.json.
    """
    saved = read_about(folder)
    different = [] if saved is None else list(differences(saved, about))
    if different:
        raise ValueError(f"{folder} holds checkpoints of another run (there, here): {listed(different)}")


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes about.json, where there is none yet, from the first process."""
    path = folder / ABOUT
    if jax.process_index() == 0 and not path.exists():
        write_text(path, json.dumps(about, indent=2) + "\n")


def plain(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The mapping as JSON gives it back.

    Raises:
        ValueError: a mapping that is not JSON, called `what`.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a mapping for JSON: {error}") from error


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """`dotted.path: value there, value here` for each field of two JSON values that differs; a fingerprint is one."""
    if there == here:
        return
    if not (isinstance(there, dict) and isinstance(here, dict)):
        yield f"{path}: {_short(there)}, {_short(here)}"
    elif _is_fingerprint(there) and _is_fingerprint(here):
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        yield f"{path}: {len(names)} of {len({**there, **here})} kernels differ, the first {names[0]!r}"
    else:
        for name in {**there, **here}:
            if there.get(name) is None and here.get(name) is None:
                continue  # a field that came later, at None, where an older file has none
            dotted = f"{path}.{name}" if path else name
            yield from differences(there.get(name, ABSENT), here.get(name, ABSENT), dotted)


def listed(items: Sequence[str], limit: int = 350) -> str:
    """The items as one text of at most about `limit` characters; those that have no room are counted."""
    shown = list(items)
    while len(shown) > 1 and len("; ".join(shown)) > limit:
        shown.pop()
    left = len(items) - len(shown)
    return "; ".join(shown) + (f"; and {left} more" if left else "")


def _is_fingerprint(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(isinstance(one, str) and re.fullmatch("[0-9a-f]{16}", one) for one in value.values())


def _short(value: Any, limit: int = 80) -> str:
    text = value if value == ABSENT else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
