"""Training from a config file.

python -m train configs/example.py --out runs/example
python -m train configs/example.py --out runs/example --resume
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from peanut_jax.trainer import config, distributed
from peanut_jax.trainer.loop import train


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0 after the last step or an early stop; 1 after an error of the user's or the run's, told in one line; 128 + the
        signal's number after one that stopped the run, with everything saved.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    args = _parser().parse_args(argv)
    logging.basicConfig(format="train: note: %(message)s", level=logging.WARNING, force=True)
    try:
        distributed.start(args.coordinator, args.processes, args.process_id, args.timeout)
        run = config.read(args.config, args.set)
        outcome = train(run, args.out, resume=args.resume)
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        return _failed(error)
    if distributed.is_first():
        print(_told(outcome, args.out), file=sys.stderr)
    return 128 + signal.Signals[outcome.signal].value if outcome.signal and not outcome.complete else 0


def _told(outcome, out: Path) -> str:
    if not outcome.complete:
        return f"train: {outcome.signal} after step {outcome.step} of {outcome.total}, saved; go on with --resume"
    early = ", early: no better evaluation for a while (loop.patience)" if outcome.early else ""
    return f"train: {out} is complete after step {outcome.step}{early}"


def _failed(error: Exception) -> int:
    if not distributed.several():
        print(f"train: {error}", file=sys.stderr)
        return 1
    print(
        f"train: process {jax.process_index()} stops: {error}. Where this is no fault of its own, another process has "
        "stopped or died: see its output. Go on with --resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # a regular exit would wait for processes that are no more


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="Python file that builds `config`, a peanut_jax.trainer.config.Run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR")
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
