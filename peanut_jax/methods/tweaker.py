"""The mathematics: the tweaker f of PEANuT and the low-rank factors it gives. Arrays in, arrays out.

Nothing here knows a path, a module, a config or a mesh. A kernel may carry leading layer axes (an `nn.scan` stack):
every function broadcasts over them.

    output orientation                       input orientation: the same network on W0^T
    z = act(W0 @ A)            [d_in, r]     z = act(W0^T @ A)           [d_out, r]
    z = encoders, decoders of z              z = encoders, decoders of z
    left = z, right = scaling * B            left = scaling * B^T, right = z^T
    dW = left @ right          [d_in, d_out]

`scaling` is folded into the B side, so that whoever holds a pair needs nothing else.

References:
    arXiv:2410.01870v3, sections 3.1 and 3.2; huggingface/peft 0.21.2 `peft/tuners/peanut/layer.py`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Theta = dict[str, Array]
Factors = tuple[Array, Array]
Shapes = dict[str, tuple[int, ...]]


def shapes(d_in: int, d_out: int, r: int, depth: int, orientation: str) -> Shapes:
    """The shapes of theta: A [side, r], B [r, side], and for depth > 0 the stacked E and D [depth, r, r].

    `side` is d_out for the output orientation and d_in for the input one.
    """
    side = d_out if orientation == "output" else d_in
    pairs = {"encoders": (depth, r, r), "decoders": (depth, r, r)} if depth else {}
    return {"a": (side, r), "b": (r, side), **pairs}


def lora_shapes(d_in: int, d_out: int, r: int) -> Shapes:
    """The shapes of LoRA's A [d_in, r] and B [r, d_out]."""
    return {"a": (d_in, r), "b": (r, d_out)}


def init(key: PRNGKeyArray, shapes: Shapes, stack: tuple[int, ...] = (), zero_b: bool = True) -> Theta:
    """Draws theta: every matrix uniform in +-1/sqrt(fan_in), B zero so that the update starts at exactly 0.

    Args:
        key: Consumed whole.
        shapes: Name -> shape of one layer; fan_in is the axis before the last.
        stack: Leading layer axes.
        zero_b: False draws B as well.

    Returns:
        Name -> float32 array [*stack, *shape].

    References:
        `torch.nn.init.kaiming_uniform_(a=sqrt(5))` in `PeanutLayer.reset_peanut_parameters` of peft 0.21.2.
    """
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        if name == "b" and zero_b:
            return jnp.zeros(stack + shape, jnp.float32)
        bound = shape[-2] ** -0.5
        return jax.random.uniform(keys[name], stack + shape, jnp.float32, -bound, bound)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def _times(kernel: Array, m: Array) -> Array:
    """W0 @ m, operands in the kernel's dtype, accumulated in float32."""
    return jnp.matmul(kernel, m.astype(kernel.dtype), preferred_element_type=jnp.float32)


def _transposed_times(kernel: Array, m: Array) -> Array:
    """W0^T @ m as (m^T @ W0)^T. XLA on CPU runs the first 2 to 8 times slower than the second (measured, r 32, sides
    1024 to 4096), and would simplify the second back into the first across a missing barrier."""
    product = jnp.matmul(_t(m).astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
    return _t(lax.optimization_barrier(product))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _read(kernel: Array, a: Array, orientation: str) -> Array:
    """What A reads off the frozen kernel: W0 @ A, or W0^T @ A. Differentiable in A alone; W0's cotangent is zero.

    Its own rule, because the cotangent is float32 where the kernel may be bfloat16: the rule that JAX derives would
    hold a float32 copy of W0 to multiply the two.
    """
    return _times(kernel, a) if orientation == "output" else _transposed_times(kernel, a)


def _read_forward(kernel: Array, a: Array, orientation: str) -> tuple[Array, Array]:
    return _read(kernel, a, orientation), kernel


def _read_backward(orientation: str, kernel: Array, g: Array) -> tuple[None, Array]:
    return None, _transposed_times(kernel, g) if orientation == "output" else _times(kernel, g)


_read.defvjp(_read_forward, _read_backward)


def hidden(
    kernel: Float[Array, "*layers d_in d_out"],
    theta: PyTree[Float[Array, "..."]],
    *,
    act: Callable[[Array], Array],
    orientation: str,
) -> Float[Array, "*layers read r"]:
    """The tweaker up to its last layer: z, one row for each row of W0 (output) or column of W0 (input orientation).

    z_0 = act(W0 @ A); encoders z_i = act(z_{i-1} @ E_i), each input kept; decoders z = act(z @ D_i) + the last kept.

    Args:
        kernel: W0, frozen: no gradient reaches it.
        theta: float32 `a`, `b` and, for depth > 0, `encoders` and `decoders` [*layers, depth, r, r].
        act: The nonlinearity, elementwise.
        orientation: "output" or "input".

    Returns:
        z in float32; `read` is d_in for the output orientation, d_out for the input one.

    References:
        arXiv:2410.01870v3, equations 4 and 5; `PeanutLayer._compute_delta_weight` of peft 0.21.2.
    """
    z = act(_read(kernel, theta["a"], orientation))
    if "encoders" not in theta:
        return z
    return _recomputed_pairs(z, theta["encoders"], theta["decoders"], act)


def _pairs(z: Array, encoders: Array, decoders: Array, act: Callable[[Array], Array]) -> Array:
    kept = []
    for i in range(encoders.shape[-3]):
        kept.append(z)
        z = act(z @ encoders[..., i, :, :])
    for i in range(decoders.shape[-3]):
        z = act(z @ decoders[..., i, :, :]) + kept.pop()
    return z


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recomputed_pairs(z: Array, encoders: Array, decoders: Array, act: Callable[[Array], Array]) -> Array:
    """The encoder/decoder pairs on z [*layers, read, r], computed again in the backward pass.

    Their r x r products are cheap; an array of z's size for each of their steps, held through the whole train step for
    every kernel of the model, is not.
    """
    return _pairs(z, encoders, decoders, act)


def _pairs_forward(z: Array, encoders: Array, decoders: Array, act: Callable[[Array], Array]):
    return _pairs(z, encoders, decoders, act), (z, encoders, decoders)


def _pairs_backward(act: Callable[[Array], Array], saved: tuple[Array, Array, Array], g: Array):
    z, encoders, decoders = saved
    # 0 * g makes the second computation wait for the cotangent. XLA on CPU drops the barriers of jax.checkpoint before
    # it schedules, and then keeps the arrays of the first one: 1.027 of LoRA's temporary bytes, against 1.005.
    _, pullback = jax.vjp(partial(_pairs, act=act), z + 0 * g, encoders, decoders)
    return pullback(g)


_recomputed_pairs.defvjp(_pairs_forward, _pairs_backward)


def factors(
    kernel: Float[Array, "*layers d_in d_out"],
    theta: PyTree[Float[Array, "..."]],
    *,
    act: Callable[[Array], Array],
    scaling: float | Float[Array, ""],
    orientation: str,
) -> tuple[Float[Array, "*layers d_in r"], Float[Array, "*layers r d_out"]]:
    """(left, right) with dW = left @ right; `scaling` is folded into the side that holds B.

    Returns:
        float32 arrays whatever the kernel's dtype; whoever multiplies casts to the dtype it works in.

    References:
        arXiv:2410.01870v3, section 3.2.
    """
    z = hidden(kernel, theta, act=act, orientation=orientation)
    b = scaling * theta["b"]
    return (z, b) if orientation == "output" else (_t(b), _t(z))


def lora_factors(
    theta: PyTree[Float[Array, "..."]], *, act: Callable[[Array], Array], scaling: float | Float[Array, ""]
) -> tuple[Float[Array, "*layers d_in r"], Float[Array, "*layers r d_out"]]:
    """(left, right) of LoRA: act(A) and scaling * B, blind to W0. The identity as `act` is LoRA itself."""
    return act(theta["a"]), scaling * theta["b"]


def delta(
    left: Float[Array, "*layers d_in r"], right: Float[Array, "*layers r d_out"]
) -> Float[Array, "*layers d_in d_out"]:
    """dW = left @ right in full float32. Only merging forms it; training and serving never do."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def _t(m: Array) -> Array:
    return jnp.swapaxes(m, -1, -2)
