"""Kills a run at random times and resumes it until it is through: is the adapter that of the run left alone?

    python -m benchmarks.soak --kills 20 --folder FOLDER -- configs/stories.py --set task.model=MODEL ...

What follows `--` are arguments of `python -m train`, without --out and --resume. Checkpoints should be frequent
(`--set loop.save_every=1`), so that kills fall within saves. A kill is SIGKILL, after a random number of steps and a
random part of a step; one in five is SIGTERM, which saves first. One JSON line a kill, and one at the end: kills that
left a half-written checkpoint, steps that had to be taken again, and whether every tensor is the same bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ADAPTER = "adapter/adapter_model.safetensors"


def start(arguments: list[str], out: Path, cache: Path) -> subprocess.Popen:
    """`python -m train` with a compilation cache, so that a restart costs little."""
    environment = {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    resume = ["--resume"] if (out / "run.json").exists() else []
    command = [sys.executable, "-m", "train", *arguments, "--out", str(out), *resume]
    with (out.parent / f"{out.name}.log").open("a") as log:
        return subprocess.Popen(command, env=environment, stderr=log)


def last_step(out: Path) -> int:
    """The last step whose metrics were written; 0 before the first."""
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except ValueError:  # the kill cut the last line
            continue
    return 0


def saved_steps(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit())


def kill_once(arguments: list[str], out: Path, cache: Path, draw: random.Random, most: int) -> dict | None:
    """Starts or resumes the run and kills it; None if it came to its end first."""
    process = start(arguments, out, cache)
    began, steps = last_step(out), draw.randint(1, most)
    while last_step(out) < began + steps and process.poll() is None:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))
    number = signal.SIGTERM if draw.random() < 0.2 else signal.SIGKILL
    process.send_signal(number)
    code = process.wait()
    if code == 0:
        return None
    if code not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
        raise SystemExit(f"the run ended by itself, with {code}: see {out}.log")
    half = [path.name for path in (out / "checkpoints").glob("*tmp*")]
    saved = saved_steps(out)
    return {
        "signal": number.name, "code": code, "step": last_step(out), "saved": saved[-1] if saved else 0,
        "half_written": len(half),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--most", type=int, default=8, help="largest number of steps between two kills")
    parser.add_argument("--folder", type=Path, required=True, help="an empty one, for both runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="+", help="of python -m train, after --")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    whole, killed, cache = args.folder / "whole", args.folder / "killed", args.folder / "cache"
    if start(args.arguments, whole, cache).wait():
        raise SystemExit(f"the run left alone failed: see {whole}.log")
    draw = random.Random(args.seed)
    records: list[dict] = []
    while len(records) < args.kills:
        record = kill_once(args.arguments, killed, cache, draw, args.most)
        if record is None:
            raise SystemExit(f"the run ended after {len(records)} kills; give it more steps")
        records.append(record)
        print(json.dumps(record), flush=True)
    if start(args.arguments, killed, cache).wait():
        raise SystemExit(f"the killed run could not be finished: see {killed}.log")
    got, want = load_file(killed / ADAPTER), load_file(whole / ADAPTER)
    same = got.keys() == want.keys() and all(np.array_equal(got[name], want[name], equal_nan=True) for name in want)
    summary = {
        "kills": len(records),
        "sigkill": sum(record["signal"] == "SIGKILL" for record in records),
        "with_half_written_checkpoint": sum(record["half_written"] > 0 for record in records),
        "steps_lost": [record["step"] - record["saved"] for record in records],
        "tensors": len(want),
        "identical": bool(same),
    }
    print(json.dumps(summary))
    if not same:
        raise SystemExit("the adapters differ")


if __name__ == "__main__":
    main()
