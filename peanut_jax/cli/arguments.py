"""What the commands' arguments share."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from peanut_jax.files.untrusted import read_json
from peanut_jax.interop import peft_folder
from peanut_jax.methods.base import ALL_LINEAR, Method
from peanut_jax.methods.peanut import PeanutConfig


def add_command(commands, name, run, summary, description) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=description)
    command.set_defaults(run=run)
    return command


def add_config(command: argparse.ArgumentParser) -> None:
    """The arguments from which `config_from` makes a PEANuT, or changes the method that a file holds."""
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


def config_from(args: argparse.Namespace) -> Method:
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
