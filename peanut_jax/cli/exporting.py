"""peanut-jax merge, to-lora and verify: an adapter and its base, on folders."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from peanut_jax.cli.arguments import add_command
from peanut_jax.interop import peft_folder
from peanut_jax.interop.lora import to_lora_folder
from peanut_jax.interop.merged import merge_folders
from peanut_jax.interop.verify import compare


def _add_writing(command: argparse.ArgumentParser, replaced: str, out: str) -> None:
    """The arguments of a command that writes a folder from a base."""
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
        "Write an adapter as a standard PEFT LoRA directory, which vLLM, llama.cpp and PEFT serve on the same base. "
        "Nothing is approximated. Of the base, the adapted kernels alone are read.",
    )
    _add_writing(lora, "an adapter", "folder to write")
    lora.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")


def _add_verify(commands) -> None:
    verify = add_command(
        commands,
        "verify",
        _verify,
        "compare a base with an adapter to what was exported from it",
        "Run BASE with the adapter, and OTHER, on the same random input in float32, and print the largest difference "
        "of their logits. Exits with 1 if it is above the tolerance.",
    )
    verify.add_argument("base", metavar="BASE", help="folder of the base checkpoint, or hub name")
    verify.add_argument("other", metavar="OTHER", help="folder of a merged checkpoint, or of another adapter of BASE")
    verify.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    verify.add_argument("--seed", type=int, default=0, help="of the random input (default: %(default)s)")
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference allowed, as a share of the largest logit (default: %(default)s, for float32 files; a "
        "merged bfloat16 checkpoint is rounded to 8 bits: 0.02)",
    )


def _merge(args: argparse.Namespace) -> None:
    merge_folders(args.base, args.adapter, args.out, **_writing(args, "merging"))
    print(f"{args.out}: {args.base} with {' + '.join(args.adapter)} merged in")


def _to_lora(args: argparse.Namespace) -> None:
    to_lora_folder(args.adapter, args.base, args.out, **_writing(args, "converting"))
    fields = vars(peft_folder.read(args.out).config)
    print(f"{args.out}: LoRA of rank {fields['r']}, lora_alpha = {fields['r'] * fields['scaling']:g}, of {args.base}")


def _verify(args: argparse.Namespace) -> int:
    found = compare(args.base, args.other, args.adapter, seed=args.seed)
    print(
        f"largest logit difference {found.largest:.3g}, of logits up to {found.scale:.3g}: {found.relative:.2g} "
        f"(tolerance {args.tolerance:g}; logits of shape {found.shape})"
    )
    # "not <=" also catches a NaN.
    return 0 if found.relative <= args.tolerance else 1


def _track(names: list[str], description: str) -> Iterator[str]:
    """The names, with a bar on stderr that says which is at work."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=len(names))
        for name in names:
            progress.update(task, description=f"{description} {name}")
            yield name
            progress.advance(task)
        progress.update(task, description=description)
