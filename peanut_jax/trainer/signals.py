"""SIGTERM and Ctrl-C as a question that the loop asks after each step."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental import multihost_utils

from peanut_jax.trainer.distributed import several


@contextlib.contextmanager
def signalled() -> Iterator[Callable[[int], str | None]]:
    """`asked(step)`: the name of a signal to stop that came, and after the same step on every process; else None."""
    with _agreed() if several() else _own() as asked:
        yield asked


@contextlib.contextmanager
def _agreed() -> Iterator[Callable[[int], str | None]]:
    """The processes agree on a step through jax.distributed, which has its own handler for SIGTERM."""
    earlier = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextlib.contextmanager
def _own() -> Iterator[Callable[[int], str | None]]:
    came: list[str] = []
    handlers: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, handlers[number])  # a second one ends the process as ever

    handlers.update({number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)})
    try:
        yield lambda step: came[0] if came else None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
