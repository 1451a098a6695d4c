"""TPU slices by the names that they are sold under, as devices that programs can be compiled for without having them.

The compiler is libtpu's own, so that what it says of memory holds on the chip.

References:
    cloud.google.com/tpu/docs: v4, v5e, v5p and v6e, "configurations". The number in a name counts chips for v5e and
    v6e, and TensorCores, two a chip, for v4 and v5p.
"""

import difflib
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from peanut_jax.messages import one_line, short

# Generation -> (TensorCores a chip that its names count, axes of its torus, chips of its largest slice).
_GENERATIONS = {"v4": (2, 3, 4096), "v5e": (1, 2, 256), "v5p": (2, 3, 4096), "v6e": (1, 2, 256)}
# By default libtpu makes a device of each of a v4's TensorCores; a program that runs there sees one a chip.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server which machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at a time, as none of them has a chip
    "TPU_WORKER_HOSTNAMES": "localhost",  # without these two libtpu prints that it does not know the machine
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


def slice_names() -> list[str]:
    """Every slice that can be named, as sold: "v5e-16", "v5p-8", ..."""
    return [
        f"{generation}-{chips * cores}"
        for generation, (cores, axes, largest) in _GENERATIONS.items()
        for chips in _sizes(axes, largest)
    ]


def parse_slice(name: str) -> tuple[str, int]:
    """(generation, number of chips) of a slice's name, such as ("v5p", 4) of "v5p-8".

    Raises:
        ValueError: a name that is not one of `slice_names()`, with those that are close.
    """
    plain = name.strip().lower().replace("v5litepod", "v5e") if isinstance(name, str) else ""
    known = slice_names()
    if plain not in known:
        generation = plain.partition("-")[0]
        near = [one for one in known if one.startswith(f"{generation}-")] or difflib.get_close_matches(plain, known)
        near = near or [f"{one}-{4 * cores}" for one, (cores, _, _) in _GENERATIONS.items()]
        raise ValueError(f"{short(name)} is not a TPU slice: such as {', '.join(near)}")
    generation, _, count = plain.partition("-")
    return generation, int(count) // _GENERATIONS[generation][0]


def slice_devices(name: str) -> list[Any]:
    """The chips of a slice, for a `jax.sharding.Mesh`: programs compile for them, and nothing runs.

    Raises:
        ValueError: as `parse_slice`.
        ImportError: libtpu is not installed.
        NotImplementedError: a libtpu that does not make the slice.

    Examples:
        >>> from peanut_jax.topologies import slice_devices
        >>> mesh = jax.sharding.Mesh(slice_devices("v5e-4"), ("data",))
        >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data")))
        >>> compiled = jax.jit(jnp.sin).lower(x).compile()
    """
    generation, chips = parse_slice(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for a TPU needs libtpu, its compiler: pip install 'peanut-jax[plan]'")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    grid = "x".join(map(str, _grid(chips, _GENERATIONS[generation][1])))
    try:
        found = topologies.get_topology_desc(f"{generation}:{grid}", platform="tpu", **_OPTIONS.get(generation, {}))
    except jax.errors.JaxRuntimeError as error:
        raise NotImplementedError(
            f"libtpu does not make the slice {name} ({generation}:{grid}): {one_line(error)}"
        ) from error
    return list(found.devices)


def _sizes(axes: int, largest: int) -> Iterator[int]:
    """Numbers of chips of the slices: 1, 4 and so on by doubling; a flat torus has no other sizes either."""
    yield 1
    size = 4
    while size <= largest:
        yield size
        size *= 2


def _grid(chips: int, axes: int) -> tuple[int, ...]:
    """How so many chips lie, the shortest axis doubled again and again: 2x2x1 (a host's four), 2x2x2, 2x2x4, 2x4x4."""
    sides = [1] * axes if chips == 1 else [2, 2, 1][:axes]
    while math.prod(sides) < chips:
        sides[sides.index(min(sides))] *= 2
    return tuple(sides) if chips <= 4 else tuple(sorted(sides))
