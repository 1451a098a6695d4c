"""The `peanut-jax` command."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from peanut_jax.cli.arguments import add_command
from peanut_jax.cli.exporting import add_exports
from peanut_jax.cli.inspecting import add_inspect
from peanut_jax.cli.planning import add_plan
from peanut_jax.trainer import command as training


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code: 0; 1 after one line on stderr for a user's error, or where `verify` finds a difference; 2 for
        arguments that argparse refuses.
    """
    # transformers announces on every use that its Flax classes end with version 5, which pyproject.toml knows.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    args = _parser().parse_args(argv)
    _show_notes()
    try:
        return args.run(args) or 0
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"peanut-jax: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("peanut-jax: interrupted; nothing was written", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peanut-jax",
        description="PEANuT adapters and Hugging Face checkpoints, on folders. PyTorch is not needed.",
        epilog="peanut-jax COMMAND --help says more.",
    )
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
    """The library's warnings, one line each on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("peanut-jax: note: %(message)s"))
    logging.getLogger("peanut_jax").handlers = [handler]
