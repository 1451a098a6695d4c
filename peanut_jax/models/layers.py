"""The layers of the decoder as Linen modules: norm, attention, MLP, and the stack of them.

Module names are transformers' (`q_proj` ... `down_proj`), so that target_modules mean the same; the layers are one
`nn.scan` stack called `layers`. Matrix products take `dtype`; norms, softmax and rotary angles are float32.

References:
    transformers 4.57, `models/{llama,mistral,qwen2,qwen3}/modeling_*.py`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies
from jaxtyping import Array, Float

from peanut_jax.models.attention.cached import Seen, attend_cached
from peanut_jax.models.attention.roads import attend_rows
from peanut_jax.models.attention.sight import RESIDUALS, Window, layer_windows
from peanut_jax.models.cache import extend, of_layer
from peanut_jax.models.decoder_config import DecoderConfig
from peanut_jax.models.rope import rotate
from peanut_jax.xla_cpu import LOW_RANK

# What a remat policy may keep, by name: what attention multiplies, the sum after it, and gate and up. They are named
# behind the dense layers, so that of an adapted one the sum is kept, and not its two parts.
QKV, AFTER_ATTENTION, WIDE = "qkv", "after_attention", "wide"
_ATTENTION = (QKV, RESIDUALS, AFTER_ATTENTION, LOW_RANK)
_KEPT = {"full": (), "attention": _ATTENTION, "dots": (*_ATTENTION, WIDE)}


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (scale * x.astype(self.dtype)).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings.

    The keys of a prompt, or of one token a row, also go into the slots of a cache, if there is one. A prompt attends to
    itself alone; one token (`mask` is a `Seen`) to the slots of its layer.
    """

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, positions, mask, window, slots, layer):
        config = self.config
        batch, seq, _ = x.shape

        def heads(name: str, count: int) -> Array:
            y = nn.Dense(count * config.head_dim, use_bias=config.qkv_bias, dtype=self.dtype, name=name)(x)
            if isinstance(mask, Seen):  # or XLA on TPU lets the heads choose the kernel's layout, and copies the kernel
                y = jax.lax.optimization_barrier(y)
            return y.reshape(batch, seq, count, config.head_dim)

        q = heads("q_proj", config.num_attention_heads)
        k = heads("k_proj", config.num_key_value_heads)
        v = heads("v_proj", config.num_key_value_heads)
        v = checkpoint_name(v, QKV)
        if config.qk_norm:  # whose backward pass needs what it was given
            q, k = checkpoint_name(q, QKV), checkpoint_name(k, QKV)
            q = RMSNorm(config.rms_norm_eps, self.dtype, name="q_norm")(q)
            k = RMSNorm(config.rms_norm_eps, self.dtype, name="k_norm")(k)
        q, k = rotate(q, positions, config.rope), rotate(k, positions, config.rope)
        if not config.qk_norm:
            q, k = checkpoint_name(q, QKV), checkpoint_name(k, QKV)
        if slots is not None:
            slots = extend(slots, layer, k, v, mask.slot if isinstance(mask, Seen) else 0)
        if isinstance(mask, Seen):
            y = attend_cached(q, *of_layer(slots, layer), mask, window.limit())
        else:
            y = attend_rows(q, k, v, mask, window, config.attention)
        y = y.reshape(batch, seq, config.num_attention_heads * config.head_dim)
        y = nn.Dense(config.hidden_size, use_bias=config.out_bias, dtype=self.dtype, name="o_proj")(y)
        return y, slots


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def dense(name: str, width: int, y: Array) -> Array:
            return nn.Dense(width, use_bias=self.config.mlp_bias, dtype=self.dtype, name=name)(y)

        wide = self.config.intermediate_size
        gate, up = (checkpoint_name(dense(name, wide, x), WIDE) for name in ("gate_proj", "up_proj"))
        return dense("down_proj", self.config.hidden_size, nn.silu(gate) * up)


class Layer(nn.Module):
    """Norm, attention, norm, MLP, with residuals.

    What the layers hand on is (x, slots): the slots of one layer with `layer` None, or those of the whole stack with
    this one's number in it, so that a scan carries them and writes to them in place. None without a cache.
    """

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, carry, positions, mask, window, layer):
        x, slots = carry
        eps = self.config.rms_norm_eps
        attention = Attention(self.config, self.dtype, name="self_attn")
        h = RMSNorm(eps, self.dtype, name="input_layernorm")(x)
        y, slots = attention(h, positions, mask, window, slots, layer)
        x = checkpoint_name(x + y, AFTER_ATTENTION)
        x = x + MLP(self.config, self.dtype, name="mlp")(RMSNorm(eps, self.dtype, name="post_attention_layernorm")(x))
        return (x, slots), None


class Layers(nn.Module):
    """The layers one after the other, `0` to `n - 1`, called as the scanned stack is."""

    config: DecoderConfig
    dtype: Any
    layer: Any

    @nn.compact
    def __call__(self, carry, positions, mask, windows, layers):
        x, slots = carry
        kept = []
        for i in range(self.config.num_hidden_layers):
            window = Window(None, (self.config.windows[i],))
            own = None if slots is None else (slots[0][i], slots[1][i])
            (x, own), _ = self.layer(self.config, self.dtype, name=str(i))((x, own), positions, mask, window, None)
            kept.append(own)
        return (x, None if slots is None else tuple(zip(*kept, strict=True))), None


def remat_policy(remat: str) -> Callable[..., bool]:
    """What `DecoderConfig.remat`, other than "none", keeps of a layer, as `jax.checkpoint` takes it."""
    return checkpoint_policies.save_only_these_names(*_KEPT[remat])


def _stack(config: DecoderConfig, dtype: Any) -> nn.Module:
    """The layers, rematerialised as the config says, and scanned or one after the other."""
    layer: Any = Layer
    if config.remat != "none":
        layer = nn.remat(Layer, policy=remat_policy(config.remat), prevent_cse=not config.scan_layers)
    if not config.scan_layers:
        return Layers(config, dtype, layer)
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast, 0, 0),
        length=config.num_hidden_layers,
        unroll=config.unroll,
    )
    return scanned(config, dtype)


class Model(nn.Module):
    """Embedding, the layers, the last norm."""

    config: DecoderConfig
    dtype: Any

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype)
        self.layers = _stack(config, self.dtype)
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)

    def __call__(self, tokens, positions, mask, cache):
        config = self.config
        windows = layer_windows(config.windows)
        slots = None if cache is None else (cache.keys, cache.values)
        layers = None if cache is None else jnp.arange(config.num_hidden_layers)
        (x, slots), _ = self.layers((self.embed_tokens(tokens), slots), positions, mask, windows, layers)
        return self.norm(x), slots
