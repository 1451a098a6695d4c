"""peanut-jax plan: what a train step takes on a mesh that is not there, and which mesh to take."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax

from peanut_jax.cli.arguments import add_command, add_config, config_from
from peanut_jax.cli.plan_tables import as_json, plan_table, proposals_table
from peanut_jax.cli.tables import print_table
from peanut_jax.models import decoder_config
from peanut_jax.plan import CHIPS, COMPUTE_SHARE, HEADROOM, LINK_SHARE, DoesNotFit, Plan, Setting, chip_name
from peanut_jax.plan.compiled import planned
from peanut_jax.plan.proposals import Proposal, search
from peanut_jax.plan.remat import fitting_plan
from peanut_jax.sharding import make_mesh, mesh_sizes
from peanut_jax.topologies import parse_slice, slice_devices

# CPU devices that a process of JAX can have: XLA's CPU client numbers 1 << 11 of them.
MAX_DEVICES = 2048
AUTO = "auto"
_LIBTPU = "libtpu"


def add_plan(commands) -> None:
    plan = add_command(
        commands,
        "plan",
        _plan,
        "show what a train step takes on a mesh, or find one, without the mesh and without weights",
        "Compile the train step of a Llama, Mistral or Qwen model for devices that need not be there, and show bytes, "
        "FLOPs and collectives of one of them; with --search, find the meshes that train the fastest. Bytes and FLOPs "
        "are the compiler's, the time is an estimate.",
    )
    plan.add_argument("--config-json", required=True, metavar="DIR_OR_FILE", help="config.json, its folder or hub name")
    plan.add_argument("--mesh", metavar="SIZES", help=f"such as data=4,fsdp=16,tensor=4; at most {MAX_DEVICES} devices")
    plan.add_argument("--batch", type=int, metavar="ROWS", help="rows of a step, over all devices and microbatches")
    plan.add_argument("--seq", type=int, required=True, metavar="TOKENS", help="tokens of a row")
    plan.add_argument("--accumulate", type=int, metavar="N", help="microbatches of a step (default: 1)")
    plan.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of base and activations")
    plan.add_argument(
        "--remat", choices=(AUTO, *decoder_config.REMAT_POLICIES), default=AUTO,
        help="%(default)s: the one that recomputes the least of those that fit",
    )  # fmt: skip
    plan.add_argument(
        "--chip", action="append", default=[], metavar="NAME",
        help=f"for the estimate: {', '.join(CHIPS)} (default: all of them)",
    )  # fmt: skip
    plan.add_argument(
        "--slice", metavar="NAME", help="a TPU slice, such as v5e-16 or v5p-128: its chip and their number"
    )
    plan.add_argument(
        "--compiler", choices=("cpu", _LIBTPU), default="cpu",
        help="whose memory is shown: XLA's for CPU, or for a --slice the TPU's own, from peanut-jax[plan]; minutes for "
        "a large model",
    )  # fmt: skip
    plan.add_argument("--headroom", type=float, default=HEADROOM, metavar="PART", help="of the memory to leave free")
    plan.add_argument("--json", action="store_true", help="print JSON")
    found = plan.add_argument_group("search", "--search takes --slice, or one --chip and --count, in place of --mesh.")
    found.add_argument("--search", action="store_true", help="propose mesh, rows, remat and microbatches")
    found.add_argument("--count", type=int, metavar="N", help="chips")
    found.add_argument("--top", type=int, default=3, metavar="N", help="proposals (default: %(default)s)")
    add_config(plan)


def _plan(args: argparse.Namespace) -> None:
    chips = _chips(args)
    count = _search_count(args, chips) if args.search else _mesh_count(args)
    if args.compiler == _LIBTPU and args.slice is None:
        raise ValueError("--compiler libtpu compiles for a slice of TPUs: give --slice, such as v5e-16")
    if not 0 <= args.headroom < 1:
        raise ValueError(f"--headroom must be at least 0 and below 1, got {args.headroom}")
    model = decoder_config.read_config(args.config_json)
    setting = Setting(
        config=model, adapter=config_from(args), batch_size=args.batch or 1, seq_len=args.seq, dtype=args.dtype,
        accumulate_steps=1 if args.accumulate is None else args.accumulate,
    )  # fmt: skip
    _fake_devices(count)
    devices = slice_devices(args.slice) if args.compiler == _LIBTPU else jax.devices()
    where = f"{args.slice or f'{count} {chips[0]}'}" if args.search else f"{count} devices ({args.mesh})"
    title = f"{model.model_type}: {args.config_json} on {where}"
    if args.search:
        _show_search(args, _searched(args, setting, chips[0], devices), title)
    else:
        _show_plan(args, *_planned(args, setting, chips, devices), chips, title)


def _planned(
    args: argparse.Namespace, setting: Setting, chips: Sequence[str], devices: Sequence[Any]
) -> tuple[Setting, Plan]:
    """The plan of the mesh that was named; of the policies the first that fits each of the chips."""
    mesh = make_mesh(args.mesh, devices)
    if args.remat != AUTO:
        setting = _with_remat(setting, args.remat)
        return setting, planned(setting, mesh)
    memory = min(CHIPS[name].memory for name in chips)
    try:
        return fitting_plan(setting, mesh, memory=memory, headroom=args.headroom)
    except DoesNotFit:
        if args.compiler == _LIBTPU:
            raise
        setting = _with_remat(setting, decoder_config.REMAT_POLICIES[-1])
        return setting, planned(setting, mesh)


def _searched(args: argparse.Namespace, setting: Setting, chip: str, devices: Sequence[Any]) -> list[Proposal]:
    remats = decoder_config.REMAT_POLICIES if args.remat == AUTO else (args.remat,)
    return search(
        setting, CHIPS[chip], devices, batch_size=args.batch, remats=remats, headroom=args.headroom, top=args.top,
        tell=lambda line: print(f"plan: {line}", file=sys.stderr, flush=True),
    )  # fmt: skip


def _with_remat(setting: Setting, policy: str) -> Setting:
    return dataclasses.replace(setting, config=dataclasses.replace(setting.config, remat=policy))


def _show_plan(args: argparse.Namespace, setting: Setting, found: Plan, chips: Sequence[str], title: str) -> None:
    if args.json:
        print(json.dumps(as_json(setting, mesh_sizes(args.mesh), found, chips), indent=2))
        return
    print_table(plan_table(setting, found, chips, title))
    for note in found.notes:
        print(f"{note}.")
    print(f"{found.trainable:,} trainable parameters. {_estimates()}")


def _show_search(args: argparse.Namespace, found: Sequence[Proposal], title: str) -> None:
    if args.json:
        chip = _chips(args)[0]
        print(json.dumps([as_json(one.setting, one.mesh, one.plan, [chip]) for one in found], indent=2))
        return
    print_table(proposals_table(found, title))
    whose = "libtpu" if args.compiler == _LIBTPU else "XLA:CPU"
    print(f"Bytes are {whose}'s: each of these was compiled. {_estimates()}")


def _estimates() -> str:
    return (
        f"Time is an estimate: FLOPs at {COMPUTE_SHARE:.0%} of the chip's peak, then collectives at {LINK_SHARE:.0%} "
        "of its links, not overlapped."
    )


def _chips(args: argparse.Namespace) -> list[str]:
    """The chips that are meant, by their names in `CHIPS`."""
    if args.slice is None:
        return [chip_name(name) for name in args.chip] or list(CHIPS)
    if args.chip:
        raise ValueError(f"--slice {args.slice} says which chip: leave out --chip")
    return [parse_slice(args.slice)[0]]


def _search_count(args: argparse.Namespace, chips: Sequence[str]) -> int:
    """How many chips to search for."""
    for name in ("mesh", "accumulate"):
        if getattr(args, name) is not None:
            raise ValueError(f"--search finds the {name}: leave out --{name}, or --search")
    if args.top < 1 or (args.batch is not None and args.batch < 1):
        raise ValueError(f"--top and --batch must be at least 1, got {args.top} and {args.batch}")
    if args.slice is not None:
        count = parse_slice(args.slice)[1]
        if args.count not in (None, count):
            raise ValueError(f"--slice {args.slice} has {count} chips: leave out --count {args.count}")
        return _checked_count(count, f"--slice {args.slice}")
    if len(chips) != 1 or args.count is None:
        raise ValueError("--search needs to know for what: give --slice, or one --chip and --count")
    return _checked_count(args.count, f"--count {args.count}")


def _mesh_count(args: argparse.Namespace) -> int:
    """How many devices the mesh has.

    Raises:
        ValueError: a mesh with an open axis, with more devices than can be planned for, or other than its slice.
    """
    if args.mesh is None or args.batch is None:
        raise ValueError("give --mesh and --batch, or --search to find them")
    if args.count is not None:
        raise ValueError("--count is for --search: the mesh says how many chips there are")
    count = math.prod(mesh_sizes(args.mesh).values())
    if count < 1:
        raise ValueError(f"--mesh {args.mesh!r}: give the size of every axis; there are no devices to fill -1 from")
    if args.slice is not None and (chips := parse_slice(args.slice)[1]) != count:
        raise ValueError(f"--mesh {args.mesh!r} has {count:,} places and {args.slice} {chips:,} chips: make them equal")
    return _checked_count(count, f"--mesh {args.mesh!r}")


def _checked_count(count: int, said: str) -> int:
    if count < 1:
        raise ValueError(f"{said}: there must be at least 1")
    if count > MAX_DEVICES:
        raise ValueError(
            f"{said} has {count:,} devices and plan takes at most {MAX_DEVICES:,}: leave out some of the data axis; a "
            "device's share stays the same for as many rows a device"
        )
    return count


def _fake_devices(count: int) -> None:
    """So many CPU devices.

    Raises:
        ValueError: a process in which JAX has looked at its devices, which then stay.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.device_count() != count:
            raise ValueError(f"this process has {jax.device_count()} devices already: {error}") from error
