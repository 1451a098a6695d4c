"""The floating-point operations of a train step of adapters on a frozen decoder, by three formulas."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.accelerator.sizes import Step
from benchmarks.shapes import fields

FORMULAS = {
    "base_tflops": "4 FLOPs a token and frozen matrix parameter, head included: forward, and backward to activations",
    "model_tflops": (
        "base, causal attention (6 x tokens of the sequence x heads x head_dim a token and layer) and adapters (6 a "
        "token and factor parameter; PEANuT's network 4 x rank a kernel parameter and step)"
    ),
    "nemo_tflops": (
        "NeMo AutoModel's: 6 a token and matrix parameter, half of 12 x tokens x hidden_size a token and layer for "
        "attention, all x (2 + trained / frozen) / 3"
    ),
}


def matrices(shapes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module -> (d_in, d_out) of a layer's matrices."""
    d, wide, head_dim = shapes["hidden_size"], shapes["intermediate_size"], shapes["head_dim"]
    heads, kv_heads = shapes["num_attention_heads"] * head_dim, shapes["num_key_value_heads"] * head_dim
    return {
        "q_proj": (d, heads),
        "k_proj": (d, kv_heads),
        "v_proj": (d, kv_heads),
        "o_proj": (heads, d),
        "gate_proj": (d, wide),
        "up_proj": (d, wide),
        "down_proj": (wide, d),
    }


def matrix_parameters(shapes: Mapping[str, Any]) -> int:
    """Parameters that every token is multiplied with: the layers' matrices and the head."""
    layer = sum(d_in * d_out for d_in, d_out in matrices(shapes).values())
    return shapes["num_hidden_layers"] * layer + shapes["hidden_size"] * shapes["vocab_size"]


def parameters(shapes: Mapping[str, Any]) -> int:
    """All parameters: matrices, embedding (once where the head is tied to it) and norms."""
    embedding = 0 if shapes["tie_word_embeddings"] else shapes["hidden_size"] * shapes["vocab_size"]
    return matrix_parameters(shapes) + embedding + (2 * shapes["num_hidden_layers"] + 1) * shapes["hidden_size"]


def attention_flops(seq: int, heads: int, head_dim: int) -> int:
    """Of causal attention, forward and backward, for one token and layer: two products, then four, each by half."""
    return 6 * seq * heads * head_dim


def step_flops(step: Step, depth: int | None, trained: int) -> dict[str, float]:
    """FLOPs of one step by each formula.

    Args:
        depth: PEANuT's; None for LoRA.
        trained: Number of trained parameters.
    """
    shapes = fields(step.shapes)
    layers, tokens = shapes["num_hidden_layers"], step.tokens
    base = 4 * tokens * matrix_parameters(shapes)
    attention = attention_flops(step.seq, shapes["num_attention_heads"], shapes["head_dim"]) * tokens * layers
    sides = [matrices(shapes)[name] for name in step.targets]
    adapters = layers * _adapter_flops(sides, step.rank, depth, tokens)
    return {
        "base_tflops": base,
        "model_tflops": base + attention + adapters,
        "nemo_tflops": _nemo_flops(shapes, step, trained),
    }


def _adapter_flops(sides: Iterable[tuple[int, int]], rank: int, depth: int | None, tokens: int) -> int:
    """Of one layer's adapters: the factors' products, and once a step PEANuT's network on each kernel."""
    total = 0
    for d_in, d_out in sides:
        total += 6 * rank * (d_in + d_out) * tokens
        if depth is not None:
            total += 4 * d_in * d_out * rank + 12 * depth * d_in * rank * rank
    return total


def _nemo_flops(shapes: Mapping[str, Any], step: Step, trained: int) -> float:
    """As NeMo AutoModel counts them, with which its published TFLOP/s compare.

    References:
        NVIDIA-NeMo/Automodel@36044ad, `components/utils/flops_utils.py`, llama3_flops, and `recipes/llm/benchmark.py`.
    """
    layers, width, tokens = shapes["num_hidden_layers"], shapes["hidden_size"], step.tokens
    attention = 12 * step.seq * width * layers * 0.5
    frozen = parameters(shapes)
    return tokens * (6 * matrix_parameters(shapes) + attention) * (2 + trained / frozen) / 3
