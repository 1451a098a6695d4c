"""Attention roads alone, forward and backward.

A decoder of one layer that is 64 wide, with the heads of a large model: what is left beside attention is its rotary
embedding and projections of under a twentieth of its FLOPs. It is the library's own code from tokens to gradients, so
that each road is chosen and masked as it is in training.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from benchmarks.accelerator.context import Context
from benchmarks.accelerator.flops import attention_flops
from benchmarks.accelerator.memory import check_fits, device_bytes, program_bytes
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.sizes import Attention
from benchmarks.accelerator.weights import random_params, random_tokens
from benchmarks.shapes import decoder_config
from benchmarks.timing import repeated
from peanut_jax.base.kernels import flatten
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.decoder_config import ATTENTIONS

WIDTH = 64


def run(record: Record, context: Context) -> None:
    """Every road on every setting; the difference of each from the setting's first that runs."""
    for setting in context.sizes.attention:
        reference: dict[str, Array] = {}
        for road in ATTENTIONS:
            about = {"setting": setting.name, "seq": setting.seq, "road": road, "documents": setting.documents}
            record.run(
                f"attention {setting.name} {road}",
                partial(_measure, context, setting, road, reference),
                about,
                at_first=context.sizes.case_seconds,
            )


def one_layer(setting: Attention, road: str, dtype: str) -> Decoder:
    """A decoder that is little more than the setting's attention."""
    changes = {
        "hidden_size": WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": setting.heads,
        "num_key_value_heads": setting.kv_heads,
        "head_dim": setting.head_dim,
        "vocab_size": 256,
        "max_position_embeddings": setting.seq,
    }
    return Decoder(
        decoder_config("toy", changes=changes, remat="none", attention=road, scan_layers=False), jnp.dtype(dtype)
    )


def _measure(context: Context, setting: Attention, road: str, reference: dict[str, Array]) -> dict[str, Any]:
    model = one_layer(setting, road, context.sizes.dtype)
    params = random_params(model)
    tokens = random_tokens(setting.rows, setting.seq, model.config.vocab_size)
    # In runs of equal length, numbered from 1.
    segments = None
    if setting.documents > 1:
        segments = 1 + jnp.broadcast_to(jnp.arange(setting.seq) * setting.documents // setting.seq, tokens.shape)

    @jax.jit
    def gradient(params: PyTree) -> PyTree:
        def loss(params: PyTree) -> Array:
            hidden = jnp.asarray(model.apply(params, tokens, segments=segments, method="hidden"), jnp.float32)
            return (hidden * jnp.cos(jnp.arange(hidden.size, dtype=jnp.float32)).reshape(hidden.shape)).mean()

        return jax.grad(loss)(params)

    compiled = gradient.lower(params).compile()
    memory = program_bytes(compiled)
    check_fits(memory, device_bytes())
    median = float(
        np.median(repeated(lambda: jax.block_until_ready(compiled(params)), seconds=context.sizes.repeat_seconds / 4))
    )
    # Of packed documents each token sees its own alone.
    flops = (
        attention_flops(setting.seq // setting.documents, setting.heads, setting.head_dim) * setting.seq * setting.rows
    )
    found = {path: leaf for path, leaf in flatten(compiled(params)).items() if "self_attn" in path}
    difference = _difference(found, reference)
    reference.update({} if reference else found)
    peak = context.peak_tflops
    return {
        "median_seconds": median,
        "tflops": flops / median / 1e12,
        "of_peak": flops / median / 1e12 / peak if peak else None,
        **memory,
        "gradient_from_first_road": difference,
    }


def _difference(found: dict[str, Array], reference: dict[str, Array]) -> float | None:
    """||found - reference|| / ||reference|| over all leaves together; None without a reference."""
    if not reference:
        return None
    pairs = [(np.asarray(found[path], np.float64), np.asarray(reference[path], np.float64)) for path in reference]
    over = sum(float(np.square(ours - first).sum()) for ours, first in pairs)
    return (over / sum(float(np.square(first).sum()) for _, first in pairs)) ** 0.5
