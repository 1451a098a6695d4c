"""peanut-jax inspect: what a config would adapt, or what an adapter folder holds."""

import argparse

import jax

from peanut_jax.adapters import init
from peanut_jax.base.kernels import flatten
from peanut_jax.cli.arguments import add_command, add_config, config_from
from peanut_jax.cli.folders import check_adapter, is_adapter
from peanut_jax.cli.tables import path_table, print_table
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
    if is_adapter(args.model):
        check_adapter(args.model, "inspect")
        return _inspect_adapter(args.model)
    config = config_from(args)
    model_type, shapes = _shapes(args.model, args.task)
    flat = flatten(shapes)
    adapters = jax.eval_shape(lambda params: init(jax.random.key(0), params, config), shapes)
    total = sum(leaf.size for leaf in flat.values())
    parts = {**adapters.theta, **{path: [leaf] for path, leaf in adapters.saved.items()}}
    sizes = {path: sum(leaf.size for leaf in jax.tree.leaves(part)) for path, part in parts.items()}
    rows = [
        (
            path if path in adapters.theta else f"{path} (saved)",
            " x ".join(map(str, flat[path].shape)),
            f"{size:,}",
            f"{size / total:.4%}",
        )
        for path, size in sizes.items()
    ]
    trained = sum(sizes.values())
    last = (f"{len(rows)} rows", f"{total:,} in the model", f"{trained:,}", f"{trained / total:.4%}")
    headers = ("kernel", "shape", "parameters", "share of the model")
    print_table(path_table(headers, rows, last, f"{model_type}: {args.model}"))


def _shapes(source: str, task: str | None) -> tuple[str, dict]:
    """The model type and parameter shapes: the decoder's for the checkpoints that it runs, else transformers'."""
    if task is None and decoder_config.runs(source):
        return decoder_shapes(source)
    return hf.shapes(source, task)


def _inspect_adapter(folder: str) -> None:
    adapter = peft_folder.read(folder)
    peft_type = peft_folder.type_of(adapter.config).name
    sizes = {module: sum(leaf.size for leaf in theta.values()) for module, theta in adapter.thetas.items()}
    rows = [(module, f"{size:,}", adapter.fingerprint.get(module, "none")) for module, size in sizes.items()]
    rows += [(f"{name} (saved)", f"{array.size:,}", "") for name, array in adapter.saved.items()]
    total = sum(sizes.values()) + sum(array.size for array in adapter.saved.values())
    last = (f"{len(sizes)} modules, {len(adapter.saved)} saved tensors", f"{total:,}", "")
    headers = ("module", "parameters", "base fingerprint")
    print_table(path_table(headers, rows, last, f"{peft_type}: {folder}"))
    fields = {name: value for name, value in vars(adapter.config).items() if value is not None}
    print(", ".join(f"{name}={value!r}" for name, value in fields.items()))
