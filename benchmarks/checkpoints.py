"""Large checkpoints to measure on: Llama-shaped, random bfloat16, in shards, as transformers writes them."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file


def llama_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor names and shapes of a transformers Llama checkpoint; a tied head is not in it."""
    d, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d * config["num_key_value_heads"] // config["num_attention_heads"]
    yield "model.embed_tokens.weight", (vocab, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (d,)
        for name, rows in (("q", d), ("k", kv), ("v", kv), ("o", d)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, d)
        yield layer + "post_attention_layernorm.weight", (d,)
        yield layer + "mlp.gate_proj.weight", (ff, d)
        yield layer + "mlp.up_proj.weight", (ff, d)
        yield layer + "mlp.down_proj.weight", (d, ff)
    yield "model.norm.weight", (d,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, d)


def config_of(layers: int) -> dict:
    """A Llama of width 2048: 103 MB a layer, 131 MB each for embedding and head."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write_llama(folder: Path, config: dict, shards: int) -> int:
    """Writes the checkpoint, and returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(llama_shapes(config))
    total = sum(2 * math.prod(shape) for _, shape in names)
    rng, weight_map, written, done = np.random.default_rng(0), {}, 0, 0
    for shard in range(1, shards + 1):
        file, tensors = f"model-{shard:05d}-of-{shards:05d}.safetensors", {}
        while done < len(names) and (written < total * shard / shards or shard == shards):
            name, shape = names[done]
            tensors[name] = random_bfloat16(rng, shape)
            weight_map[name] = file
            written += tensors[name].nbytes
            done += 1
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_bfloat16(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers between 2^-7 and 2^-6 of either sign, drawn as bits: ten times as fast as a normal distribution."""
    bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16).reshape(shape)
    return ((bits & np.uint16(0x807F)) | np.uint16(0x3C00)).view(jnp.bfloat16)
