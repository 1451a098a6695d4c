"""The `peanut-jax` command."""

import argparse
import dataclasses
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from peanut_jax.adapters import init
from peanut_jax.base.kernels import flatten
from peanut_jax.files.hub import read_json
from peanut_jax.interop import peft_folder
from peanut_jax.interop.lora import to_lora_folder
from peanut_jax.interop.merged import merge_folders
from peanut_jax.interop.verify import compare
from peanut_jax.methods.base import ALL_LINEAR, Method
from peanut_jax.methods.peanut import PeanutConfig
from peanut_jax.models import decoder_config, hf
from peanut_jax.models.loading import decoder_shapes
from peanut_jax.plan import CHIPS, COMPUTE_SHARE, LINK_SHARE, plan
from peanut_jax.sharding import make_mesh, mesh_sizes
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
    _add_inspect(commands)
    _add_plan(commands)
    training.add_arguments(
        _command(
            commands,
            "train",
            training.run,
            "train an adapter from a config file",
            "Train what a config file says into a folder: adapters, checkpoints to resume from, metrics and curves. "
            "Needs peanut-jax[train].",
        )
    )

    merge = _command(
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

    lora = _command(
        commands,
        "to-lora",
        _to_lora,
        "write an adapter as the LoRA that it is",
        "Write an adapter as a standard PEFT LoRA directory, which vLLM, llama.cpp and PEFT serve on the same base. "
        "Nothing is approximated. Of the base, the adapted kernels alone are read.",
    )
    _add_writing(lora, "an adapter", "folder to write")
    lora.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")

    verify = _command(
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
    return parser


def _command(commands, name, run, summary, description) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=description)
    command.set_defaults(run=run)
    return command


def _add_inspect(commands) -> None:
    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "show what a config would adapt in a model, or what an adapter folder holds",
        "Show which kernels a config would adapt in a model: paths, shapes, parameters. Reads config.json alone, so no "
        "weights are needed. Of an adapter folder, show the modules and fields that it holds.",
    )
    inspect.add_argument("model", help="folder with config.json, hub name, or adapter folder")
    inspect.add_argument(
        "--task",
        choices=sorted(hf.TASKS),
        metavar="TASK",
        help=f"head of the model (default: the checkpoint's own): {', '.join(sorted(hf.TASKS))}",
    )
    _add_config(inspect)


def _add_config(command: argparse.ArgumentParser) -> None:
    """The arguments from which `_config` makes a PEANuT, or changes the method that a file holds."""
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="an adapter_config.json to start from, of any method (default: a PEANuT)",
    )
    fields = command.add_argument_group("config fields", "as in the method's config")
    fields.add_argument("--r", "--rank", type=int)
    fields.add_argument("--depth", type=int)
    fields.add_argument("--orientation", choices=("output", "input"))
    fields.add_argument("--target-modules", nargs="+", metavar="NAME", help=f"names, or {ALL_LINEAR}")
    fields.add_argument("--target-regex", metavar="REGEX", help="target_modules as a regular expression")
    fields.add_argument("--exclude-modules", nargs="+", metavar="NAME")
    fields.add_argument("--modules-to-save", nargs="+", metavar="NAME")
    fields.add_argument("--layers-to-transform", nargs="+", type=int, metavar="LAYER")
    fields.add_argument("--task-type", help="HF PEFT's, such as SEQ_CLS: its head is saved too")


def _add_plan(commands) -> None:
    plan = _command(
        commands,
        "plan",
        _plan,
        "show what a train step takes on a mesh, without the mesh and without weights",
        "Compile the train step of a Llama, Mistral or Qwen model for as many fake devices as the mesh has, and show "
        "bytes, FLOPs and collectives of one of them. Bytes and FLOPs are the compiler's, the time is an estimate.",
    )
    plan.add_argument("--config-json", required=True, metavar="DIR_OR_FILE", help="config.json, its folder or hub name")
    plan.add_argument("--mesh", required=True, metavar="SIZES", help="such as data=4,fsdp=16,tensor=4")
    plan.add_argument("--batch", type=int, required=True, metavar="ROWS", help="rows of a step, over all devices")
    plan.add_argument("--seq", type=int, required=True, metavar="TOKENS", help="tokens of a row")
    plan.add_argument("--accumulate", type=int, default=1, metavar="N", help="microbatches of a step")
    plan.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of base and activations")
    plan.add_argument("--remat", choices=decoder_config.REMAT_POLICIES, default="full")
    plan.add_argument("--chip", choices=sorted(CHIPS), action="append", help="of the estimate (default: all)")
    _add_config(plan)


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


def _show_notes() -> None:
    """The library's warnings, one line each on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("peanut-jax: note: %(message)s"))
    logging.getLogger("peanut_jax").handlers = [handler]


def _inspect(args: argparse.Namespace) -> None:
    folder = Path(args.model)
    if (folder / peft_folder.CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        return _inspect_adapter(args.model)
    config = _config(args)
    model_type, shapes = _shapes(args.model, args.task)
    flat = flatten(shapes)
    adapters = jax.eval_shape(lambda params: init(jax.random.key(0), params, config), shapes)
    total = sum(leaf.size for leaf in flat.values())
    table = _table("kernel", "shape", "parameters", "share of the model", title=f"{model_type}: {args.model}")
    trained = 0
    parts = {**adapters.theta, **{path: [leaf] for path, leaf in adapters.saved.items()}}
    for path, part in parts.items():
        size = sum(leaf.size for leaf in jax.tree.leaves(part))
        trained += size
        table.add_row(
            path if path in adapters.theta else f"{path} (saved)",
            " x ".join(map(str, flat[path].shape)),
            f"{size:,}",
            f"{size / total:.4%}",
        )
    table.add_section()
    table.add_row(f"{len(parts)} rows", f"{total:,} in the model", f"{trained:,}", f"{trained / total:.4%}")
    _print(table)


def _plan(args: argparse.Namespace) -> None:
    model = decoder_config.read_config(args.config_json, remat=args.remat)
    config = _config(args)
    _fake_devices(args.mesh)
    mesh = make_mesh(args.mesh)
    found = plan(
        model, mesh, config, batch_size=args.batch, seq_len=args.seq, dtype=args.dtype, accumulate_steps=args.accumulate
    )
    table = _table("a device", "", title=f"{model.model_type}: {args.config_json} on {mesh.size} devices ({args.mesh})")
    for name, value in (
        ("parameters", found.params),
        ("adapters and optimizer", found.state),
        ("batch", found.batch),
        ("activations and other temporaries", found.temporary),
        ("total", found.total),
    ):
        table.add_row(name, f"{value / 1e9:,.3f} GB")
    table.add_section()
    table.add_row("FLOPs a step", f"{found.flops / 1e12:,.2f} T")
    for kind, moved in sorted(found.traffic().items()):
        table.add_row(f"{kind} a step", f"{moved / 1e9:,.3f} GB")
    table.add_section()
    tokens = args.batch * args.seq
    for name in args.chip or CHIPS:
        chip = CHIPS[name]
        seconds = found.seconds(chip)
        fits = "fits" if found.total <= chip.memory else f"does NOT fit {chip.memory / 1e9:,.0f} GB"
        table.add_row(f"{name} (estimate)", f"{fits}; {seconds:,.2f} s, {tokens / seconds:,.0f} tokens/s")
    _print(table)
    print(
        f"{found.trainable:,} trainable parameters. Estimates: {COMPUTE_SHARE:.0%} of the chip's peak FLOP/s, then "
        f"collectives at {LINK_SHARE:.0%} of its links, not overlapped."
    )


def _fake_devices(sizes: str) -> None:
    """As many CPU devices as the mesh has.

    Raises:
        ValueError: a mesh with an open axis; a process in which JAX has looked at its devices, which then stay.
    """
    count = math.prod(mesh_sizes(sizes).values())
    if count < 1:
        raise ValueError(f"--mesh {sizes!r}: give the size of every axis; there are no devices to fill -1 from")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.device_count() != count:
            raise ValueError(f"this process has {jax.device_count()} devices already: {error}") from error


def _shapes(source: str, task: str | None) -> tuple[str, dict]:
    """The model type and parameter shapes: the decoder's for the checkpoints that it runs, else transformers'."""
    if task is None and decoder_config.runs(source):
        return decoder_shapes(source)
    return hf.shapes(source, task)


def _inspect_adapter(folder: str) -> None:
    adapter = peft_folder.read(folder)
    peft_type = peft_folder.type_of(adapter.config).name
    table = _table("module", "parameters", "base fingerprint", title=f"{peft_type}: {folder}")
    total = 0
    for module, theta in adapter.thetas.items():
        size = sum(leaf.size for leaf in theta.values())
        total += size
        table.add_row(module, f"{size:,}", adapter.fingerprint.get(module, "none"))
    for name, array in adapter.saved.items():
        total += array.size
        table.add_row(f"{name} (saved)", f"{array.size:,}", "")
    table.add_section()
    table.add_row(f"{len(adapter.thetas)} modules, {len(adapter.saved)} saved tensors", f"{total:,}", "")
    _print(table)
    fields = {name: value for name, value in vars(adapter.config).items() if value is not None}
    print(", ".join(f"{name}={value!r}" for name, value in fields.items()))


def _table(*columns: str, title: str) -> Table:
    table = Table(*columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _config(args: argparse.Namespace) -> Method:
    names = ("r", "depth", "orientation", "target_modules", "exclude_modules", "modules_to_save")
    fields: dict[str, Any] = {}
    for name in (*names, "layers_to_transform", "task_type"):
        value = getattr(args, name)
        if value is not None:
            fields[name] = value
    if args.target_modules and args.target_regex:
        raise ValueError("give --target-modules or --target-regex, not both")
    if args.target_regex:
        fields["target_modules"] = args.target_regex
    elif args.target_modules == [ALL_LINEAR]:
        fields["target_modules"] = ALL_LINEAR
    if args.config is None:
        return PeanutConfig(**fields)
    start = peft_folder.config_of(read_json(args.config))
    if foreign := sorted(fields.keys() - vars(start).keys()):
        raise ValueError(f"{args.config} holds a {type(start).__name__}, which has no {foreign[0]}")
    return dataclasses.replace(start, **fields)
