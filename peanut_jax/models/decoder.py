"""One decoder for Llama, Mistral, Qwen2 and Qwen3, in Linen: scanned layers, rematerialisation, fused attention.

Matrix products take `dtype`; norms, softmax, rotary angles, logits and the loss are float32. The layers are in
`peanut_jax.models.layers`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from peanut_jax.base.kernels import BOUND, COLLECTION
from peanut_jax.matrices import float32_dot
from peanut_jax.models.attention.cached import Seen
from peanut_jax.models.attention.sight import count_positions, make_sight
from peanut_jax.models.cache import Cache
from peanut_jax.models.decoder_config import DecoderConfig
from peanut_jax.models.head_loss import Chunk, chunked, cross_entropy, head_loss
from peanut_jax.models.layers import Model
from peanut_jax.models.token_ids import check_known
from peanut_jax.training import LossFn

# A batch's, of jax or numpy.
Integers = Int[Array | np.ndarray, "batch seq"]
Booleans = Bool[Array | np.ndarray, "batch seq"]
# Tokens whose logits the loss forms at a time.
CHUNK = 1024


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
            self.lm_head = nn.Dense(self.config.vocab_size, use_bias=False, dtype=self.dtype, dot_general=float32_dot)

    def __call__(
        self,
        tokens: Integers,
        attention_mask: Integers | Booleans | None = None,
        *,
        segments: Integers | None = None,
        positions: Integers | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of every token, in float32.

        Args:
            tokens: Token ids. One outside the vocabulary is an error where the values are known. Under `jax.jit` they
                are not: the logits of its whole row are then NaN, those of earlier positions too (a key of NaN makes
                a NaN of every sum that it has no weight in), so check ids on the host. JAX makes an int32 of a 64-bit
                id by dropping its upper half.
            attention_mask: 1 for tokens, 0 for padding on either side. None: no padding.
            segments: For packed rows, the number of the sequence that a token belongs to, from 1; 0 is padding.
            positions: Position of each token in its sequence; by default counted from the first token of the row or
                segment.

        Raises:
            ValueError: tokens that are not integers, or an id outside the vocabulary that is not padding.
        """
        return self._logits(self.hidden(tokens, attention_mask, segments=segments, positions=positions))

    def hidden(self, tokens, attention_mask=None, *, segments=None, positions=None):
        """What the head reads: [batch, seq, hidden_size]. Arguments as for `__call__`."""
        return self._read(tokens, attention_mask, segments, positions, None)[0]

    def _read(self, tokens, attention_mask, segments, positions, cache):
        """What the head reads of whole rows, and the cache's slots, if there is one, with their keys and values."""
        check_known("tokens", tokens, self.config.vocab_size, attention_mask, segments)
        real = None if attention_mask is None else jnp.asarray(attention_mask, bool)
        if segments is not None:
            segments = jnp.asarray(segments)
            real = segments != 0 if real is None else real & (segments != 0)
        sight = make_sight(tokens.shape, real, segments, None if positions is None else jnp.asarray(positions))
        ids = self._ids(tokens)
        # A padding id may lie outside the vocabulary, where an embedding is NaN, and 0 * NaN is NaN.
        ids = ids if real is None else jnp.where(real, ids, 0)
        return self.model(ids, sight.positions, sight, cache)

    def prompt(
        self, tokens: Int[Array, "prompts seq"], real: Bool[Array, "prompts seq"], cache: Cache
    ) -> tuple[Float[Array, "prompts vocab"], Cache]:
        """Fills an empty cache with prompts, and gives the logits after their last tokens.

        Args:
            tokens: Prompts, padded on the left.
            real: False for padding.
            cache: Needs room for the tokens. It may have several rows a prompt, which stand together.
        """
        x, slots = self._read(tokens, real, None, None, cache)
        positions = jnp.where(real, count_positions(real, None), -1)
        positions = jnp.repeat(positions, len(cache.positions) // len(tokens), axis=0)
        positions = lax.dynamic_update_slice(cache.positions, positions, (0, 0))
        return self._logits(x[:, -1]), Cache(slots[0], slots[1], positions, jnp.int32(tokens.shape[1]))

    def step(self, token: Int[Array, " rows"], cache: Cache) -> tuple[Float[Array, "rows vocab"], Cache]:
        """Appends one token a row to the cache, and gives the logits after it.

        Args:
            cache: After `prompt`, with a slot that is not yet filled.
        """
        check_known("token", token, self.config.vocab_size)
        position = cache.positions.max(-1, keepdims=True) + 1
        positions = lax.dynamic_update_slice(cache.positions, position, (0, cache.filled))
        seen = Seen(positions >= 0, position - positions, cache.filled)
        x, slots = self.model(self._ids(token[:, None]), position, seen, cache)
        return self._logits(x[:, 0]), Cache(slots[0], slots[1], positions, cache.filled + 1)

    def loss(
        self,
        tokens: Integers,
        labels: Integers,
        weights: Float[Array | np.ndarray, "batch seq"] | Integers | Booleans,
        attention_mask: Integers | Booleans | None = None,
        *,
        segments: Integers | None = None,
        chunk: int = CHUNK,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Summed cross-entropy and the sum of the weights, never holding more than `chunk` tokens' logits.

        Args:
            labels: The token that follows each token; any id where the weight is 0. Elsewhere one outside the
                vocabulary is an error where the values are known, and makes the sum NaN under `jax.jit`.
            weights: 0 for tokens that do not count: padding, the prompt of an instruction.
            chunk: Tokens whose float32 logits [chunk, vocab] exist at a time, in the backward pass too; of a batch that
                is spread over devices, those of all devices together.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        check_known("labels", labels, self.config.vocab_size, weights)
        x = self.hidden(tokens, attention_mask, segments=segments)
        batch, seq = tokens.shape
        columns = min(seq, max(1, chunk // batch))
        labels, weights = jnp.asarray(labels), jnp.asarray(weights, jnp.float32)
        parts = chunked(x, columns), chunked(labels, columns), chunked(weights, columns)
        kernel = self._plain_head()
        if kernel is not None:
            total = head_loss(parts[0], kernel, *parts[1:], tied=self.config.tie_word_embeddings)
        else:
            total = self._loss_through_head(parts)
        return total, weights.sum()

    def _plain_head(self) -> Float[Array, "rows columns"] | None:
        """The head's kernel, or the embedding tied to it; None where the head is more than a product with it."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.embedding
        adapted = self.is_initializing() or self.lm_head.has_variable(COLLECTION, BOUND)
        return None if adapted else self.lm_head.get_variable(COLLECTION, "kernel")

    def _loss_through_head(self, parts: tuple[Array, Array, Array]) -> Float[Array, ""]:
        """The loss of chunks by the module itself, which forms their logits again in the backward pass."""

        def one(module: "Decoder", total: Array, part: Chunk) -> tuple[Array, None]:
            h, label, weight = part
            return total + cross_entropy(module._logits(h), label, weight), None

        body = nn.scan(
            nn.remat(one, prevent_cse=False), variable_broadcast="params", split_rngs={"params": False, "dropout": True}
        )
        return body(self, jnp.zeros((), jnp.float32), parts)[0]

    def _ids(self, tokens: Integers) -> Int[Array, "batch seq"]:
        """The ids for a lookup in which one outside the vocabulary gives NaN: as an index -1 is the last row."""
        ids = jnp.asarray(tokens).astype(jnp.int32)
        return jnp.where(ids < 0, self.config.vocab_size, ids)

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
    Without `segments` each row is one sequence, padded on the right if at all, with weights of 0: attention is then
    plainly causal, which kernels compute fastest.
    """

    def loss_fn(params: PyTree, batch: Any, key: Any) -> tuple[Array, dict[str, Array]]:
        total, weight = summed_loss(model, params, batch, chunk)
        return total / jnp.where(weight > 0, weight, 1.0), {"weight": weight}

    return loss_fn


def summed_loss(model: Decoder, params: PyTree, batch: Any, chunk: int = CHUNK) -> tuple[Array, Array]:
    """The sum over such a batch, and the sum of its weights."""
    tokens, labels, weights = batch["tokens"], batch["labels"], batch["weights"]
    segments = batch.get("segments")
    return model.apply(params, tokens, labels, weights, segments=segments, chunk=chunk, method="loss")  # type: ignore[return-value]
