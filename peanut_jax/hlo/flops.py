"""The FLOPs of a compiled program's matrix products."""

import math
import re

from peanut_jax.hlo.program import QUOTED, Execution, dims, executions, ints

# cuBLAS calls carry a dot's dimension numbers in their backend_config.
GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")

_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions\\?":\[)([^\]}]*)')
_OPAQUE_PRODUCT = re.compile(
    r"gemm|matmul|dot|conv(?!ert)|dnn|fmha|attention|triton|mosaic|tpu_custom_call", re.IGNORECASE
)


def dot_flops(hlo: str, unknown_trips: float | None = None) -> int:
    """2 * batch * M * N * K of every matrix product that one device computes.

    Counted are `dot`, cuBLAS calls, and a `convolution` without padding or dilation, which is a product (a patch
    embedding; XLA:TPU writes its dots so). XLA turns a product of two vectors, or one over an axis of length 1, into
    multiplications: those are not products here, nor are triangular solves and factorizations.

    Args:
        hlo: `compiled.as_text()`.
        unknown_trips: How often a loop turns whose trip count XLA does not know, on average; None refuses them.

    Returns:
        The FLOPs, a multiplication and an addition being two.

    Raises:
        ValueError: for a product in a loop whose trip count is not known, a convolution or a library's or hand-written
            kernel whose FLOPs the text does not tell, or a text that is not compiled HLO.

    References:
        openxla/xla `xla/service/hlo_cost_analysis.cc`, GetDotFlops, whose count this is.
    """
    return round(sum(flops * run.times_with(unknown_trips) for run in executions(hlo) if (flops := _flops(run))))


def _flops(run: Execution) -> int:
    """FLOPs of one execution of a product, 0 of anything else."""
    opcode, attributes = run.instruction.opcode, run.instruction.attributes
    called = re.search(r'custom_call_target="([^"]*)"', attributes)
    target = called[1] if called else ""
    if opcode == "dot" or target in GEMMS:
        contracted = _CONTRACTED.search(attributes)
        lhs = dims(run.operands[0].shapes[0])
        terms = [lhs[axis] for axis in ints(contracted[1])] if contracted else []
        return 2 * math.prod(dims(run.instruction.shapes[0])) * math.prod(terms)
    plain = re.search(r"dim_labels=\w+_(\w+)->", attributes)
    if (
        opcode == "convolution"
        and plain
        and not re.search(r"pad=|dilate=|batch_group_count=", QUOTED.sub('""', attributes))
    ):
        kernel = dims(run.operands[1].shapes[0])
        # Every element of the result reads the whole kernel of its feature, "o".
        return 2 * math.prod(dims(run.instruction.shapes[0])) * math.prod(kernel) // kernel[plain[1].index("o")]
    if opcode in ("convolution", "ragged-dot", "scaled-dot") or _OPAQUE_PRODUCT.search(target):
        raise ValueError(f"cannot count the FLOPs of {(target or opcode)!r} ({run.instruction.name!r})")
    return 0
