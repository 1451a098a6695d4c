"""Plans as tables, and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from peanut_jax.cli.tables import in_bytes, in_flops, in_seconds, make_table
from peanut_jax.plan import CHIPS, Plan, Proposal, Setting


def plan_table(setting: Setting, found: Plan, chips: Sequence[str], title: str) -> Table:
    """One plan, a row a figure."""
    table = make_table("a device", "", title=title)
    held = [
        ("parameters", found.params),
        ("adapters and optimizer", found.state),
        ("batch", found.batch),
        ("activations and other temporaries", found.temporary),
        ("program, padding and outputs", found.other),
        ("total", found.total),
    ]
    for name, value in held:
        if value or name != held[-2][0]:
            table.add_row(name, in_bytes(value))
    table.add_section()
    table.add_row("remat", setting.config.remat)
    table.add_row("FLOPs a step", in_flops(found.flops))
    for kind, moved in sorted(found.traffic().items()):
        table.add_row(f"{kind} a step", in_bytes(moved))
    table.add_section()
    for name in chips:
        chip = CHIPS[name]
        seconds = found.seconds(chip)
        fits = "fits" if found.total <= chip.memory else f"does NOT fit {chip.memory / 1e9:,.0f} GB"
        rate = setting.batch_size * setting.seq_len / seconds
        table.add_row(f"{name} (estimate)", f"{fits}; {in_seconds(seconds)}, {rate:,.0f} tokens/s")
    return table


def proposals_table(found: Sequence[Proposal], title: str) -> Table:
    """Proposals, a row each."""
    table = make_table(
        "mesh", "rows a device", "microbatches", "rows", "remat", "bytes a device", "left", "tokens/s (estimate)",
        title=title,
    )  # fmt: skip
    for one in found:
        table.add_row(
            ",".join(f"{name}={size}" for name, size in one.mesh.items()),
            str(one.rows),
            str(one.setting.accumulate_steps),
            str(one.setting.batch_size),
            one.setting.config.remat,
            in_bytes(one.plan.total),
            f"{one.left:.0%}",
            f"{one.tokens_per_second:,.0f}",
        )
    return table


def as_json(setting: Setting, mesh: Mapping[str, int], found: Plan, chips: Sequence[str]) -> dict[str, Any]:
    """A plan as JSON's types: bytes and FLOPs of one device, and seconds by chip."""
    estimates = {
        name: {
            "memory": CHIPS[name].memory,
            "fits": found.total <= CHIPS[name].memory,
            "seconds": found.seconds(CHIPS[name]),
            "tokens_per_second": setting.batch_size * setting.seq_len / found.seconds(CHIPS[name]),
        }
        for name in chips
    }
    return {
        "mesh": dict(mesh),
        "batch": setting.batch_size,
        "seq": setting.seq_len,
        "accumulate": setting.accumulate_steps,
        "dtype": setting.dtype,
        "remat": setting.config.remat,
        "bytes": {
            "parameters": found.params, "state": found.state, "batch": found.batch, "temporary": found.temporary,
            "other": found.other, "total": found.total,
        },
        "flops": found.flops,
        "collectives": found.traffic(),
        "trainable": found.trainable,
        "estimates": estimates,
        "notes": list(found.notes),
    }  # fmt: skip
