"""What the parent process knows and a section needs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.accelerator.sizes import SIZES, Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Passed to each section's process.

    Attributes:
        chosen: What is measured. The environment's section is told None where it is to choose by the device.
        folder: For files; of the run, and emptied by the section that fills it.
        peak_tflops: Best measured matrix product, None where it is not known.
        remat: Policy that fitted each step, by its name, from an earlier section.
        done: Cases that are measured already.
    """

    chosen: Sizes | None
    folder: Path
    peak_tflops: float | None = None
    remat: dict[str, str] = dataclasses.field(default_factory=dict)
    done: frozenset[str] = frozenset()

    @property
    def sizes(self) -> Sizes:
        assert self.chosen is not None
        return self.chosen

    def dumps(self) -> str:
        name = None if self.chosen is None else self.chosen.name
        known = {"sizes": name, "folder": str(self.folder), "done": sorted(self.done)}
        return json.dumps({**known, "peak_tflops": self.peak_tflops, "remat": self.remat})


def loads(text: str) -> Context:
    """The inverse of `Context.dumps`."""
    known: dict[str, Any] = json.loads(text)
    return Context(
        chosen=None if known["sizes"] is None else SIZES[known["sizes"]],
        folder=Path(known["folder"]),
        peak_tflops=known["peak_tflops"],
        remat=known["remat"],
        done=frozenset(known["done"]),
    )
