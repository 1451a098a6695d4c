"""The decoder against transformers' torch classes, on tiny random checkpoints of every family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from peanut_jax.models.loading import load_decoder

SIZES = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# Name -> (config class, fields). Each differs from the first in what its family adds.
FAMILIES = {
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": (transformers.LlamaConfig, {"rope_theta": 500000.0}),
    "llama3.1": (transformers.LlamaConfig, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama3.2": (transformers.LlamaConfig, {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "linear": (transformers.LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 7, "head_dim": 16}),
    "mistral-full": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen2-window": (
        transformers.Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 24, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3-window": (
        transformers.Qwen3Config,
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2,
         "attention_bias": True},
    ),
}  # fmt: skip
LENGTH = 40  # past every sliding window, and past llama3's original context of 16


def build(name, folder):
    """A random torch model of the family, its folder, and ours."""
    config_class, fields = FAMILIES[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **fields})).eval()
    for parameter in model.parameters():  # biases and norms too
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model, *load_decoder(folder, jnp.float32)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    @functools.cache
    def make(name):
        folder = tmp_path_factory.getbasetemp() / f"decoder-{name}"
        return folder, *build(name, folder)

    return make


def tokens_and_mask(padding):
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(3, SIZES["vocab_size"], (3, LENGTH)), np.ones((3, LENGTH), int)
    for row, count in ((1, 9), (2, 30)):
        span = slice(0, count) if padding == "left" else slice(LENGTH - count, None)
        if padding != "none":
            tokens[row, span], mask[row, span] = 0, 0
    return tokens, mask


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(family, name, padding):
    _, torch_model, model, params = family(name)
    tokens, mask = tokens_and_mask(padding)
    with torch.no_grad():
        want = torch_model(torch.from_numpy(tokens), torch.from_numpy(mask)).logits.numpy()
    forward = jax.jit(model.apply)
    got = forward(params, tokens) if padding == "none" else forward(params, tokens, mask)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got)[mask == 1], want[mask == 1], rtol=0, atol=1e-4)
