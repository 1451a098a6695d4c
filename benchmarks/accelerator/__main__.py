"""Everything that is asked of an accelerator, in one command that a person need not watch.

    python -m benchmarks.accelerator --out DIR
    python -m benchmarks.accelerator --out DIR --only step decode --seconds 300 --profile

From the root of a checkout, with jax for the accelerator, flax and optax (torch and peft for the comparison with HF
PEFT); nothing is downloaded, weights are random and made on the device. In DIR: `results.jsonl`, a line a case, written
as soon as it is known; `page.md`, the same as tables beside the published figures; `log.txt`, what libraries print;
with --profile `profile.txt`, the kernels of the main step by their time, and the trace itself.

Each section runs in a process of its own, with a time limit; one that fails or runs out of memory is a line with the
reason, and the next ones run. What no longer fits --seconds is skipped, and a line says so: --only measures it in
another run. On CPU the sizes are toy ones, which say that the command works and nothing else, and the page says so in
its first lines.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from benchmarks.accelerator.page import page
from benchmarks.accelerator.run import ENVIRONMENT, KINDS, LOG, RESULTS, Results, one, plans, sections_of, sizes_of
from benchmarks.accelerator.sizes import FULL, SIZES

PAGE = "page.md"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or an empty one")
    names = (*KINDS, *(f"step/{name}" for name in FULL.steps))
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=570.0, help="budget of the whole run (default 570)")
    parser.add_argument("--sizes", choices=("auto", *SIZES), default="auto", help="auto: toy on CPU, full elsewhere")
    parser.add_argument("--profile", action="store_true", help="trace the main step too")
    args = parser.parse_args()
    known = {*KINDS, *(name for sizes in SIZES for name in sections_of(sizes))}
    if unknown := [name for name in args.only if name not in known]:
        parser.error(f"--only: {unknown[0]!r} is not a section; sections: {', '.join(names)}")
    if not 0 < args.seconds < float("inf"):
        parser.error(f"--seconds must be a number above 0, got {args.seconds}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out: {args.out} exists and is not an empty folder; give a new one for each run")
    return args


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the run as an error would: the section's process is ended and the page is written."""
    sys.exit(128 + number)


def main() -> None:
    began = time.monotonic()
    args = arguments()
    signal.signal(signal.SIGTERM, stop)
    args.out = args.out.absolute()  # the sections' processes run in the checkout
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / RESULTS).open("w") as file, (args.out / LOG).open("w") as log:
        results = Results(file, lambda text: print(text, flush=True))
        try:
            for _ in measure(args, results, log, began + args.seconds):
                (args.out / PAGE).write_text(page(results.lines))
        finally:
            (args.out / PAGE).write_text(page(results.lines))
    print(f"{args.out / PAGE}: {len(results.lines)} cases in {time.monotonic() - began:.0f} s")
    if sizes_of(results) is None:
        sys.exit(f"no device to measure: {args.out / LOG} says why")


def measure(args: argparse.Namespace, results: Results, log: IO[str], deadline: float) -> Iterator[None]:
    """Runs one process after the other, and stops for the caller after each."""
    asked = None if args.sizes == "auto" else args.sizes
    one(ENVIRONMENT, results, results.context(asked, args.out), log, deadline)
    yield
    sizes = sizes_of(results)
    if sizes is None:
        return
    for plan in plans(sizes, args.only, args.profile):
        one(plan, results, results.context(sizes, args.out), log, deadline)
        yield


if __name__ == "__main__":
    main()
