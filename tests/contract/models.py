"""The front ends that the contract holds for: tiny models that differ in how their dense kernels are stored and called.

Each is a `Case`: a function of (params, inputs), its parameters, inputs, and the targets to adapt.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import (
    AlbertConfig,
    BertConfig,
    FlaxAlbertModel,
    FlaxBertModel,
    FlaxGPT2LMHeadModel,
    GPT2Config,
)

import peanut_jax as pj

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 40)


@dataclasses.dataclass(frozen=True)
class Case:
    """A front end: `fn(params, x)`, and what to adapt in it."""

    fn: Callable[..., jax.Array]
    params: Any
    x: jax.Array
    targets: Any
    axes: Any = None

    def config(self, **fields: Any) -> pj.PeanutConfig:
        return pj.PeanutConfig(
            **{"r": 3, "target_modules": self.targets, "init_weights": False, "kernel_axes": self.axes, **fields}
        )

    def cast(self, dtype: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(dtype), self.params)


def random_like(shapes: Any) -> Any:
    """Normal parameters for a tree of shapes: no initialiser to compile. LayerNorm scales (and only they) near 1."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if str(getattr(path[-1], "key", path[-1])) in ("scale", "weight") else 0.0
        return jnp.asarray(centre + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def linen(model: nn.Module, x: jax.Array, targets: Any, traced_axes: bool = False) -> Case:
    variables = random_like(jax.eval_shape(model.init, jax.random.key(1), x))
    axes = pj.kernel_axes(model.apply, variables, x) if traced_axes else None
    return Case(model.apply, variables, x, targets, axes)


def hf(family: type, config: Any, targets: Any, call: Callable) -> Case:
    model = family(config, _do_init=False, input_shape=(1, 4))
    params = random_like(jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, 4))))
    return Case(lambda params, x: call(partial(model, params=params), x), params, TOKENS, targets)


class Mlp(nn.Module):
    """Plain nn.Dense, one module called twice, and a head tied to the embedding (so not a kernel)."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, 16)
        shared = nn.Dense(16, name="shared")
        x = embed(tokens)
        x = x + shared(nn.tanh(shared(x)))
        return embed.attend(nn.Dense(16, name="out", use_bias=False)(x))


class Attention(nn.Module):
    """nn.DenseGeneral with several output axes, several input axes, no bias, and a batch axis of the kernel."""

    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((2, 5), name="q", use_bias=False)(x)
        v = nn.DenseGeneral((2, 5), name="v")(x)
        mixed = nn.DenseGeneral(16, axis=(-2, -1), name="o", use_bias=False)(nn.tanh(q) * v)
        heads = mixed.reshape(*mixed.shape[:-1], 2, 8).transpose(2, 0, 1, 3)
        per_head = nn.DenseGeneral(8, axis=-1, batch_dims=(0,), name="per_head")(heads)
        turned = nn.DenseGeneral(7, axis=(-1, 0), name="last_and_first", use_bias=False)(per_head)
        return turned


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.tanh(nn.Dense(12, name="up", use_bias=False)(x))
        return x + nn.Dense(16, name="down")(h), None


class Scanned(nn.Module):
    """nn.scan over nn.remat."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


class Vmapped(nn.Module):
    """nn.vmap: an ensemble, every member with its own kernels."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(None, None), axis_size=3
        )
        return members(name="members")(x, None)[0].sum(0)


X = jax.random.normal(jax.random.key(2), (2, 6, 16))
BUILD: dict[str, Callable[[], Case]] = {
    "dense": lambda: linen(Mlp(), TOKENS, ["shared", "out"]),
    "dense_general": lambda: linen(Attention(), X, "all-linear", traced_axes=True),
    "scan_remat": lambda: linen(Scanned(), X, ["up", "down"]),
    "vmap": lambda: linen(Vmapped(), X, ["up", "down"]),
    "bert": lambda: hf(
        FlaxBertModel,
        BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=8),
        ["query", "value", "intermediate.dense"],
        lambda model, x: model(x).last_hidden_state,
    ),
    "gpt2": lambda: hf(
        FlaxGPT2LMHeadModel,
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8),
        ["c_attn", "c_proj", "c_fc"],
        lambda model, x: model(x).logits,
    ),
    "albert": lambda: hf(
        FlaxAlbertModel,
        AlbertConfig(**SMALL, intermediate_size=24, max_position_embeddings=8, embedding_size=8),
        ["query", "ffn"],
        lambda model, x: model(x).last_hidden_state,
    ),
}


compiled = cache(jax.jit)
"""jit, of which every test of a front end shares the result."""


@cache
def case_of(name: str) -> Case:
    """A front end, built once."""
    return BUILD[name]()
