"""The nonlinearities of the tweaker; a name shared with HF transformers' `ACT2FN` means the same function."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _sin(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sin(2 pi x), the paper's periodic activation (arXiv:2410.01870v3, appendix B). Not in `ACT2FN`."""
    return jnp.sin(2 * jnp.pi * x)


def _identity(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "relu6": jax.nn.relu6,
    "elu": jax.nn.elu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "sin": _sin,
    "linear": _identity,
}
