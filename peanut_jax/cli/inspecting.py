"""peanut-jax inspect: what a config would adapt, or what an adapter folder holds."""

import argparse
from pathlib import Path

import jax

from peanut_jax.adapters import init
from peanut_jax.base.kernels import flatten
from peanut_jax.cli.arguments import add_command, add_config, config_from
from peanut_jax.cli.tables import make_table, print_table
from peanut_jax.interop import peft_folder
from peanut_jax.models import decoder_config, hf
from peanut_jax.models.loading import decoder_shapes


def add_inspect(commands) -> None:
    inspect = add_command(
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
    add_config(inspect)


def _inspect(args: argparse.Namespace) -> None:
    folder = Path(args.model)
    if (folder / peft_folder.CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        return _inspect_adapter(args.model)
    config = config_from(args)
    model_type, shapes = _shapes(args.model, args.task)
    flat = flatten(shapes)
    adapters = jax.eval_shape(lambda params: init(jax.random.key(0), params, config), shapes)
    total = sum(leaf.size for leaf in flat.values())
    table = make_table("kernel", "shape", "parameters", "share of the model", title=f"{model_type}: {args.model}")
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
    print_table(table)


def _shapes(source: str, task: str | None) -> tuple[str, dict]:
    """The model type and parameter shapes: the decoder's for the checkpoints that it runs, else transformers'."""
    if task is None and decoder_config.runs(source):
        return decoder_shapes(source)
    return hf.shapes(source, task)


def _inspect_adapter(folder: str) -> None:
    adapter = peft_folder.read(folder)
    peft_type = peft_folder.type_of(adapter.config).name
    table = make_table("module", "parameters", "base fingerprint", title=f"{peft_type}: {folder}")
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
    print_table(table)
    fields = {name: value for name, value in vars(adapter.config).items() if value is not None}
    print(", ".join(f"{name}={value!r}" for name, value in fields.items()))
