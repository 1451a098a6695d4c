"""The head's loss by chunks: what autodiff makes of all logits at once, with operands in the activations' dtype."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peanut_jax as pj
from peanut_jax.matrices import float32_dot
from peanut_jax.models.decoder import Decoder, language_loss, variable_shapes
from peanut_jax.models.decoder_config import from_hf
from peanut_jax.models.head_loss import chunked, cross_entropy, head_loss

CHUNKS, TOKENS, WIDTH, VOCAB = 3, 8, 16, 40
FIELDS = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def arguments(dtype, tied):
    """(x, kernel, labels, weights), with tokens that do not count."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (CHUNKS, TOKENS, WIDTH), dtype)
    kernel = jax.random.normal(keys[1], (VOCAB, WIDTH) if tied else (WIDTH, VOCAB), dtype)
    labels = jax.random.randint(keys[2], (CHUNKS, TOKENS), 0, VOCAB)
    return x, kernel, labels, jnp.where(labels % 5 == 0, 0.0, jax.random.uniform(keys[3], labels.shape))


def at_once(x, kernel, labels, weights, tied):
    """The same loss by autodiff, in the dtype of its arguments."""
    logits = x.reshape(-1, WIDTH) @ (kernel.T if tied else kernel)
    return cross_entropy(logits.astype(jnp.float32), labels.reshape(-1), weights.reshape(-1))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients(tied):
    """Of what the head reads, its kernel and the weights: autodiff's in float32, and close to it in bfloat16."""

    def gradients(fn, x, kernel, labels, weights):
        # Divided by what is known after the sum alone, as in training.
        mean = lambda x, kernel, weights: fn(x, kernel, labels, weights, tied) / weights.sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2)))(x, kernel, weights)

    exact = arguments(jnp.float32, tied)
    got, want = gradients(head_loss, *exact), gradients(at_once, *exact)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-6), got, want)

    rounded = arguments(jnp.bfloat16, tied)
    reference = gradients(at_once, *(array.astype(jnp.float32) for array in rounded[:2]), *rounded[2:])
    got = gradients(head_loss, *rounded)
    assert [g.dtype for g in got[1]] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True):
        assert np.linalg.norm(np.float32(g) - w) < 5e-3 * np.linalg.norm(w)


def test_what_is_not_differentiated_is_not_computed():
    """A frozen kernel costs two products, a trained one a third; the value alone costs one."""
    x, kernel, labels, weights = arguments(jnp.bfloat16, tied=False)
    loss = lambda x, kernel: head_loss(x, kernel, labels, weights, tied=False)  # noqa: E731
    functions = loss, jax.grad(loss), jax.grad(loss, argnums=(0, 1)), jax.grad(loss, argnums=1)
    assert [str(jax.make_jaxpr(fn)(x, kernel)).count("dot_general") for fn in functions] == [1, 2, 3, 2]


def test_chunks_keep_rows_apart():
    rows = jnp.arange(10).reshape(2, 5)
    np.testing.assert_array_equal(chunked(rows, 3), [[0, 1, 2, 5, 6, 7], [3, 4, 0, 8, 9, 0]])


def head_products(tied, **config):
    """The operands' dtypes of the products in a bfloat16 train step that have the vocabulary as an axis."""
    model = Decoder(from_hf({**FIELDS, "tie_word_embeddings": tied}))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), variable_shapes(model))
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    method = pj.LoraConfig(r=2, **config)
    adapters = pj.init(jax.random.key(0), params, method)
    ids = jnp.ones((1, 7), jnp.int32)
    batch = {"tokens": ids, "labels": ids, "weights": jnp.ones(ids.shape), "segments": ids}
    forward = pj.adapt(partial(language_loss(model), batch=batch, key=None), method)

    def loss(adapters):
        return forward(pj.Adapters(adapters.theta, adapters.saved), params)[0]

    text = jax.jit(jax.grad(loss)).lower(adapters).as_text()
    dots = re.findall(r"dot_general .* : \(tensor<(\S+)x(\w+)>, tensor<(\S+)x(\w+)>\)", text)
    return [
        (left, right)
        for shape, left, other, right in dots
        if {str(VOCAB), str(WIDTH)} <= {*f"{shape}x{other}".split("x")}
    ]


@pytest.mark.parametrize(
    ("tied", "config", "count"),
    [
        (False, {"target_modules": ["q_proj"]}, 2),
        (True, {"target_modules": ["q_proj"]}, 2),
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 3),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, 3),
        (False, {"target_modules": ["q_proj", "lm_head"]}, 2),
    ],
    ids=["frozen", "frozen-tied", "saved", "saved-tied", "adapted"],
)
def test_no_product_of_the_head_is_float32(tied, config, count):
    """Read from the program, where an adapted head's logits are one function that is called twice."""
    found = head_products(tied, **config)
    assert found == [("bf16", "bf16")] * count


def test_float32_dot_is_differentiated_in_its_operands_dtype():
    x, kernel = jnp.ones((4, 6), jnp.bfloat16), jnp.full((6, 5), 0.5, jnp.bfloat16)
    product = lambda x, kernel: float32_dot(x, kernel, (((1,), (0,)), ((), ())))  # noqa: E731
    value, pullback = jax.vjp(product, x, kernel)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(pullback(jnp.full((4, 5), 3.0))[0], np.full((4, 6), 7.5))
    text = str(jax.make_jaxpr(lambda g: pullback(g))(value))
    assert not re.search(r"preferred_element_type=float32", text)
    _, tangent = jax.jvp(product, (x, kernel), (x, kernel))
    np.testing.assert_array_equal(tangent, np.full((4, 5), 6.0))
