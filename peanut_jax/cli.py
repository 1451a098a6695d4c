"""The `peanut-jax` command."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from peanut_jax.adapters import init
from peanut_jax.config import ALL_LINEAR, PeanutConfig
from peanut_jax.kernels import flatten
from peanut_jax.models import hf


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 1 after one line on stderr for a user's error."""
    # transformers announces on every use that its Flax classes end with version 5, which pyproject.toml knows.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"peanut-jax: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peanut-jax", description="PEANuT adapters for Flax models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="show what a config would adapt in a model",
        description="Show which kernels a config would adapt in a model: paths, shapes, parameters. Reads config.json "
        "alone, so no weights are needed.",
    )
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("model", help="folder with config.json, or hub name")
    inspect.add_argument(
        "--task",
        choices=sorted(hf.TASKS),
        metavar="TASK",
        help=f"head of the model (default: the checkpoint's own): {', '.join(sorted(hf.TASKS))}",
    )
    inspect.add_argument("--config", type=Path, metavar="FILE", help="an adapter_config.json to start from")
    fields = inspect.add_argument_group("config fields", "as in PeanutConfig")
    fields.add_argument("--r", type=int)
    fields.add_argument("--depth", type=int)
    fields.add_argument("--orientation", choices=("output", "input"))
    fields.add_argument("--target-modules", nargs="+", metavar="NAME", help=f"names, or {ALL_LINEAR}")
    fields.add_argument("--target-regex", metavar="REGEX", help="target_modules as a regular expression")
    fields.add_argument("--exclude-modules", nargs="+", metavar="NAME")
    fields.add_argument("--modules-to-save", nargs="+", metavar="NAME")
    fields.add_argument("--layers-to-transform", nargs="+", type=int, metavar="LAYER")
    fields.add_argument("--task-type", help="HF PEFT's, such as SEQ_CLS: its head is saved too")
    return parser


def _config(args: argparse.Namespace) -> PeanutConfig:
    names = ("r", "depth", "orientation", "target_modules", "exclude_modules", "modules_to_save")
    fields = _config_file(args.config) if args.config else {}
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
    return PeanutConfig(**fields)


def _config_file(path: Path) -> dict:
    """The fields of an `adapter_config.json` that PeanutConfig has; those of HF PEFT's bookkeeping are left out."""
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "PEANUT":
        found = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{path} must hold a PEANuT config (peft_type 'PEANUT'), found {found!r}")
    return {name: fields[name] for name in PeanutConfig.__dataclass_fields__ if name in fields}


def _inspect(args: argparse.Namespace) -> None:
    import jax

    config = _config(args)
    model_type, shapes = hf.shapes(args.model, args.task)
    flat = flatten(shapes)
    adapters = jax.eval_shape(lambda params: init(jax.random.key(0), params, config), shapes)
    total = sum(leaf.size for leaf in flat.values())
    table = Table("kernel", "shape", "parameters", "share of the model", title=f"{model_type}: {args.model}")
    for column in table.columns[1:]:
        column.justify = "right"
    trained = 0
    for path, value in adapters.items():
        size = sum(leaf.size for leaf in jax.tree.leaves(value))
        trained += size
        table.add_row(
            path if isinstance(value, dict) else f"{path} (saved)",
            " x ".join(map(str, flat[path].shape)),
            f"{size:,}",
            f"{size / total:.4%}",
        )
    table.add_section()
    table.add_row(f"{len(adapters)} rows", f"{total:,} in the model", f"{trained:,}", f"{trained / total:.4%}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
