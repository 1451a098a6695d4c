"""One line for each error: what libraries print of an error that is raised too is left out."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

# What they log of an error they raise as well, tracebacks included; NaNs are in the metrics anyway.
_LEVELS = {"absl": logging.CRITICAL, "huggingface_hub": logging.ERROR, "tensorboardX": logging.ERROR}

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """For as long as a command runs."""
    import datasets

    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = _unless_late(sys.unraisablehook), _in_a_line
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = hooks


def _unless_late(hook: Any) -> Any:
    """`hook`, less what tensorstore prints of each write that was on its way when orbax gave up at the first error."""

    def called(told: Any) -> None:
        if not (told.exc_type is RuntimeError and str(told.exc_value) == "Event loop is closed"):
            hook(told)

    return called


def _in_a_line(told: threading.ExceptHookArgs) -> None:
    """What ends a library's own thread, such as TensorBoard's writer at a full disk."""
    name = told.thread.name if told.thread is not None else "a thread"
    text = " ".join(str(told.exc_value).split())[:300]
    logger.warning("%s has ended: %s: %s", name, told.exc_type.__name__, text)
