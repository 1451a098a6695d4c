"""Attention by jax's splash kernels, for TPUs: forward and backward in blocks that stay in the chip's vector memory.

Blocks that causality or the window leaves empty are never visited, and segments are compared within a block.

References:
    jax 0.10, `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Float, Int

from peanut_jax.models.attention.sight import RESIDUALS
from peanut_jax.sharding import batch_axes, batch_shards

# Blocks are whole numbers of lanes.
_LANES = 128
# Queries and keys of a block, and keys of a product: the fewest cycles for rows of 4,096, of 512, 1024 and 2048 tokens
# that fit a v5p's vector memory, read from libtpu's schedules as `benchmarks.kernel_cycles` does.
_BLOCK, _COMPUTE = 1024, 512
# Blocks of keys up to which one kernel gives all gradients, in 5 products in place of 7: it writes one dq for each of
# the blocks, to be added up, so that it is not for long rows.
_FUSED = 8
# Tests set it where there is no TPU.
INTERPRET = False


def splash(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    segments: Int[Array, "batch seq"] | None,
    window: int | None,
    mesh: Mesh | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention to the earlier tokens of the same segment, by place in the row.

    Args:
        mesh: That the program runs on, for XLA cannot divide a kernel: each device takes its own rows and heads.
    """
    run = functools.partial(_on_device, window=window, interpret=INTERPRET)
    if mesh is None or mesh.size == 1:
        return run(q, k, v, segments)
    rows, heads, copies = _division(q.shape, k.shape[2], mesh)
    if copies > 1:
        k, v = (jnp.repeat(array, copies, axis=2) for array in (k, v))
    whole = Spec(rows, None, heads, None)
    specs = (whole, whole, whole, None if segments is None else Spec(rows, None))
    # The kernels do not say how their results vary over the mesh, which the check would ask.
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)(q, k, v, segments)


def _division(shape: tuple[int, ...], kv_heads: int, mesh: Mesh) -> tuple[Any, Any, int]:
    """The mesh axes of the rows and of the heads, and how often heads of keys are repeated so that they divide."""
    batch, _, heads, _ = shape
    rows = batch_axes(mesh) if batch % batch_shards(mesh) == 0 else None
    tensor = mesh.shape.get("tensor", 1)
    copies = math.lcm(kv_heads, tensor) // kv_heads
    if tensor == 1 or heads % (kv_heads * copies):
        return rows, None, 1  # every device of the axis takes all heads
    return rows, "tensor", copies


def _on_device(q: Array, k: Array, v: Array, segments: Array | None, *, window: int | None, interpret: bool) -> Array:
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    block, filled = _blocks(seq)
    kernel = _kernel(filled, heads // kv_heads, window if window is None or window < seq else None, block, interpret)
    # The kernel does not scale. Rows are filled up on the right, where no query sees.
    grouped = (q * head_dim**-0.5).reshape(batch, seq, kv_heads, -1, head_dim)
    grouped, k, v = (
        jnp.pad(jnp.moveaxis(x, 1, -2), [(0, 0)] * (x.ndim - 2) + [(0, filled - seq), (0, 0)]) for x in (grouped, k, v)
    )
    if segments is not None:
        segments = jnp.pad(segments, [(0, 0), (0, filled - seq)])

    def row(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        ids = None if segments is None else kernels.SegmentIds(segments, segments)
        # A group of queries with its head of keys at a time; the batch and the groups are divided over a chip's cores.
        return jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(q, k, v)

    out = jax.vmap(row)(grouped, k, v, segments)
    return jnp.moveaxis(out, -2, 1)[:, :seq].reshape(q.shape)


def _blocks(seq: int) -> tuple[int, int]:
    """(tokens of a block, tokens of a row that is filled up to whole blocks), as even as lanes allow."""
    count = -(-seq // _BLOCK)
    block = -(-seq // count // _LANES) * _LANES
    return block, block * count


class _Quick(masks.Mask):
    """Tells of a block whether it is seen whole, in part or not at all, which is all that the kernel's maker asks.

    jax forms and hashes each block: 10 s for a row of 32,768 tokens, 130 s for 131,072.
    """

    def __getitem__(self, block: Any) -> np.ndarray:
        queries, keys = block
        nearest, furthest = queries.start - keys.stop + 1, queries.stop - 1 - keys.start
        left = getattr(self, "window_size", (None, 0))[0]
        last = furthest if left is None else left
        return np.array([furthest >= 0 and nearest <= last, nearest >= 0 and furthest <= last])


class _Causal(_Quick, masks.CausalMask):
    """Every key up to the query's own."""


class _Local(_Quick, masks.LocalMask):
    """Of those, the ones in a window."""


def _kernel(seq: int, group: int, window: int | None, block: int, interpret: bool) -> Any:
    """The kernel for a group of heads of queries, with what it skips; each layer of a program asks for it again."""
    compute = _COMPUTE if block % _COMPUTE == 0 else block
    fused = seq // block <= _FUSED
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=compute,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block, block_kv_dq=None if fused else block, use_fused_bwd_kernel=fused,
    )  # fmt: skip
    shape = (seq, seq)
    mask = _Causal(shape) if window is None else _Local(shape, (window - 1, 0), 0)
    return kernels.make_splash_mqa(
        masks.MultiHeadMask([mask] * group), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS, interpret=interpret,
    )  # fmt: skip
