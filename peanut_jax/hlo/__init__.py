"""What a compiled program costs on one device, read from its HLO text: collectives and the FLOPs of its products.

`compiled.as_text()` is the program that every device runs (SPMD), so all numbers are one device's. The call graph is
walked from ENTRY and what is inside a loop counts as often as the loop turns; XLA's `cost_analysis` counts it once.
Every branch of a conditional counts once.
"""

from peanut_jax.hlo.flops import dot_flops
from peanut_jax.hlo.program import Execution, Instruction, Loop, computations, dims, executions
from peanut_jax.hlo.traffic import COLLECTIVES, Collective, collectives

__all__ = [
    "COLLECTIVES",
    "Collective",
    "Execution",
    "Instruction",
    "Loop",
    "collectives",
    "computations",
    "dims",
    "dot_flops",
    "executions",
]
