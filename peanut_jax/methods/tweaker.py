"""The mathematics of PEANuT: the tweaker f and the low-rank factors it gives. Arrays in, arrays out.

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
from jaxtyping import Array, Float, PyTree

from peanut_jax import xla_cpu
from peanut_jax.matrices import Matrix
from peanut_jax.updates import LowRank


def hidden(
    kernel: Matrix,
    theta: PyTree[Float[Array, "..."]],
    *,
    act: Callable[[Array], Array],
    orientation: str,
) -> Float[Array, "*layers read r"]:
    """The tweaker up to its last layer: z, one row for each row of W0 (output) or column of W0 (input orientation).

    z_0 = act(W0 @ A); encoders z_i = act(z_{i-1} @ E_i), each input kept; decoders z = act(z @ D_i) + the last kept.

    Args:
        kernel: W0 [*layers, d_in, d_out], frozen: no gradient reaches it.
        theta: float32 `a`, `b` and, for depth > 0, `encoders` and `decoders` [*layers, depth, r, r].
        act: The nonlinearity, elementwise.
        orientation: "output" or "input".

    Returns:
        z in float32; `read` is d_in for the output orientation, d_out for the input one.

    References:
        arXiv:2410.01870v3, equations 4 and 5; `PeanutLayer._compute_delta_weight` of peft 0.21.2.
    """
    read = kernel.times if orientation == "output" else kernel.transposed_times
    z = act(read(theta["a"]))
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
    _, pullback = jax.vjp(partial(_pairs, act=act), xla_cpu.waiting_for(z, g), encoders, decoders)
    return pullback(g)


_recomputed_pairs.defvjp(_pairs_forward, _pairs_backward)


def factors(
    kernel: Matrix,
    theta: PyTree[Float[Array, "..."]],
    *,
    act: Callable[[Array], Array],
    scaling: float | Float[Array, ""],
    orientation: str,
) -> LowRank:
    """The update dW = left @ right; `scaling` is folded into the side that holds B.

    Returns:
        float32 arrays whatever the kernel's dtype; whoever multiplies casts to the dtype it works in.

    References:
        arXiv:2410.01870v3, section 3.2.
    """
    z = hidden(kernel, theta, act=act, orientation=orientation)
    b = scaling * theta["b"]
    return LowRank(z, b) if orientation == "output" else LowRank(_t(b), _t(z))


def _t(m: Array) -> Array:
    return jnp.swapaxes(m, -1, -2)
