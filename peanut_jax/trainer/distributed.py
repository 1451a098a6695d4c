"""Several processes: starting them together, and doing together what one of them decides."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that has died is noticed by the others within this.
HEARTBEAT_TIMEOUT_S = 30
_TEXT_BYTES = 2048


def start(coordinator: str | None, processes: int | None, process_id: int | None, timeout_s: int) -> None:
    """Joins the run's other processes: those named, or those that SLURM, MPI, Kubernetes or a TPU pod started.

    Must come before anything that uses a device. Where nothing is given and no cluster is found, this is a run of one
    process.

    Args:
        coordinator: HOST:PORT of process 0, the same for all.
        processes, process_id: How many there are, and which this is; needed with `coordinator`.
        timeout_s: How long to wait for the others; then the process ends with the reason on stderr.

    Raises:
        ValueError: arguments that do not go together.
    """
    given = (coordinator, processes, process_id)
    if any(value is not None for value in given):
        if None in given or processes is None or process_id is None:
            raise ValueError("--coordinator HOST:PORT, --processes N and --process-id I go together")
        if not 0 <= process_id < processes:
            raise ValueError(f"--process-id must be in 0..{processes - 1}, got {process_id}")
        if processes == 1:
            return
    waiting = f"{coordinator} ({processes} processes)" if coordinator else "the cluster's coordinator"
    with _deadline(timeout_s, f"process {process_id or 0} waited {timeout_s} s for all processes to meet at {waiting}"):
        try:
            jax.distributed.initialize(
                coordinator, processes, process_id,
                initialization_timeout=timeout_s + 60,  # past our own, which says what happened
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
                shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            )  # fmt: skip
        except ValueError as error:
            # What jax says where no cluster is found (jax 0.10, State.initialize in _src/distributed.py).
            if coordinator is not None or "coordinator_address should be defined" not in str(error):
                raise


@contextlib.contextmanager
def _deadline(timeout_s: int, reason: str) -> Iterator[None]:
    """Ends the process with a reason when the block takes longer; JAX's own way out is an abort with a stack trace."""

    def give_up() -> None:
        print(
            f"train: {reason}: start the others, and see that they reach that address and port",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def on_first(fn: Callable[[], Any]) -> None:
    """Calls `fn` on process 0 alone; what it raises as a ValueError or OSError, all raise."""
    if not several():
        fn()
        return
    failure = ""
    if is_first():
        try:
            fn()
        except (ValueError, OSError) as error:
            failure = str(error) or type(error).__name__
    text = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(failure.encode()[:_TEXT_BYTES], np.uint8)
    text[: len(encoded)] = encoded
    told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).rstrip(b"\0").decode(errors="replace")
    if told:
        raise ValueError(told)


def is_first() -> bool:
    """Whether this is the process that writes logs and final files."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1
