"""PEANuT in plain float64 NumPy, one matrix at a time, written from the paper and sharing nothing with `peanut_jax`.

References:
    arXiv:2410.01870v3, sections 3.1 and 3.2, equations 4 and 5; appendix B for the sine.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def _gelu(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x):
    return x * _sigmoid(x)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "relu6": lambda x: np.clip(x, 0, 6),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": _silu,
    "swish": _silu,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "softplus": _softplus,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "sin": lambda x: np.sin(2 * math.pi * x),
    "linear": lambda x: x,
}


def tweak(w, a, b, encoders, decoders, act_fn):
    """f(W; theta): act(W A), encoder and decoder pairs with their residuals, then B. The shape of W."""
    act = ACTIVATIONS[act_fn]
    z = act(w @ a)
    kept = []
    for encoder in encoders:
        kept.append(z)
        z = act(z @ encoder)
    for decoder in decoders:
        z = act(z @ decoder) + kept.pop()
    return z @ b


def delta_weight(kernel, theta, *, act_fn, scaling, orientation):
    """dW [d_in, d_out] of one kernel [d_in, d_out].

    Args:
        kernel: W0.
        theta: `a`, `b`, and `encoders`, `decoders` [depth, r, r] where there are any.
        act_fn: A key of `ACTIVATIONS`.
        scaling: Multiplies the update.
        orientation: "output" reads W0, "input" reads W0^T and transposes the result.
    """
    w, a, b = (np.asarray(m, np.float64) for m in (kernel, theta["a"], theta["b"]))
    encoders, decoders = (np.asarray(theta.get(name, []), np.float64) for name in ("encoders", "decoders"))
    if orientation == "output":
        return scaling * tweak(w, a, b, encoders, decoders, act_fn)
    return scaling * tweak(w.T, a, b, encoders, decoders, act_fn).T
