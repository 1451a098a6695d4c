"""New parameters of transformers' Flax models, drawn as PyTorch's class of the same name draws them.

Flax's classes leave most kernels at Linen's default, LeCun normal: a standard deviation of 0.051 for a head on MiniLM's
384 columns, where PyTorch's class, and so HF PEFT, draws normal(0, initializer_range=0.02). Every line of `RULES` comes
from `_init_weights` in transformers 4.57.6 (models/*/modeling_*.py); the tests compare all with what PyTorch draws.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Keys = tuple[str, ...]
Shape = tuple[int, ...]
Draw = Callable[[jax.Array, Shape], jax.Array]  # a key and a shape -> float32 values
Rule = Callable[[Any, Shape], Draw]  # the configuration and the shape of the module's kernel -> how to draw

_NORMAL_ENDS = 5.5  # in standard deviations: what `jax.random.normal` can give in float32


def normal(std: float) -> Draw:
    """Values from normal(0, std)."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def truncated(std: float) -> Draw:
    """Values from normal(0, std) cut at -2 and 2, as `torch.nn.init.trunc_normal_` does: not at 2 deviations."""
    if std * _NORMAL_ENDS < 2:
        return normal(std)
    return lambda key, shape: std * jax.random.truncated_normal(key, -2 / std, 2 / std, shape)


def uniform(low: float, high: float) -> Draw:
    """Values from [low, high)."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=low, maxval=high)


def constant(value: float) -> Draw:
    """One value everywhere."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def _number(config: Any, field: str) -> float:
    value = getattr(config, field, None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(
            f"PyTorch draws new parameters of {config.model_type!r} by its configuration's {field}, which must be a "
            f"finite number from 0 on, got {str(value)[:40]!r}: pass {field}= a number such as 0.02"
        )
    return float(value)


def _fan_in(config: Any, kernel: Shape) -> int:
    return math.prod(kernel[:-1])


def _by(draw: Callable[[float], Draw], field: str) -> Rule:
    return lambda config, kernel: draw(_number(config, field))


def _always(draw: Draw) -> Rule:
    return lambda config, kernel: draw


def _factor(divisor: Callable[[Any, Shape], float], field: str = "initializer_factor") -> Rule:
    """Normal, with a field of the configuration over the root of a number."""
    return lambda config, kernel: normal(_number(config, field) / math.sqrt(divisor(config, kernel)))


def _of_vision(rule: Rule) -> Rule:
    """A rule of CLIP's vision tower times the factor of the whole model."""

    def scaled(config: Any, kernel: Shape) -> Draw:
        draw, factor = rule(config.vision_config, kernel), _number(config, "initializer_factor")
        return lambda key, shape: factor * draw(key, shape)

    return scaled


def _linear(config: Any, kernel: Shape) -> Draw:
    """What `torch.nn.Linear` draws by itself, for its bias too."""
    bound = _fan_in(config, kernel) ** -0.5
    return uniform(-bound, bound)


def _he_in(config: Any, kernel: Shape) -> Draw:
    return normal(math.sqrt(2 / _fan_in(config, kernel)))


def _he_out(config: Any, kernel: Shape) -> Draw:
    return normal(math.sqrt(2 / (math.prod(kernel[:-2]) * kernel[-1])))


Rules = tuple[tuple[str, Rule | None], ...]
_ZERO, _ONE = _always(constant(0.0)), _always(constant(1.0))
_COMMON: Rules = (
    (r"(^|/)(kernel|embedding)$", _by(normal, "initializer_range")),
    (r"(^|/)(scale|weight|var)$", _ONE),
    (r"(^|/|_)(bias|mean)$", _ZERO),
)
_INIT_STD: Rules = ((r"(^|/)(kernel|embedding)$", _by(normal, "init_std")),)
_VIT: Rules = (
    (r"/mask_token$", _ZERO),
    (r"(^|/)(kernel|cls_token|position_embeddings)$", _by(truncated, "initializer_range")),
)
_RESNET: Rules = ((r"^(params/)?classifier/", _linear), (r"(^|/)kernel$", _he_out))
_T5: Rules = (
    (r"(^|/)(shared|lm_head)/", _factor(lambda config, kernel: 1)),
    (r"/q/kernel$", _factor(lambda config, kernel: config.d_model * config.d_kv)),
    (r"relative_attention_bias/embedding$", _factor(lambda config, kernel: config.d_model)),
    (r"(^|/)kernel$", _factor(_fan_in)),
    (r"(^|/)weight$", _by(constant, "initializer_factor")),
)

RULES: dict[str, Rules] = {
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "opt", "pegasus", "xglm"), _INIT_STD),
    "beit": (
        (r"/(cls_token|relative_position_bias_table)$", _ZERO),
        (r"/lambda_[12]$", _by(constant, "layer_scale_init_value")),
    ),
    "clip": (
        (r"^logit_scale$", _by(constant, "logit_scale_init_value")),
        (r"^text_model/embeddings/", _factor(lambda config, kernel: 0.02**-2)),
        (r"/class_embedding$", _factor(lambda config, kernel: kernel[-1])),
        (r"^vision_model/embeddings/", _of_vision(_by(normal, "initializer_range"))),
        (r"^text_model/.*/([qkv]_proj|fc2)/kernel$", _factor(lambda c, k: _residual(c.text_config))),
        (r"^vision_model/.*/([qkv]_proj|fc2)/kernel$", _factor(lambda c, k: _residual(c.vision_config))),
        (r"/fc1/kernel$", _factor(lambda config, kernel: 2 * kernel[0])),
        (r"(^|/)kernel$", _factor(_fan_in)),
    ),
    "dinov2": (*_VIT, (r"/lambda1$", _by(constant, "layerscale_value"))),
    "gemma": ((r"(^|/)weight$", _ZERO),),  # its norms multiply by 1 + weight
    "gpt2": ((r"/c_proj/kernel$", _factor(lambda config, kernel: 2 * config.n_layer, "initializer_range")),),
    "longt5": _T5,
    "mt5": _T5,
    "regnet": ((r"/attention/\d/bias$", _linear), *_RESNET),
    "resnet": _RESNET,
    "t5": _T5,
    "vit": _VIT,
    "wav2vec2": (
        (r"/pos_conv_embed/", None),  # PyTorch's draw does not reach the kernel behind its weight norm
        (r"(^|/)(project_hid|project_q|feature_projection/projection)/", _linear),
        (r"/weight_proj/kernel$", _always(normal(1.0))),
        (r"(/codevectors|masked_spec_embed)$", _always(uniform(0.0, 1.0))),
        (r"(^|/)conv/kernel$", _he_in),
        (r"(^|/)conv/bias$", _linear),
    ),
    "whisper": ((r"encoder/embed_positions/", None), *_INIT_STD),  # the sinusoids that Flax's class writes too
}
"""Model type -> where PyTorch's class draws otherwise than `_COMMON`, first match first. None: as Flax's class does."""

# Embeddings with a row for padding, which PyTorch sets to zero.
_PADDED = re.compile(r"(^|/)(word_embeddings|embed_tokens|shared)/embedding$")
_PADDED_POSITIONS = re.compile(r"(^|/)(word|position)_embeddings/embedding$")
_UNPADDED = {"bloom", "longt5", "mt5", "t5"}


def _residual(config: Any) -> int:
    return config.hidden_size * 2 * config.num_hidden_layers


def draw_of(config: Any, path: Keys, shapes: Mapping[Keys, Shape]) -> Draw | None:
    """How PyTorch's class draws a parameter.

    Args:
        config: The configuration of a transformers model.
        path: The parameter's place in Flax's tree.
        shapes: Path -> shape of all of the model's parameters.

    Returns:
        What draws it, or None where Flax's class is to.

    Raises:
        ValueError: a field of the configuration that scales the draw is not a number.
    """
    name = "/".join(path)
    rules = (*RULES.get(config.model_type, ()), *_COMMON)
    rule = next(rule for pattern, rule in rules if re.search(pattern, name))
    kernel = shapes.get((*path[:-1], "kernel"), shapes[path])
    return _without_padding(rule(config, kernel), config, name) if rule else None


def _without_padding(draw: Draw, config: Any, name: str) -> Draw:
    """`draw`, and zeros in the row of an embedding that stands for padding."""
    kind, row = config.model_type, getattr(config, "pad_token_id", None)
    padded = _PADDED_POSITIONS if "roberta" in kind else _PADDED
    if row is None or kind in _UNPADDED or not padded.search(name):
        return draw
    return lambda key, shape: draw(key, shape).at[row].set(0.0)


def key_of(key: jax.Array, path: Keys) -> jax.Array:
    """A parameter's own key, so that what else is drawn changes nothing."""
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
