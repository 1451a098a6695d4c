"""peanut-jax plan: what a train step takes on a mesh that is not there."""

import argparse
import math

import jax

from peanut_jax.cli.arguments import add_command, add_config, config_from
from peanut_jax.cli.tables import in_bytes, in_flops, in_seconds, make_table, print_table
from peanut_jax.models import decoder_config
from peanut_jax.plan import CHIPS, COMPUTE_SHARE, LINK_SHARE, plan
from peanut_jax.sharding import make_mesh, mesh_sizes

# CPU devices that a process of JAX can have: XLA's CPU client numbers 1 << 11 of them.
MAX_DEVICES = 2048


def add_plan(commands) -> None:
    plan = add_command(
        commands,
        "plan",
        _plan,
        "show what a train step takes on a mesh, without the mesh and without weights",
        "Compile the train step of a Llama, Mistral or Qwen model for as many fake devices as the mesh has, and show "
        "bytes, FLOPs and collectives of one of them. Bytes and FLOPs are the compiler's, the time is an estimate.",
    )
    plan.add_argument("--config-json", required=True, metavar="DIR_OR_FILE", help="config.json, its folder or hub name")
    plan.add_argument(
        "--mesh", required=True, metavar="SIZES", help=f"such as data=4,fsdp=16,tensor=4; at most {MAX_DEVICES} devices"
    )
    plan.add_argument("--batch", type=int, required=True, metavar="ROWS", help="rows of a step, over all devices")
    plan.add_argument("--seq", type=int, required=True, metavar="TOKENS", help="tokens of a row")
    plan.add_argument("--accumulate", type=int, default=1, metavar="N", help="microbatches of a step")
    plan.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of base and activations")
    plan.add_argument("--remat", choices=decoder_config.REMAT_POLICIES, default="full")
    plan.add_argument("--chip", choices=sorted(CHIPS), action="append", help="of the estimate (default: all)")
    add_config(plan)


def _plan(args: argparse.Namespace) -> None:
    count = _device_count(args.mesh)
    model = decoder_config.read_config(args.config_json, remat=args.remat)
    config = config_from(args)
    _fake_devices(count)
    mesh = make_mesh(args.mesh)
    found = plan(
        model, mesh, config, batch_size=args.batch, seq_len=args.seq, dtype=args.dtype, accumulate_steps=args.accumulate
    )
    table = make_table(
        "a device", "", title=f"{model.model_type}: {args.config_json} on {mesh.size} devices ({args.mesh})"
    )
    for name, value in (
        ("parameters", found.params),
        ("adapters and optimizer", found.state),
        ("batch", found.batch),
        ("activations and other temporaries", found.temporary),
        ("total", found.total),
    ):
        table.add_row(name, in_bytes(value))
    table.add_section()
    table.add_row("FLOPs a step", in_flops(found.flops))
    for kind, moved in sorted(found.traffic().items()):
        table.add_row(f"{kind} a step", in_bytes(moved))
    table.add_section()
    tokens = args.batch * args.seq
    for name in args.chip or CHIPS:
        chip = CHIPS[name]
        seconds = found.seconds(chip)
        fits = "fits" if found.total <= chip.memory else f"does NOT fit {chip.memory / 1e9:,.0f} GB"
        table.add_row(f"{name} (estimate)", f"{fits}; {in_seconds(seconds)}, {tokens / seconds:,.0f} tokens/s")
    print_table(table)
    print(
        f"{found.trainable:,} trainable parameters. Estimates: {COMPUTE_SHARE:.0%} of the chip's peak FLOP/s, then "
        f"collectives at {LINK_SHARE:.0%} of its links, not overlapped."
    )


def _device_count(sizes: str) -> int:
    """How many devices a mesh has.

    Raises:
        ValueError: a mesh with an open axis, or with more devices than can be planned for.
    """
    count = math.prod(mesh_sizes(sizes).values())
    if count < 1:
        raise ValueError(f"--mesh {sizes!r}: give the size of every axis; there are no devices to fill -1 from")
    if count > MAX_DEVICES:
        raise ValueError(
            f"--mesh {sizes!r} has {count:,} devices and plan takes at most {MAX_DEVICES:,}: leave out some of the "
            "data axis; a device's share stays the same for as many rows a device"
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
