"""A PEANuT that begins as a given low-rank update: Proposition 3.2 of the paper."""

import jax.numpy as jnp
import numpy as np

from peanut_jax.methods.activations import ACTIVATIONS
from peanut_jax.methods.base import Theta
from peanut_jax.methods.peanut import PeanutConfig
from peanut_jax.updates import LowRank


def start_from(update: LowRank, kernel: np.ndarray, config: PeanutConfig, slope: float, path: str) -> Theta:
    """Theta whose update is `update`, projected on the left singular space of W0 (of W0^T: input orientation).

    A = [W0^+ left, -W0^+ left] and B = [right; -right] / (c * scaling), where act(x) - act(-x) = c x.

    Args:
        update: Of rank r / 2 at most.
        kernel: W0 [*stack, d_in, d_out].
        config: Its `r` is twice the update's rank.
        slope: c, from `odd_slope`.
        path: Name of the kernel, for the error.

    Raises:
        ValueError: another rank.

    References:
        arXiv:2410.01870v3, Proposition 3.2 and its proof.
    """
    rank = update.left.shape[-1]
    if config.r != 2 * rank:
        raise ValueError(f"config.r must be {2 * rank}, twice the rank of the update of {path!r}, got {config.r}")
    kernel, outer, inner = (np.asarray(array, np.float64) for array in (kernel, update.left, update.right))
    if config.orientation == "input":
        kernel, outer, inner = _t(kernel), _t(inner), _t(outer)
    cutoff = max(kernel.shape[-2:]) * float(jnp.finfo(jnp.float32).eps)
    a, b = np.linalg.pinv(kernel, rcond=cutoff) @ outer, inner / (slope * config.scaling)
    return {
        "a": jnp.asarray(np.concatenate([a, -a], -1), jnp.float32),
        "b": jnp.asarray(np.concatenate([b, -b], -2), jnp.float32),
    }


def odd_slope(config: PeanutConfig) -> float:
    """c in act(x) - act(-x) = c x.

    Raises:
        ValueError: a network that has none, or that is not a PEANuT.
    """
    if not isinstance(config, PeanutConfig):
        raise ValueError(f"config must be a PeanutConfig, got {type(config).__name__}")
    x = np.array([0.1, 0.7, 1.0, 3.0, 20.0], np.float32)
    act = ACTIVATIONS[config.act_fn]
    slopes = np.asarray((act(jnp.asarray(x)) - act(jnp.asarray(-x))) / x)
    if config.depth or not np.allclose(slopes, slopes[0], rtol=1e-5):
        raise ValueError(
            "a LoRA becomes a PEANuT of depth 0 with an activation for which act(x) - act(-x) is c x (relu, "
            f"leaky_relu, gelu, gelu_new, silu, softplus, linear); got depth={config.depth}, act_fn={config.act_fn!r}"
        )
    return float(slopes[0])


def _t(m: np.ndarray) -> np.ndarray:
    return np.swapaxes(m, -1, -2)
