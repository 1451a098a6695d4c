"""One decoder for Llama, Mistral, Qwen2 and Qwen3, in Linen: scanned layers, rematerialisation, fused attention.

Module names are transformers' (`q_proj` ... `down_proj`), so that target_modules mean the same; the layers are one
`nn.scan` stack called `layers`. Matrix products take `dtype`; norms, softmax, rotary angles and the loss are float32.

References:
    transformers 4.57, `models/{llama,mistral,qwen2,qwen3}/modeling_*.py` and `modeling_rope_utils.py`.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_policies
from jaxtyping import Array, Bool, Float, Int, PyTree

from peanut_jax.models.decoder_config import DecoderConfig, Rope
from peanut_jax.training import LossFn

# Later than any position: the window of a layer that sees every key.
_EVERYTHING = np.iinfo(np.int32).max // 2
# Tokens whose logits the loss forms at a time.
CHUNK = 1024


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far.

    Attributes:
        keys, values: [layers, batch, slots, kv_heads, head_dim]; of a model without a scan, a tuple of its layers'.
        positions: [batch, slots] of each slot's token in its sequence; -1 for an empty or padded slot.
        filled: How many slots are taken, padding included.
    """

    keys: PyTree[Float[Array, "*layers batch slots kv_heads head_dim"]]
    values: PyTree[Float[Array, "*layers batch slots kv_heads head_dim"]]
    positions: Int[Array, "batch slots"]
    filled: Int[Array, ""]


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache for `slots` tokens a row."""
    shape = (batch, slots, config.num_key_value_heads, config.head_dim)

    def zeros() -> PyTree:
        if config.scan_layers:
            return jnp.zeros((config.num_hidden_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))

    return Cache(
        keys=zeros(),
        values=zeros(),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def inverse_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair of dimensions (`modeling_rope_utils.py`: default, linear, llama3)."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        inverse = inverse / rope.factor
    elif rope.type == "llama3":
        wavelength = 2 * math.pi / inverse
        turns = rope.original_max_position_embeddings / wavelength
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        inverse = (1 - smooth) * inverse / rope.factor + smooth * inverse
    return inverse.astype(np.float32)


def rotate(x: Float[Array, "batch seq heads head_dim"], positions: Int[Array, "batch seq"], rope: Rope) -> Array:
    """Rotary embedding, halves rotated against each other as transformers lays them out; computed in float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, x.shape[-1])
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


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
    """Grouped-query attention with rotary embeddings."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, positions, mask, window, cache):
        config = self.config
        batch, seq, _ = x.shape

        def heads(name: str, count: int) -> Array:
            y = nn.Dense(count * config.head_dim, use_bias=config.qkv_bias, dtype=self.dtype, name=name)(x)
            return y.reshape(batch, seq, count, config.head_dim)

        q = heads("q_proj", config.num_attention_heads)
        k = heads("k_proj", config.num_key_value_heads)
        v = heads("v_proj", config.num_key_value_heads)
        if config.qk_norm:
            q = RMSNorm(config.rms_norm_eps, self.dtype, name="q_norm")(q)
            k = RMSNorm(config.rms_norm_eps, self.dtype, name="k_norm")(k)
        q, k = rotate(q, positions, config.rope), rotate(k, positions, config.rope)
        if cache is not None:
            keys, values, filled = cache
            k = jax.lax.dynamic_update_slice_in_dim(keys, k.astype(keys.dtype), filled, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), filled, axis=1)
            cache = k, v
        y = attend(q, k.astype(q.dtype), v.astype(q.dtype), mask, window, config.attention)
        y = y.reshape(batch, seq, config.num_attention_heads * config.head_dim)
        y = nn.Dense(config.hidden_size, use_bias=config.out_bias, dtype=self.dtype, name="o_proj")(y)
        return y, cache


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: "Mask | None",
    window: Int[Array, ""] | None,
    attention: str = "auto",
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention.

    Args:
        mask: None is causal: every key up to the query's own.
        window: Keys further back than this many positions, the query's own counted, are not seen.
        attention: As in `DecoderConfig`. `jax.nn.dot_product_attention` itself always takes XLA (jax 0.10).
    """
    nvidia = jax.default_backend() == "gpu" and "NVIDIA" in jax.devices()[0].device_kind
    if attention == "auto":
        attention = "cudnn" if nvidia and fits_cudnn(q.dtype, q.shape[-1], q.shape[1], k.shape[1]) else "xla"
    implementation: Any = attention
    if mask is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    allowed = mask.allowed if window is None else mask.allowed & (mask.distance < window)
    return jax.nn.dot_product_attention(q, k, v, mask=allowed[:, None], implementation=implementation)


def fits_cudnn(dtype: Any, head_dim: int, queries: int, keys: int) -> bool:
    """Whether cuDNN's fused kernel takes these shapes, forward and backward, on any card it supports (jax 0.10,
    `check_is_flash_attention` in `_src/cudnn/fused_attention_stablehlo.py`); not a single query, as in decoding."""
    sixteen = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return sixteen and head_dim % 8 == 0 and head_dim <= 128 and queries > 1 and queries % 2 == 0 and keys % 2 == 0


@flax.struct.dataclass
class Mask:
    """Which keys a query sees, and how many positions back each is."""

    allowed: Bool[Array, "batch seq keys"]
    distance: Int[Array, "batch seq keys"]


def make_mask(
    positions: Int[Array, "batch seq"],
    key_positions: Int[Array, "batch keys"],
    segments: Int[Array, "batch seq"] | None,
    key_segments: Int[Array, "batch keys"] | None,
) -> Mask:
    """A query at position p of its segment sees the keys of the same segment at 0 to p; -1 marks padding."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    allowed = (distance >= 0) & (key_positions >= 0)[:, None, :]
    if segments is not None and key_segments is not None:
        allowed &= segments[:, :, None] == key_segments[:, None, :]
    return Mask(allowed, distance)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def dense(name: str, width: int, y: Array) -> Array:
            return nn.Dense(width, use_bias=self.config.mlp_bias, dtype=self.dtype, name=name)(y)

        wide = self.config.intermediate_size
        gated = nn.silu(dense("gate_proj", wide, x)) * dense("up_proj", wide, x)
        return dense("down_proj", self.config.hidden_size, gated)


class Layer(nn.Module):
    """Norm, attention, norm, MLP, with residuals."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, positions, mask, window, cache):
        eps = self.config.rms_norm_eps
        attention = Attention(self.config, self.dtype, name="self_attn")
        y, cache = attention(RMSNorm(eps, self.dtype, name="input_layernorm")(x), positions, mask, window, cache)
        x = x + y
        x = x + MLP(self.config, self.dtype, name="mlp")(RMSNorm(eps, self.dtype, name="post_attention_layernorm")(x))
        return x, cache


class Layers(nn.Module):
    """The layers one after the other, `0` to `n - 1`, called as the scanned stack is."""

    config: DecoderConfig
    dtype: Any
    layer: Any

    @nn.compact
    def __call__(self, x, positions, mask, windows, cache):
        kept = []
        for i in range(self.config.num_hidden_layers):
            window = None if windows is None else windows[i]
            own = None if cache is None else tuple(part[i] for part in cache)
            x, own = self.layer(self.config, self.dtype, name=str(i))(x, positions, mask, window, own)
            kept.append(own)
        return x, None if cache is None else tuple(zip(*kept, strict=True))


class Model(nn.Module):
    """Embedding, the scanned layers, the last norm."""

    config: DecoderConfig
    dtype: Any

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype)
        layer: Any = Layer
        if config.remat != "none":
            policy = checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
            layer = nn.remat(Layer, policy=policy, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, 0),
                length=config.num_hidden_layers,
                unroll=config.unroll,
            )
            self.layers = stack(config, self.dtype)
        else:
            self.layers = Layers(config, self.dtype, layer)
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)

    def __call__(self, tokens, positions, mask, cache):
        config = self.config
        windows = None
        if any(window is not None for window in config.windows):
            windows = jnp.array([_EVERYTHING if window is None else window for window in config.windows])
        layer_cache = None
        if cache is not None:
            layer_cache = (cache.keys, cache.values, jnp.broadcast_to(cache.filled, (config.num_hidden_layers,)))
        x, kept = self.layers(self.embed_tokens(tokens), positions, mask, windows, layer_cache)
        return self.norm(x), kept


class Decoder(nn.Module):
    """A causal language model.

    Attributes:
        config: From `decoder_config.read_config`, or `load_decoder`.
        dtype: Of activations and matrix products; parameters keep their own.
    """

    config: DecoderConfig
    dtype: Any = jnp.bfloat16

    def setup(self):
        self.model = Model(self.config, self.dtype)
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Dense(self.config.vocab_size, use_bias=False, dtype=self.dtype, dot_general=_float32_dot)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        attention_mask: Int[Array, "batch seq"] | None = None,
        *,
        segments: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of every token, in float32.

        Args:
            tokens: Token ids.
            attention_mask: 1 for tokens, 0 for padding on either side. None: no padding.
            segments: For packed rows, the number of the sequence that a token belongs to, from 1; 0 is padding.
            positions: Of each token in its sequence; by default counted from the first token of the row or segment.
        """
        return self._logits(self.hidden(tokens, attention_mask, segments=segments, positions=positions))

    def hidden(self, tokens, attention_mask=None, *, segments=None, positions=None):
        """What the head reads: [batch, seq, hidden_size]. Arguments as for `__call__`."""
        plain = attention_mask is None and segments is None and positions is None
        real = jnp.ones_like(tokens, bool) if attention_mask is None else attention_mask.astype(bool)
        if segments is not None:
            real &= segments != 0
            segments = _numbered(segments)
        if positions is None:
            positions = _counted(real, segments)
        key_positions = jnp.where(real, positions, -1)
        causal = plain and not any(self.config.windows)
        mask = None if causal else make_mask(positions, key_positions, segments, segments)
        if mask is not None:  # positions may begin again without segments, and still no token sees a later one
            mask = Mask(jnp.tril(mask.allowed), mask.distance)
        # A padding id may lie outside the vocabulary, where an embedding is NaN, and 0 * NaN is NaN.
        return self.model(jnp.where(real, tokens, 0), positions, mask, None)[0]

    def step(
        self, tokens: Int[Array, "batch seq"], real: Bool[Array, "batch seq"], cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Appends tokens to the cache; the logits after the last one.

        Args:
            tokens: A prompt, padded on the left, or one token a row.
            real: False for padding.
            cache: Needs room for the tokens.
        """
        positions = cache.positions.max(-1, keepdims=True) + jnp.cumsum(real, -1)
        positions = jnp.maximum(positions, 0)
        key_positions = jax.lax.dynamic_update_slice_in_dim(
            cache.positions, jnp.where(real, positions, -1), cache.filled, axis=1
        )
        mask = make_mask(positions, key_positions, None, None)
        x, kept = self.model(tokens, positions, mask, cache)
        filled = cache.filled + tokens.shape[1]
        return self._logits(x[:, -1:])[:, 0], Cache(kept[0], kept[1], key_positions, filled)

    def loss(
        self,
        tokens: Int[Array, "batch seq"],
        labels: Int[Array, "batch seq"],
        weights: Float[Array, "batch seq"],
        attention_mask: Int[Array, "batch seq"] | None = None,
        *,
        segments: Int[Array, "batch seq"] | None = None,
        chunk: int = CHUNK,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Summed cross-entropy and the sum of the weights, never holding more than `chunk` tokens' logits.

        Args:
            labels: The token that follows each token; any id where the weight is 0.
            weights: 0 for tokens that do not count: padding, the prompt of an instruction.
            chunk: Tokens whose float32 logits [chunk, vocab] exist at a time, in the backward pass too; of a batch that
                is spread over devices, those of all devices together.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        x = self.hidden(tokens, attention_mask, segments=segments)
        batch, seq = tokens.shape
        # Cut along the sequence: a batch that is spread over devices stays so.
        columns = min(seq, max(1, chunk // batch))
        padding = -seq % columns

        def chunks(array: Array) -> Array:
            padded = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
            return jnp.moveaxis(padded.reshape(batch, -1, columns, *array.shape[2:]), 1, 0)

        def one(module: "Decoder", total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
            h, label, weight = (array.reshape(-1, *array.shape[2:]) for array in part)
            logits = module._logits(h)
            # A sum over a mask, for a gather's gradient would be another array of the logits' size.
            its_own = jnp.arange(logits.shape[-1]) == label[:, None]
            picked = jnp.where(its_own, logits, 0.0).sum(-1)
            return total + ((jax.nn.logsumexp(logits, axis=-1) - picked) * weight).sum(), None

        body = nn.scan(
            nn.remat(one, prevent_cse=False), variable_broadcast="params", split_rngs={"params": False, "dropout": True}
        )
        weights = weights.astype(jnp.float32)
        total, _ = body(self, jnp.zeros((), jnp.float32), (chunks(x), chunks(labels), chunks(weights)))
        return total, weights.sum()

    def _logits(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        if self.config.tie_word_embeddings:
            embedding = self.model.embed_tokens.embedding.astype(x.dtype)
            return jnp.einsum("...d,vd->...v", x, embedding, preferred_element_type=jnp.float32)
        return self.lm_head(x)


def variable_shapes(model: Decoder) -> PyTree:
    """The model's variables as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def kept_dtype(path: str, dtype: Any) -> Any:
    """The dtype of a parameter of a model that is loaded in `dtype`: norms stay float32."""
    return jnp.float32 if path.endswith("scale") else dtype


def language_loss(model: Decoder, chunk: int = CHUNK) -> LossFn:
    """`loss_fn` for `make_train_step`: the mean cross-entropy of the labels that count, 0 where none does.

    Its batches hold `tokens`, `labels`, `weights` and `segments`, each [batch, seq], as `Decoder.loss` takes them.
    """

    def loss_fn(params: PyTree, batch: Any, key: Any) -> tuple[Array, dict[str, Array]]:
        total, weight = summed_loss(model, params, batch, chunk)
        return total / jnp.where(weight > 0, weight, 1.0), {"weight": weight}

    return loss_fn


def summed_loss(model: Decoder, params: PyTree, batch: Any, chunk: int = CHUNK) -> tuple[Array, Array]:
    """The sum over such a batch, and the sum of its weights."""
    tokens, labels, weights = batch["tokens"], batch["labels"], batch["weights"]
    segments = batch["segments"]
    return model.apply(params, tokens, labels, weights, segments=segments, chunk=chunk, method="loss")  # type: ignore[return-value]


def _float32_dot(*args: Any, **kwargs: Any) -> Array:
    """Operands as they are, the result in float32: logits keep what bfloat16 would round off."""
    return jax.lax.dot_general(*args, **{**kwargs, "preferred_element_type": jnp.float32})


def _counted(real: Bool[Array, "batch seq"], segments: Int[Array, "batch seq"] | None) -> Int[Array, "batch seq"]:
    """Each token's position in its row or segment, padding left out; 0 for padding before the first token."""
    counted = jnp.cumsum(real, axis=-1) - 1
    if segments is not None:
        counted -= jax.lax.cummax(jnp.where(_starts(segments), counted, 0), axis=1)
    return jnp.maximum(counted, 0)


def _starts(segments: Int[Array, "batch seq"]) -> Bool[Array, "batch seq"]:
    first = jnp.ones_like(segments[:, :1], bool)
    return jnp.concatenate([first, segments[:, 1:] != segments[:, :-1]], axis=-1)


def _numbered(segments: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Runs of one number as segments of their own, so that a number that comes again is another sequence."""
    return jnp.where(segments != 0, jnp.cumsum(_starts(segments), axis=-1), 0)
