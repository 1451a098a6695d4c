"""peanut-jax merge, to-lora and verify: an adapter and its base, on folders."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from peanut_jax.cli.arguments import add_command
from peanut_jax.cli.folders import check_adapter
from peanut_jax.cli.tables import PipeConsole
from peanut_jax.files.hub import local_folder
from peanut_jax.interop import peft_folder
from peanut_jax.interop.engines import ENGINES, Engine, Exported, is_known, model_type_of, refusal
from peanut_jax.interop.lora import to_lora_folder
from peanut_jax.interop.merged import merge_folders
from peanut_jax.interop.verify import TOLERANCES, compare


def _add_writing(command: argparse.ArgumentParser, replaced: str, out: str) -> None:
    """The arguments of a command that writes a folder from a base."""
    command.set_defaults(interrupted="; nothing was written")
    command.add_argument("base", help="folder of the base checkpoint (safetensors), or hub name")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
    command.add_argument("--overwrite", action="store_true", help=f"replace {replaced} that is there")
    command.add_argument(
        "--no-base-check",
        action="store_true",
        help="do not compare the base with the fingerprint that was saved with the adapter",
    )


def _writing(args: argparse.Namespace, description: str) -> dict[str, Any]:
    """What those arguments are to the library, with a bar on stderr."""
    return {
        "overwrite": args.overwrite,
        "check_base": not args.no_base_check,
        "track": lambda names: _track(names, description),
    }


def add_exports(commands) -> None:
    """The commands that take an adapter out: merge, to-lora, and verify."""
    _add_merge(commands)
    _add_to_lora(commands)
    _add_verify(commands)


def _add_merge(commands) -> None:
    merge = add_command(
        commands,
        "merge",
        _merge,
        "write the base checkpoint with adapters merged in",
        "Write the base checkpoint with W0 + dW in place of each adapted kernel, for transformers, vLLM or llama.cpp. "
        "Every other tensor keeps its bytes; names, shards, dtypes, configuration and tokenizer stay. Several adapters "
        "are added up, each computed from the original kernels.",
    )
    _add_writing(merge, "a merged checkpoint", "folder to write; it appears whole or not")
    merge.add_argument(
        "--adapter", action="append", required=True, metavar="DIR", help="adapter folder; may be repeated"
    )


def _add_to_lora(commands) -> None:
    lora = add_command(
        commands,
        "to-lora",
        _to_lora,
        "write an adapter as the LoRA that it is",
        "Write an adapter as a standard PEFT LoRA directory, which vLLM, SGLang, llama.cpp and PEFT serve on the same "
        "base: one rank, lora_alpha = r, no patterns. Nothing is approximated. Of the base, the adapted kernels alone "
        "are read.",
    )
    _add_writing(lora, "an adapter", "folder to write")
    lora.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    lora.add_argument(
        "--for",
        dest="engine",
        choices=ENGINES,
        help="check the rules of this engine first, and print how it loads the adapter (default: write what all of "
        "them read, and print which of them serve it)",
    )


def _add_verify(commands) -> None:
    verify = add_command(
        commands,
        "verify",
        _verify,
        "compare a base with an adapter to what was exported from it",
        "Run BASE with the adapter, and OTHER, on the same random input in float32, and compare their logits. Prints "
        "pass and exits with 0 where the largest difference is within the tolerance, else fail and 1; 2 where they "
        "cannot be compared.",
    )
    verify.set_defaults(trouble=2)
    verify.add_argument("base", metavar="BASE", help="folder of the base checkpoint, or hub name")
    verify.add_argument("other", metavar="OTHER", help="folder of a merged checkpoint, or of another adapter of BASE")
    verify.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    verify.add_argument("--seed", type=int, default=0, help="of the random input (default: %(default)s)")
    by_dtype = ", ".join(f"{value:g} for {dtype}" for dtype, value in TOLERANCES.items())
    verify.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="SHARE",
        help="largest difference allowed, as a share of the largest logit (default: by the coarsest dtype in which "
        f"OTHER was computed or is stored: {by_dtype})",
    )


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def _merge(args: argparse.Namespace) -> None:
    for adapter in args.adapter:
        check_adapter(adapter)
    merge_folders(args.base, args.adapter, args.out, **_writing(args, "merging"))
    print(f"{args.out}: {args.base} with {' + '.join(args.adapter)} merged in")


def _to_lora(args: argparse.Namespace) -> None:
    check_adapter(args.adapter)
    to_lora_folder(args.adapter, args.base, args.out, engine=args.engine, **_writing(args, "converting"))
    written = peft_folder.read(args.out)
    rank = vars(written.config)["r"]
    model_type = model_type_of(local_folder(args.base))
    print(f"{args.out}: LoRA of rank {rank}, lora_alpha = {rank}, of {args.base}")
    lora = Exported(tuple(written.thetas), rank, tuple(written.saved), model_type)
    for name in ENGINES if args.engine is None else [args.engine]:
        for line in _told(ENGINES[name], lora, args):
            print(f"{name + ':':<11}{line}" if args.engine is None else line)


def _told(engine: Engine, lora: Exported, args: argparse.Namespace) -> list[str]:
    """How an engine loads what was written, or why it does not."""
    if reason := refusal(engine, lora):
        return [f"{reason}: merge for it"]
    if is_known(engine, lora):
        return engine.lines(args.base, str(args.out), lora.rank)
    unknown = f"# on which modules of a {lora.model_type} it serves a LoRA is not known here"
    return [unknown, *engine.lines(args.base, str(args.out), lora.rank)]


def _verify(args: argparse.Namespace) -> int:
    check_adapter(args.adapter)
    if Path(args.other).is_dir() and not (Path(args.other) / "config.json").is_file():
        check_adapter(args.other, "OTHER, where it is not a merged checkpoint,")
    found = compare(args.base, args.other, args.adapter, seed=args.seed)
    tolerance = found.tolerance if args.tolerance is None else args.tolerance
    passed = found.within(tolerance)
    if found.broken:
        print(f"fail: logits of {' and of '.join(found.broken)} are not finite (NaN or infinity), of {found.shape}")
    else:
        given = f"for {found.dtype}" if args.tolerance is None else "as given"
        print(
            f"{'pass' if passed else 'fail'}: largest logit difference {found.largest:.3g}, of logits up to "
            f"{found.scale:.3g}: {found.relative:.2g} (tolerance {tolerance:g}, {given}; logits of shape {found.shape})"
        )
    return 0 if passed else 1


def _track(names: list[str], description: str) -> Iterator[str]:
    """The names, with a bar on stderr that says which is at work."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=PipeConsole(stderr=True)) as progress:
        task = progress.add_task(description, total=len(names))
        for name in names:
            progress.update(task, description=f"{description} {name}")
            yield name
            progress.advance(task)
        progress.update(task, description=description)
