"""What transformers' Flax classes get wrong: the fields that are refused, and the classes that are mended.

Every line of `FIELDS` and `HEAD_FIELDS` comes from transformers 4.57.6: the configuration fields that the PyTorch
class reads were compared with those the Flax class reads, and tiny models of both were run with each one changed.
"""

import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peanut_jax.messages import one_line, short
from peanut_jax.models.families import FAMILIES
from peanut_jax.models.hf_copies import Change, calls_attention_weights, masks_each_row, rebuilt

# Values that Flax runs as PyTorch does, or a test of the configuration whose docstring describes them.
Allowed = tuple[Any, ...] | Callable[[Any], bool]
Rules = dict[str, Allowed]


def _heads_fill_hidden_size(config: Any) -> bool:
    """hidden_size / num_attention_heads"""
    return config.head_dim in (None, config.hidden_size // config.num_attention_heads)


def _window_covers_positions(config: Any) -> bool:
    """max_position_embeddings or more, as Flax's window is one token too wide and None means a window of one"""
    return config.sliding_window is not None and config.sliding_window >= config.max_position_embeddings


def _embedding_is_hidden_size(config: Any) -> bool:
    """the hidden_size"""
    return config.embedding_size == config.hidden_size


def _attention_is_full(config: Any) -> bool:
    """'original_full', which PyTorch takes by itself for short inputs: override the field if yours are"""
    return config.attention_type == "original_full"


def _image_is_square(config: Any) -> bool:
    """one integer: override the field with it if the sides are equal"""
    return isinstance(config.image_size, int)


_ABSOLUTE: Rules = {"position_embedding_type": ("absolute",)}
# transformers 5 writes both into `rope_parameters`, which 4.57 does not read.
_ROPE: Rules = {
    "rope_theta": (10000.0,),
    "rope_scaling": (None, {"rope_type": "default"}),
    "rope_parameters": (None, {"rope_theta": 10000.0, "rope_type": "default"}),
}
_SQUARE: Rules = {"image_size": _image_is_square}
_UNTIED: Rules = {"tie_word_embeddings": (False,)}
_UNTIED_STACKS: Rules = {"tie_encoder_decoder": (False,)}
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")

FIELDS: dict[str, Rules] = {
    "albert": _ABSOLUTE,
    "beit": _SQUARE,
    "bert": _ABSOLUTE,
    "blenderbot-small": {"scale_embedding": (False,)},
    "big_bird": {**_ABSOLUTE, "attention_type": _attention_is_full, "use_bias": (True,)},
    "clip_vision_model": {**_SQUARE, "num_channels": (3,)},
    "dinov2": {**_SQUARE, "layerscale_value": (1.0,)},
    "distilbert": {"sinusoidal_pos_embds": (False,)},
    "electra": _ABSOLUTE,
    "gemma": {**_ROPE, "hidden_act": _TANH_GELU, "hidden_activation": (None, *_TANH_GELU)},
    "gpt2": {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    "llama": {**_ROPE, "head_dim": _heads_fill_hidden_size, "mlp_bias": (False,)},
    "longt5": _UNTIED_STACKS,
    "marian": {**_UNTIED_STACKS, "share_encoder_decoder_embeddings": (True,)},
    "mistral": {**_ROPE, "head_dim": _heads_fill_hidden_size, "sliding_window": _window_covers_positions},
    "mt5": _UNTIED_STACKS,
    "opt": {"enable_bias": (True,), "layer_norm_elementwise_affine": (True,)},
    "regnet": {"layer_type": ("y",)},
    "resnet": {"layer_type": ("bottleneck",), "downsample_in_bottleneck": (False,)},
    "roberta": _ABSOLUTE,
    "roberta-prelayernorm": _ABSOLUTE,
    "roformer": {
        "embedding_size": _embedding_is_hidden_size,
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    "t5": _UNTIED_STACKS,
    "vit": _SQUARE,
    "wav2vec2": {
        "do_stable_layer_norm": (True,),
        "feat_extract_norm": ("layer",),
        "adapter_attn_dim": (None,),
        "layer_norm_eps": (1e-5,),
    },
    "xglm": {"add_cross_attention": (False,)},
    "xlm-roberta": _ABSOLUTE,
}
"""Model type -> field -> what Flax runs right, whatever the task."""

_LM: dict[str, Rules] = {
    "electra": {"hidden_act": ("gelu",)},
    "gptj": _UNTIED,
    "llama": _UNTIED,
    "mistral": _UNTIED,
    "whisper": {"tie_word_embeddings": (True,)},
}
HEAD_FIELDS: dict[str, dict[str, Rules]] = {
    **dict.fromkeys(("pretraining", "masked-lm", "causal-lm", "seq2seq-lm", "speech-seq2seq"), _LM),
    "multiple-choice": {
        "electra": {"summary_type": ("first",)},
        "roformer": {"summary_type": ("last",), "summary_use_proj": (False,), "summary_activation": (None,)},
    },
}
"""Task -> model type -> field -> what Flax runs right, beyond `FIELDS`."""

ANY_FIELDS: Rules = {"quantization_config": (None,), "pruned_heads": ({}, None)}
"""Field -> what Flax runs right, whatever the model type."""

ACTIVATION_FIELDS = (
    "activation",
    "activation_function",
    "dense_act_fn",
    "feat_extract_activation",
    "hidden_act",
    "hidden_activation",
    "pooler_act",
    "summary_activation",
)
"""Fields that name an activation, of which Flax has fewer than PyTorch."""

DROPOUT_MASKS = ("torch", "flax")
# Characters of an error that name the faults of a configuration.
_TOLD = 280
"""How attention dropout draws: a mask for each row and head, or one for all of them."""

COMPOSITES = ("encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder", "vision-text-dual-encoder")


def check(config: Any, task: str) -> None:
    """Refuse a configuration that the Flax class would run as another function than PyTorch's class does.

    Raises:
        ValueError: naming each field, its value, the values that are right, and the way out.
    """
    model_type = config.model_type
    if model_type in COMPOSITES:
        raise ValueError(
            f"transformers cannot build its Flax {model_type!r} around given parameters: load its two parts as "
            "models of their own, or train it in PyTorch with HF PEFT"
        )
    parts = [getattr(config, name) for name in ("text_config", "vision_config") if hasattr(config, name)]
    if faults := [fault for part in (config, *parts) for fault in _faults(part, task)]:
        told = "; ".join(f"{fault} (right only: {right})" for fault, right in faults)
        if len(told) > _TOLD:  # then without what would be right, to name all of them
            told = one_line("; ".join(fault for fault, _ in faults), _TOLD)
        raise ValueError(
            f"transformers' Flax class for {model_type!r} would run this checkpoint wrongly: {told}. "
            f"{way_out(model_type)}"
        )


def way_out(model_type: str) -> str:
    """What to do with a checkpoint that the Flax classes cannot run."""
    if model_type in FAMILIES:
        return f"Load {model_type!r} with peanut_jax.models.loading.load_decoder instead"
    return f"Train {model_type!r} in PyTorch with HF PEFT instead"


def _faults(config: Any, task: str) -> list[tuple[str, str]]:
    """`field=value` of each field that is wrong, and what would be right."""
    from transformers.modeling_flax_utils import ACT2FN

    named = [field for field in ACTIVATION_FIELDS if isinstance(getattr(config, field, None), str)]
    rules: Rules = {
        **dict.fromkeys(named, tuple(ACT2FN)),
        **ANY_FIELDS,
        **FIELDS.get(config.model_type, {}),
        **HEAD_FIELDS.get(task, {}).get(config.model_type, {}),
    }
    faults = []
    for field, allowed in rules.items():
        value = getattr(config, field, None)
        if hasattr(config, field) and not (allowed(config) if callable(allowed) else value in allowed):
            right = allowed.__doc__ if callable(allowed) else " or ".join(map(repr, allowed))
            faults.append((f"{field}={short(value, 40)}", f"{right}"))
    return faults


def mended(model_class: Any, dropout_masks: str = "torch") -> Any:
    """The Flax class without four faults that are in its code, whatever the configuration.

    Flax's attention draws one dropout mask for all rows and heads of a batch, where PyTorch draws one for each.
    FlaxElectra* default `token_type_ids` to ones, where PyTorch's ELECTRA and every other class take zeros.
    FlaxDinov2* resize position embeddings with another cubic kernel than PyTorch: sizes that need it are refused.
    FlaxT5* and FlaxLongT5* call `jnp.clip(a_max=)`, which JAX has dropped, so that they cannot run at all.

    Args:
        dropout_masks: One of `DROPOUT_MASKS`; "flax" leaves the first as it is.
    """
    changes: tuple[Change, ...] = ()
    if "T5" in model_class.__name__ and "a_max" not in inspect.signature(jnp.clip).parameters:
        changes += (clips_by_max,)
    if dropout_masks == "torch" and calls_attention_weights(model_class):
        changes += (masks_each_row,)
    model_class = rebuilt(model_class, changes) if changes else model_class
    name, call = model_class.__name__, model_class.__call__

    @functools.wraps(call)
    def electra(self, input_ids, attention_mask=None, token_type_ids=None, *args, **kwargs):
        ids = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return call(self, input_ids, attention_mask, ids, *args, **kwargs)

    @functools.wraps(call)
    def dinov2(self, pixel_values, *args, **kwargs):
        size, got = self.config.image_size, tuple(pixel_values.shape[-2:])
        if got != (size, size):
            raise ValueError(f"{name} is right only for images of {(size, size)}, got {got}: resize the images")
        return call(self, pixel_values, *args, **kwargs)

    if name.startswith(("FlaxElectra", "FlaxDinov2")):
        body = {"__call__": electra if "Electra" in name else dinov2, "__module__": model_class.__module__}
        return type(name, (model_class,), body)
    return model_class


def clips_by_max(copy: types.ModuleType) -> None:
    """Gives T5's attention a bucket of positions that runs without `jnp.clip(a_max=)`."""
    for part in vars(copy).values():
        if hasattr(part, "_relative_position_bucket"):
            part._relative_position_bucket = staticmethod(_relative_position_bucket)


def _relative_position_bucket(
    relative_position: jax.Array, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> jax.Array:
    """T5's bucket of a signed distance; names and defaults are those of the method that it replaces."""
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative_position > 0, num_buckets, 0)
        distance = jnp.abs(relative_position)
    else:
        offset = jnp.zeros_like(relative_position)
        distance = jnp.maximum(-relative_position, 0)
    exact = num_buckets // 2  # one bucket a distance below this, logarithmically wider ones from here on
    octaves = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = exact + (octaves * (num_buckets - exact)).astype("i4")
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))
