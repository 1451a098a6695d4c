"""One tiny random model in torch and in Flax; HF PEFT's adapter on the first and, from its weights, ours."""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from peft.tuners.peanut.layer import PeanutLayer
from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig, T5Config, ViTConfig

import peanut_jax as pj
from peanut_jax.models import hf

TASKS = {
    "ModelForSequenceClassification": "sequence-classification",
    "ModelForImageClassification": "image-classification",
    "ModelForCausalLM": "causal-lm",
    "ModelForSeq2SeqLM": "seq2seq-lm",
}
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 24, "initializer_range": 0.2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table of models: how to build it and which kernels to adapt."""

    config: Callable[..., transformers.PretrainedConfig]
    fields: dict[str, Any]
    auto: str
    targets: tuple[str, ...]


# Targets take square kernels and kernels of either shape; grouped queries make Llama's k and v narrower than its q.
FAMILIES = {
    "roberta": Family(
        RobertaConfig, {"num_labels": 3, "pad_token_id": 1}, "ModelForSequenceClassification",
        ("query", "value", "intermediate.dense"),
    ),
    "bert": Family(
        BertConfig, {"num_labels": 3}, "ModelForSequenceClassification",
        ("key", "attention.output.dense", "output.dense"),
    ),
    "llama": Family(
        LlamaConfig, {"num_key_value_heads": 2, "rope_theta": 10000.0, "tie_word_embeddings": False},
        "ModelForCausalLM", ("q_proj", "v_proj", "up_proj", "down_proj"),
    ),
    "vit": Family(
        ViTConfig, {"image_size": 12, "patch_size": 4, "num_labels": 3}, "ModelForImageClassification",
        ("query", "output.dense"),
    ),
    "t5": Family(
        T5Config, {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "ModelForSeq2SeqLM", ("q", "v", "wo"),
    ),
    "gpt2": Family(GPT2Config, {"n_inner": 48}, "ModelForCausalLM", ("c_attn", "c_proj", "c_fc")),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Twin:
    """The same weights in torch and Flax, and a batch with padding in its last row. Hashed by identity, for caches."""

    torch: transformers.PreTrainedModel
    flax: transformers.FlaxPreTrainedModel
    params: dict[str, Any]
    batch: dict[str, np.ndarray]
    targets: tuple[str, ...]

    def torch_batch(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value) for name, value in self.batch.items()}


def build(name: str, folder: Path) -> Twin:
    """A random torch model of `FAMILIES`, saved as safetensors and read back by Flax."""
    family = FAMILIES[name]
    config = family.config(**{**SIZES, **family.fields})
    torch.manual_seed(0)
    model = getattr(transformers, f"Auto{family.auto}").from_config(config).eval()
    model.save_pretrained(folder)
    flax, params = hf.load(folder, TASKS[family.auto])
    return Twin(model, flax, params, _batch(config), family.targets)


def _batch(config: transformers.PretrainedConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if isinstance(config, ViTConfig):
        return {"pixel_values": rng.normal(size=(3, 3, config.image_size, config.image_size)).astype(np.float32)}
    ids = rng.integers(3, SIZES["vocab_size"], (3, 10))
    mask = np.ones_like(ids)
    ids[-1, 7:], mask[-1, 7:] = config.pad_token_id or 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, "decoder_input_ids": ids[:, :6]} if config.is_encoder_decoder else batch


def wrap(model: transformers.PreTrainedModel, *, seed: int = 0, **config: Any) -> peft.PeftModel:
    """A copy of `model` with PEFT's adapter."""
    torch.manual_seed(seed)
    return peft.get_peft_model(copy.deepcopy(model), peft.PeanutConfig(**config)).eval()


def layers(model: peft.PeftModel) -> dict[str, Any]:
    """Kernel path -> PEFT's layer."""
    return {
        f"{name.replace('.', '/')}/kernel": module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, PeanutLayer)
    }


def thetas(
    model: peft.PeftModel,
    adapter: str = "default",
    read: Callable[[torch.nn.Parameter], torch.Tensor] = torch.detach,
) -> dict[str, dict[str, jnp.ndarray]]:
    """PEFT's adapter as ours: kernel path -> theta. `read` takes what is wanted of each parameter, say its gradient."""

    def matrix(linear: Any) -> np.ndarray:
        return read(linear.weight).numpy().T

    def theta(layer: Any) -> dict[str, np.ndarray]:
        pairs = {
            "encoders": [matrix(m) for m in layer.peanut_encoders[adapter]],
            "decoders": [matrix(m) for m in layer.peanut_decoders[adapter]],
        }
        ends = {"a": matrix(layer.peanut_A[adapter]), "b": matrix(layer.peanut_B[adapter])}
        return ends | {name: np.stack(matrices) for name, matrices in pairs.items() if matrices}

    return {
        path: {name: jnp.array(value) for name, value in theta(layer).items()}
        for path, layer in layers(model).items()
        if adapter in layer.peanut_A
    }


def saved(model: peft.PeftModel, read: Callable[[torch.Tensor], torch.Tensor] = torch.detach) -> dict[str, jnp.ndarray]:
    """The dense modules that PEFT trains in full, as ours: path of the leaf -> array."""
    found = {}
    for name, parameter in model.get_base_model().named_parameters():
        match = re.fullmatch(r"(.+)\.modules_to_save\.default(\..+)?\.(weight|bias)", name)
        if match:
            leaf = {"weight": "kernel", "bias": "bias"}[match[3]]
            path = f"{match[1]}{match[2] or ''}.{leaf}".replace(".", "/")
            found[path] = jnp.array(read(parameter).numpy().T)
    return found


def adapters(model: peft.PeftModel) -> pj.Adapters:
    """Everything that PEFT trains, as our adapters."""
    return pj.Adapters(thetas(model), saved(model))


def gradients(model: peft.PeftModel) -> pj.Adapters:
    """The gradients that a backward pass left there, in the same layout."""

    def read(parameter: torch.Tensor) -> torch.Tensor:
        assert parameter.grad is not None
        return parameter.grad

    return pj.Adapters(thetas(model, read=read), saved(model, read))
