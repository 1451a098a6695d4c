"""Training from a config file, as a command."""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from peanut_jax.messages import MESSAGE, one_line
from peanut_jax.trainer import aborts, distributed
from peanut_jax.trainer.extras import check_extras
from peanut_jax.trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from peanut_jax.trainer.loop import Outcome

_NO_FAULT = (
    "Where this is no fault of its own, another process has stopped or died: see its output. Go on with --resume"
)
EXAMPLES = """\
  %(prog)s configs/sst2.py --out runs/sst2
  %(prog)s configs/sst2.py --out runs/sst2 --set loop.steps=100
  %(prog)s --resume --out runs/sst2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m train`; see `run`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(format="train: note: %(message)s", level=logging.WARNING, force=True)
    return run(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "config", type=Path, nargs="?",
        help="Python file that builds `config`, a peanut_jax.trainer.Run; with --resume by default the run's own",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR, with the --set of its start")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a change, such as loop.steps=100; repeatable"
    )
    several = parser.add_argument_group(
        "several processes", "Found by themselves under SLURM, MPI, Kubernetes and on TPU pods."
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which this is, from 0")
    several.add_argument(
        "--timeout", type=int, default=300, metavar="S", help="seconds to wait for the others (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Trains what the arguments of `add_arguments` say.

    Returns:
        0 after the last step or an early stop; 1 after an error of the user's or the run's, told in one line; 128 + the
        signal's number after one that stopped the run, with everything saved.
    """
    try:
        with contextlib.ExitStack() as stack:
            return _run(args, stack)
    except KeyboardInterrupt:
        print("train: interrupted before the first step; nothing was saved", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    try:
        check_extras()
        # Imported here: a package that is not installed is an error of the command, not of its --help.
        from peanut_jax.trainer import train
        from peanut_jax.trainer.reading import read_for

        stack.enter_context(quiet_libraries())
        distributed.start(args.coordinator, args.processes, args.process_id, args.timeout)
        config, origin = read_for(args.out, args.config, args.set, resume=args.resume)
        if distributed.several():
            stack.enter_context(aborts.told(jax.process_index(), distributed.HEARTBEAT_TIMEOUT_S))
        outcome = train(config, args.out, resume=args.resume, origin=origin)
    except (ImportError, ValueError, NotImplementedError, OSError, jax.errors.JaxRuntimeError) as error:
        return _failed(error)
    if distributed.is_first():
        print(_told(outcome, args.out), file=sys.stderr)
    return 128 + signal.Signals[outcome.signal].value if outcome.signal and not outcome.complete else 0


def _told(outcome: "Outcome", out: Path) -> str:
    if not outcome.complete:
        return f"train: {outcome.signal} after step {outcome.step} of {outcome.total}, saved; go on with --resume"
    early = ", early: no better evaluation for a while (loop.patience)" if outcome.early else ""
    return f"train: {out} is complete after step {outcome.step}{early}"


def _failed(error: Exception) -> int:
    if not distributed.several():
        print(f"train: {one_line(error, MESSAGE - len('train: '))}", file=sys.stderr)
        return 1
    before, after = f"train: process {jax.process_index()} stops: ", f". {_NO_FAULT}"
    room = MESSAGE - len(before) - len(after)
    print(before + one_line(error, room) + after, file=sys.stderr, flush=True)
    os._exit(1)  # a regular exit would wait for processes that are no more
