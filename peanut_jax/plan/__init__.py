"""What a train step will take on a mesh that is not there: the real step, compiled for devices that need not exist.

No weights are needed. Memory and traffic are the compiler's; only the time is an estimate. libtpu compiles a TPU's
program itself, in bfloat16, so that its memory is the chip's (`topologies.slice_devices` has such devices). XLA on CPU,
for everything else, computes in float32 what is bfloat16 and keeps copies for it, so that a bfloat16 step is compiled
as float32 and its temporary arrays and collectives are counted at half their bytes.
(Temporaries of Llama-3-70B's step on 64 TPU v5p, 64 rows of 2,048 tokens over fsdp=64 with remat="full": 8.99 GB a chip
by libtpu 0.0.51, 8.19 GB counted this way; with attention="xla", the same program in both, 9.68 GB and 9.62 GB, and for
smaller steps 5 to 11% above libtpu's. What is float32 in either, such as the logits, is counted too low.)
"""

from peanut_jax.plan.chips import CHIPS, COMPUTE_SHARE, LINK_SHARE, Chip, chip_name
from peanut_jax.plan.compiled import plan
from peanut_jax.plan.formulas import estimate
from peanut_jax.plan.memory import HEADROOM, device_memory, free_memory
from peanut_jax.plan.proposals import Proposal, search
from peanut_jax.plan.record import Plan
from peanut_jax.plan.remat import fitting_plan, fitting_remat
from peanut_jax.plan.step import DoesNotFit, Setting, device_bytes, held_bytes, program_of

__all__ = [
    "CHIPS",
    "COMPUTE_SHARE",
    "HEADROOM",
    "LINK_SHARE",
    "Chip",
    "DoesNotFit",
    "Plan",
    "Proposal",
    "Setting",
    "chip_name",
    "device_bytes",
    "device_memory",
    "estimate",
    "fitting_plan",
    "fitting_remat",
    "free_memory",
    "held_bytes",
    "plan",
    "program_of",
    "search",
]
