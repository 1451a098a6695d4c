"""What the decoder gets by construction: compile time that hardly grows with the layers, a loss without all logits.

    python -m benchmarks.decoder_compile

Seconds to trace and compile a train step of 4 and of 32 scanned layers (and, with --unscanned, of separate ones), the
median of --repeats; and XLA's temporary bytes of loss and gradient for Llama 3's vocabulary of 128,256, in chunks and
whole.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peanut_jax as pj
from benchmarks.step_cost import TARGETS, make_step
from peanut_jax.models.decoder import Decoder, variable_shapes
from peanut_jax.models.decoder_config import DecoderConfig, from_hf


def config_of(layers: int, vocab: int, scan_layers: bool = True) -> DecoderConfig:
    fields = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return from_hf(fields, scan_layers=scan_layers)


def compile_seconds(layers: int, scan_layers: bool) -> float:
    """Of a train step on abstract arrays."""
    model = Decoder(config_of(layers, 1024, scan_layers), jnp.float32)
    tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    params = variable_shapes(model)
    config, tx = pj.PeanutConfig(r=8, target_modules=TARGETS), optax.adamw(1e-3)

    def loss_fn(params, batch, key):
        return model.apply(params, batch, batch, jnp.ones(batch.shape), method="loss")[0]

    def create(params):
        adapters = pj.init(jax.random.key(0), params, config)
        return pj.TrainState.create(adapters, tx, jax.random.key(0))

    state = jax.eval_shape(create, params)
    began = time.perf_counter()
    make_step("peanut", loss_fn, config, tx, 1).lower(state, params, tokens).compile()
    return time.perf_counter() - began


def loss_bytes(vocab: int, tokens: int, chunk: int) -> int:
    """Temporary bytes of the loss and its gradient in the hidden states' place: the embedding's output."""
    model = Decoder(config_of(1, vocab), jnp.bfloat16)
    params = variable_shapes(model)
    config = pj.PeanutConfig(r=8, target_modules=TARGETS)
    adapters = jax.eval_shape(lambda params: pj.init(jax.random.key(0), params, config), params)
    ids = jax.ShapeDtypeStruct((tokens // 256, 256), jnp.int32)

    def loss(params, ids):
        return model.apply(params, ids, ids, jnp.ones(ids.shape), chunk=chunk, method="loss")[0]

    compiled: Any = jax.jit(jax.grad(pj.adapt(loss, config))).lower(adapters, params, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--unscanned", action="store_true", help="also compile separate layers: minutes")
    args = parser.parse_args()

    for scan_layers in (True, False) if args.unscanned else (True,):
        seconds: dict[int, list[float]] = {4: [], 32: []}
        for _ in range(args.repeats):
            for layers, values in seconds.items():
                values.append(compile_seconds(layers, scan_layers))
        medians = {layers: float(np.median(values)) for layers, values in seconds.items()}
        print(
            json.dumps({"scan_layers": scan_layers, "seconds": medians, "ratio": medians[32] / medians[4]}), flush=True
        )
    for chunk in (256, 1024, args.tokens):
        megabytes = loss_bytes(128256, args.tokens, chunk) / 1e6
        print(json.dumps({"vocab": 128256, "tokens": args.tokens, "chunk": chunk, "temp_mb": megabytes}), flush=True)


if __name__ == "__main__":
    main()
