"""Tokens a second of greedy decoding: the plain model, one adapter unmerged, several mixed in one batch."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import peanut_jax as pj
from benchmarks.accelerator.context import Context
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.sizes import Decode
from benchmarks.accelerator.weights import random_params
from benchmarks.shapes import FIVE_TARGETS, decoder_config
from benchmarks.timing import repeated
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.generate import generate

MIXED = ("peanut", "lora", "peanut", "lora")
# Priority where time is short: what is mixed costs most.
KINDS = ("plain", "mixed", "one adapter")


def run(record: Record, context: Context) -> None:
    setting = context.sizes.decode
    layouts = {"unrolled": False, "scanned": True}
    for layout, scanned in layouts.items():
        model = Decoder(
            decoder_config(setting.shapes, remat="none", scan_layers=scanned), jnp.dtype(context.sizes.dtype)
        )
        params = random_params(model)
        updates = [_updates(method, seed, setting, params) for seed, method in enumerate(MIXED)]
        # The layout that the documentation recommends for generation in full, the other for its largest batch.
        for kind in KINDS if not scanned else ("plain",):
            for batch in setting.batches if not scanned else setting.batches[-1:]:
                if kind == "mixed" and batch == 1:
                    continue
                about = {"shapes": setting.shapes, "layers": layout, "adapters": kind, "batch": batch}
                about |= {"prompt": setting.prompt, "new": setting.new, "rank": setting.rank}
                record.run(
                    f"decode {setting.shapes} {layout} {kind} batch={batch}",
                    partial(_measure, context, model, params, updates, kind, batch),
                    about,
                    at_first=context.sizes.case_seconds,
                )


def _updates(method: str, seed: int, setting: Decode, params: PyTree) -> Any:
    """Updates of a random adapter, none of whose factors is zero."""
    kind = pj.PeanutConfig if method == "peanut" else pj.LoraConfig
    config = kind(r=setting.rank, target_modules=FIVE_TARGETS)
    adapters = jax.tree.map(lambda leaf: leaf + 0.01, pj.init(jax.random.key(seed), params, config))
    return pj.compute_updates(adapters, params, config)


def _measure(
    context: Context, model: Decoder, params: PyTree, updates: list[Any], kind: str, batch: int
) -> dict[str, Any]:
    setting = context.sizes.decode
    rng = np.random.default_rng(batch)
    prompts = rng.integers(3, model.config.vocab_size, (batch, setting.prompt)).tolist()
    adapted: dict[str, Any] = {}
    if kind == "one adapter":
        adapted = {"factors": updates[0]}
    elif kind == "mixed":
        adapted = {"factors": updates, "adapter_ids": [row % len(updates) for row in range(batch)]}

    def answer(new: int) -> None:
        rows = generate(model, params, prompts, max_new_tokens=new, eos_token_ids=(), **adapted)
        assert [len(row) for row in rows] == [new] * batch

    whole, seconds = setting.new, context.sizes.repeat_seconds / 4
    # Half as many and one: the same bucket, so the same program, and the difference is decoding alone.
    part = whole // 2 + 1
    began = time.perf_counter()
    answer(whole)
    first = time.perf_counter() - began
    full, half = (float(np.median(repeated(partial(answer, new), seconds=seconds))) for new in (whole, part))
    return {
        "tokens_per_second": batch * whole / full,
        "median_seconds": full,
        "seconds_a_token_decoding": (full - half) / (whole - part),
        "seconds_before_decoding": full - whole * (full - half) / (whole - part),
        "first_seconds": first,
    }
