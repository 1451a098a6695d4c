"""A quick plan from the sizes alone, without a compiler: which meshes, batches and policies are worth compiling.

What goes in (base, adapters, optimizer, batch) is exact. Per device, of b rows of T tokens, with the mesh's sizes f of
fsdp and t of tensor, the temporaries are what is kept through the step,

    what each layer keeps for the backward pass    layers * b * T * (kept elements of a token)
    the factors' gradients                         layers * r * (d_in + d_out of each adapted kernel)

    the gathered head                              vocab * hidden / t where f > 1

and the larger of what a layer and what the loss takes besides:

    one layer's own arrays, and gathered kernels   b * T * (its elements), and 2 * kernels of a layer / t where f > 1
    float32 logits                                 1.5 * chunk * vocab / t

and FLOPs are 2 a parameter and token in the forward pass, 2 for the activations' gradients, and 2 for what is
recomputed; the scores of attention come on top.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from peanut_jax import hlo
from peanut_jax.base.kernels import flatten
from peanut_jax.base.select import select
from peanut_jax.models.attention.chunked import BLOCK
from peanut_jax.models.attention.roads import SHORT
from peanut_jax.models.decoder import CHUNK
from peanut_jax.models.decoder_config import DecoderConfig
from peanut_jax.plan.record import Plan
from peanut_jax.plan.step import Setting, device_bytes
from peanut_jax.sharding import batch_shards
from peanut_jax.sharding.mesh import AXES

# Temporaries surely take this part of their estimate, which is within a quarter of what compilers say.
SURELY = 0.6
# Widths of arrays that a layer keeps under remat "none" besides its products, and that live while it is computed,
# fitted to compiled steps.
_NONE_HIDDEN, _NONE_WIDE = 6, 3
_OWN_HIDDEN, _OWN_HEADS, _OWN_WIDE = 4, 2, 3
# Arrays of the scores' size where attention forms them whole, kept under "none" and while a layer is computed; and of a
# block of keys for every query, where it goes by blocks.
_SCORES_KEPT, _SCORES, _BLOCK_SCORES = 1, 2, 4
# Arrays of the logits' size that live at a time.
_LOGITS = 1.5


class Share(NamedTuple):
    """What one device has of the work.

    Attributes:
        data, fsdp, tensor: Sizes of the mesh.
        rows: Of one microbatch, on this device.
        seq: Tokens of a row.
        item: Bytes of an element of the activations.
        rank: r of the adapters, 0 for a method without one.
        targets: The module and (d_in, d_out) of each adapted kernel of a layer.
    """

    data: int
    fsdp: int
    tensor: int
    rows: int
    seq: int
    item: int
    rank: int
    targets: tuple[tuple[str, int, int], ...]

    @property
    def tokens(self) -> int:
        return self.rows * self.seq


class Held(NamedTuple):
    """What a mesh's device holds whatever the rows are, which takes a while to find out.

    Attributes:
        params, state: Bytes, as in `Plan`.
        trainable: As in `Plan`.
        targets: As in `Share`.
    """

    params: int
    state: int
    trainable: int
    targets: tuple[tuple[str, int, int], ...]


def held(setting: Setting, mesh: Mesh) -> Held:
    """What a device of the mesh holds.

    Raises:
        ValueError: as `Setting.shapes`.
    """
    state, params, _ = setting.shapes(mesh)
    flat = flatten(params)
    kernels = {path: flat[path].shape[-2:] for path in select(params, setting.adapter)}
    # One layer's of each name, were it a stack or not; the head and the embedding are not a layer's.
    targets = {path.split("/")[-2]: shape for path, shape in kernels.items() if "/layers/" in path}
    trainable = sum(leaf.size for leaf in jax.tree.leaves(state.adapters))
    return Held(
        device_bytes(params), device_bytes(state), trainable, tuple((name, *shape) for name, shape in targets.items())
    )


def estimate(setting: Setting, mesh: Mesh, known: Held | None = None) -> Plan:
    """The plan of a setting, from formulas.

    Args:
        known: What `held` gives for this mesh and a setting with the same model and adapter.

    Raises:
        ValueError: as `Setting.shapes`.
    """
    known = known or held(setting, mesh)
    setting.check(mesh)
    share = _share(setting, mesh, known.targets)
    return Plan(
        params=known.params,
        state=known.state,
        batch=4 * 4 * share.tokens * setting.accumulate_steps,  # tokens, labels, weights, segments
        temporary=_temporary(setting.config, share),
        flops=setting.accumulate_steps * _flops(setting.config, share) + _tweaker_flops(setting.config, share),
        collectives=tuple(_collectives(setting, share, known.state)),
        trainable=known.trainable,
        notes=("estimated from the sizes, not compiled",),
    )


def _share(setting: Setting, mesh: Mesh, targets: tuple[tuple[str, int, int], ...]) -> Share:
    data, fsdp, tensor = (mesh.shape.get(name, 1) for name in AXES)
    rows = setting.batch_size // batch_shards(mesh) // setting.accumulate_steps
    item = 2 if setting.dtype == "bfloat16" else 4
    rank = getattr(setting.adapter, "r", 0)
    return Share(data, fsdp, tensor, rows, setting.seq_len, item, rank, targets)


def _widths(config: DecoderConfig) -> tuple[int, int, int, int]:
    """Of the residual stream, the MLP, the queries of all heads, and the keys of all heads."""
    heads = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim)
    return config.hidden_size, config.intermediate_size, *heads


def _layer_kernels(config: DecoderConfig) -> int:
    """Parameters of one layer's kernels."""
    hidden, wide, queries, keys = _widths(config)
    return hidden * (2 * queries + 2 * keys + 3 * wide)


def _kept(config: DecoderConfig, share: Share) -> float:
    """Elements that a layer keeps of a token for the backward pass, on one device."""
    hidden, wide, queries, keys = _widths(config)
    if config.remat == "full":
        return hidden
    # What comes in and what attention adds to it; its queries, keys, values and outputs; the adapters' inner products.
    kept = 2 * hidden + 2 * (queries + keys) / share.tensor + len(share.targets) * share.rank
    if config.remat != "attention":
        kept += 2 * wide / share.tensor
    if config.remat == "none":
        kept += _NONE_HIDDEN * hidden + (2 * queries + 2 * keys + _NONE_WIDE * wide) / share.tensor
        kept += _SCORES_KEPT * _keys(share) * config.num_attention_heads / share.tensor
    return kept


def _keys(share: Share) -> int:
    """Scores that a query's head holds at a time; none where attention goes by blocks."""
    return share.seq if share.seq <= SHORT else 0


def _temporary(config: DecoderConfig, share: Share) -> int:
    hidden, wide, queries, keys = _widths(config)
    layers, gathers = config.num_hidden_layers, share.fsdp > 1
    kept = layers * (share.tokens * _kept(config, share) + share.rank * _sides(share))
    own = _OWN_HIDDEN * hidden + (_OWN_HEADS * (queries + keys) + _OWN_WIDE * wide) / share.tensor
    scores = _SCORES * _keys(share) or _BLOCK_SCORES * BLOCK
    own += scores * config.num_attention_heads / share.tensor
    layer = share.item * (share.tokens * own + 2 * gathers * _layer_kernels(config) / share.tensor)
    end = share.item * gathers * config.vocab_size * hidden / share.tensor
    loss = end + 4 * _LOGITS * min(share.tokens, CHUNK) * config.vocab_size / share.tensor
    return round(share.item * kept + max(layer + end, loss))


def _sides(share: Share) -> int:
    """d_in + d_out of the adapted kernels of a layer."""
    return sum(d_in + d_out for _, d_in, d_out in share.targets)


def _flops(config: DecoderConfig, share: Share) -> int:
    """FLOPs of one microbatch."""
    hidden, wide, queries, keys = _widths(config)
    again = config.remat == "full"
    # The recomputed products: of the MLP, gate and up alone, and with "full" attention's four.
    twice = {"attention": 2 * hidden * wide, "full": 2 * hidden * (wide + queries + keys)}.get(config.remat, 0)
    kernels = 4 * _layer_kernels(config) + 2 * twice
    seen = (_keys(share) or (share.seq + BLOCK) / 2) * queries
    scores = 4 * seen * (3 + again)
    thin = 2 * share.rank * _sides(share) * (3 + again)
    head = 4 * config.vocab_size * hidden
    return round(share.tokens * (config.num_hidden_layers * (kernels + scores + thin) + head) / share.tensor)


def _tweaker_flops(config: DecoderConfig, share: Share) -> int:
    """FLOPs of the factors and of their pullback, once a step: W0 is read by a product of rank r in either."""
    kernels = sum(d_in * d_out for _, d_in, d_out in share.targets)
    return 4 * share.rank * config.num_hidden_layers * kernels // (share.fsdp * share.tensor)


def _collectives(setting: Setting, share: Share, state: int) -> Iterator[hlo.Collective]:
    """Gathers of kernels over fsdp, sums of activations over tensor, and sums of the factors' gradients."""
    config = setting.config
    hidden, layers, microbatches = config.hidden_size, config.num_hidden_layers, setting.accumulate_steps
    grid = np.arange(share.data * share.fsdp * share.tensor).reshape(share.data, share.fsdp, share.tensor)
    if share.fsdp > 1:
        over = np.moveaxis(grid, 1, -1).reshape(-1, share.fsdp)
        bytes_ = share.item * _layer_kernels(config) // share.tensor
        yield _collective("all-gather", bytes_, 2 * layers * microbatches, over)
        ends = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden // share.tensor
        yield _collective("all-gather", share.item * ends, microbatches, over)
    if share.tensor > 1:
        sums = 8 if config.remat == "full" else 7  # 2 forward, of them 1 again; a gradient each of q, k, v, gate, up
        bytes_ = share.item * share.tokens * hidden
        yield _collective("all-reduce", bytes_, sums * layers * microbatches, grid.reshape(-1, share.tensor))
    if share.data * share.fsdp > 1:
        over = np.moveaxis(grid, 2, 0).reshape(share.tensor, -1)
        yield _collective("all-reduce", state // 3, 1, over)


def _collective(kind: str, bytes_: int, times: int, groups: np.ndarray) -> hlo.Collective:
    rows = tuple(tuple(row) for row in groups.tolist())
    return hlo.Collective(kind, (), bytes_, times, groups.shape[-1], rows, "")
