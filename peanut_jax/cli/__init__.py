"""The `peanut-jax` command."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence

import peanut_jax
from peanut_jax.cli.arguments import add_command
from peanut_jax.cli.exporting import add_exports
from peanut_jax.cli.inspecting import add_inspect
from peanut_jax.cli.planning import add_plan
from peanut_jax.messages import MESSAGE, one_line
from peanut_jax.trainer import command as training

_NAME = "peanut-jax: "
# 128 + the number of the signal by which a shell's own tools end: SIGINT, SIGPIPE.
_INTERRUPTED, _PIPE_CLOSED = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0; 1 after one line on stderr for a user's error, or where `verify` finds a difference; 2 for
        arguments that argparse refuses, and where `verify` cannot compare; 130 after ctrl-C; 141 where the reader of
        a pipe has left, as `| head` does.
    """
    # transformers announces on every use that its Flax classes end with version 5, which pyproject.toml knows.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        try:
            return _run(argv)
        finally:  # also of argparse's exit after --help
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _leave_pipes()
        return _PIPE_CLOSED


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    _show_notes()
    try:
        return args.run(args) or 0
    except BrokenPipeError:
        raise
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"{_NAME}{one_line(error, MESSAGE - len(_NAME))}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{_NAME}interrupted{args.interrupted}", file=sys.stderr)
        return _INTERRUPTED
    return args.trouble


def _leave_pipes() -> None:
    """Points stdout and stderr, where nobody reads them any more, to nowhere, so that Python's own exit is silent."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peanut-jax",
        description="PEANuT adapters and Hugging Face checkpoints, on folders. PyTorch is not needed.",
        epilog="peanut-jax COMMAND --help says more.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {peanut_jax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_inspect(commands)
    add_plan(commands)
    training.add_arguments(
        add_command(
            commands,
            "train",
            training.run,
            "train an adapter from a config file",
            "Train what a config file says into a folder: adapters, checkpoints to resume from, metrics and curves. "
            "Needs peanut-jax[train].",
        )
    )

    add_exports(commands)
    return parser


def _show_notes() -> None:
    """The library's warnings, one line each on stderr; the hub's report of each new attempt is left out."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{_NAME}note: %(message)s"))
    logging.getLogger("peanut_jax").handlers = [handler]
