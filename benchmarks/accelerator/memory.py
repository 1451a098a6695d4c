"""Whether a compiled program fits the device, from what the compiler says."""

from collections.abc import Mapping
from typing import Any

import jax

from benchmarks.accelerator.record import DoesNotFit

GIB = 1 << 30


def device_bytes() -> int | None:
    """Memory that jax may take of the first device; None where the backend does not say, as on CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def program_bytes(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program's temporaries, and of all that it needs at a time; empty where it does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    own = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {"temp_bytes": analysis.temp_size_in_bytes, "program_bytes": own + analysis.temp_size_in_bytes}


def check_fits(program: Mapping[str, int], limit: int | None) -> None:
    """
    Raises:
        DoesNotFit: before anything is allocated.
    """
    needed = program.get("program_bytes")
    if limit is not None and needed is not None and needed > limit:
        raise DoesNotFit(f"the program needs {needed / GIB:.1f} GiB, and the device gives {limit / GIB:.1f} GiB")
