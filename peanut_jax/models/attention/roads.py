"""The roads that attention can take, and which one a program takes: the only place that chooses.

| road | where | memory in the row's length |
|---|---|---|
| splash | TPU | linear |
| cudnn | NVIDIA GPUs, 16-bit | linear; quadratic, one mask a row for all heads, where rows are packed or padded |
| chunked | everywhere | linear |
| xla | everywhere | quadratic, for each head |
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from peanut_jax.models.attention import splash
from peanut_jax.models.attention.chunked import chunked
from peanut_jax.models.attention.sight import Sight, Window, seen
from peanut_jax.sharding import traced_mesh

logger = logging.getLogger(__name__)

# The figures that choose. All but cuDNN's were measured with `benchmarks.attention`, on CPU by time and for TPU v5p by
# libtpu's estimates and schedules: 16 rows of 256 take 0.87 ms with splash and 0.98 with XLA, forward and backward.
# Tokens of a row up to which the scores are formed whole, where no kernel is taken.
SHORT = 512
# Tokens of a row from which splash is faster.
_SPLASH = 256
# Tokens of a packed or padded row up to which cuDNN is given a mask of [seq, seq] for each row: not measured.
_MASKED = 4096


@dataclasses.dataclass(frozen=True)
class Call:
    """What the choice depends on, all of it known when a program is traced.

    Attributes:
        platform: "tpu", "nvidia", or another of jax's.
        alone: The program runs on one device, or its mesh is known.
        packed: Tokens of a row do not all see the earlier ones: segments, padding, positions of the caller's.
        counted: As in `Sight`.
    """

    platform: str
    alone: bool
    dtype: Any
    seq: int
    head_dim: int
    packed: bool
    counted: bool


def attend_rows(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    sight: Sight,
    window: Window,
    attention: str = "auto",
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention of rows to themselves; several heads of queries share a head of keys and values.

    Args:
        attention: As in `DecoderConfig`.

    Raises:
        ValueError: a kernel that is asked for by name and cannot run here.
    """
    road = choose(attention, _call(q, sight))
    if road == "splash":
        run = functools.partial(splash.splash, q, k, v, sight.segments, mesh=traced_mesh())
        return _by_window(window, lambda one: run(window=one))
    if road == "cudnn" and sight.segments is None and sight.counted:
        return _by_window(window, functools.partial(_causal_cudnn, q, k, v))
    if road == "chunked":
        return chunked(q, k, v, sight, window)
    if road == "xla" and sight.segments is None and sight.counted and window.choices == (None,):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    mask = seen(sight, window.limit())[:, None]
    implementation: Any = road
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def choose(attention: str, call: Call) -> str:
    """The road that `attention` of `DecoderConfig` means for a call.

    Raises:
        ValueError: as `attend_rows`.
    """
    if call.seq == 1:  # a token that sees itself, as where variables are made
        return "xla"
    if attention != "auto":
        if why := refusal(attention, call):
            raise ValueError(f"attention={attention!r} cannot run here: {why}. attention='auto' takes another road")
        return attention
    other = "xla" if call.seq <= SHORT else "chunked"
    kernel = {"tpu": "splash", "nvidia": "cudnn"}.get(call.platform)
    if kernel is None or (kernel == "splash" and call.seq < _SPLASH):
        return other
    why = refusal(kernel, call) or _unwise(kernel, call)
    if why:
        _tell(f"attention: {other} in place of {kernel}: {why}")
        return other
    return kernel


def refusal(road: str, call: Call) -> str | None:
    """Why a road cannot be taken; None where it can."""
    if road == "splash":
        return _no_splash(call)
    if road == "cudnn":
        return _no_cudnn(call)
    return None


def _no_splash(call: Call) -> str | None:
    if call.platform != "tpu" and not splash.INTERPRET:
        return (
            f"splash is a kernel for TPUs, and this is traced for {call.platform} (to compile for another machine's "
            "devices, trace inside peanut_jax.sharding.tracing_for(mesh))"
        )
    if not call.counted:
        return "splash counts positions itself, and the call passes positions"
    if jnp.dtype(call.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"splash takes bfloat16 and float32, not {jnp.dtype(call.dtype).name}"
    return None


def _no_cudnn(call: Call) -> str | None:
    if call.platform != "nvidia":
        return f"cuDNN runs on NVIDIA GPUs, and this is traced for {call.platform}"
    if not fits_cudnn(call.dtype, call.head_dim, call.seq, call.seq):
        return (
            f"cuDNN takes 16-bit heads of at most 128, a multiple of 8, and rows of even length, not "
            f"{jnp.dtype(call.dtype).name} heads of {call.head_dim} and rows of {call.seq}"
        )
    return None


def fits_cudnn(dtype: Any, head_dim: int, queries: int, keys: int) -> bool:
    """Whether cuDNN's fused kernel takes these shapes, forward and backward, on every card that it supports.

    It does not take a single query, as in decoding.

    References:
        jax 0.10, `_src/cudnn/fused_attention_stablehlo.py`, check_is_flash_attention.
    """
    sixteen = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return sixteen and head_dim % 8 == 0 and head_dim <= 128 and queries > 1 and queries % 2 == 0 and keys % 2 == 0


def _unwise(road: str, call: Call) -> str | None:
    """Why a road that can be taken is not the one to take unasked."""
    if road == "splash" and not call.alone:
        return (
            "XLA cannot divide it over several devices, and the mesh is not known: trace inside "
            "peanut_jax.sharding.constrain or tracing_for(mesh)"
        )
    if road == "cudnn" and call.packed and call.seq > _MASKED:
        return f"for packed or padded rows of {call.seq} tokens it would take a mask of [{call.seq}, {call.seq}]"
    return None


def _call(q: Array, sight: Sight) -> Call:
    mesh = traced_mesh()
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    nvidia = device.platform == "gpu" and "NVIDIA" in device.device_kind
    packed = sight.segments is not None or not sight.counted
    alone = mesh is not None or jax.device_count() == 1
    platform = "nvidia" if nvidia else device.platform
    return Call(platform, alone, q.dtype, q.shape[1], q.shape[3], packed, sight.counted)


def _by_window(window: Window, run: Callable[[int | None], Array]) -> Array:
    """A kernel is made for one window: where layers of a scan differ, each takes its own."""
    if window.index is None:
        return run(window.choices[0])
    return lax.switch(window.index, [functools.partial(run, one) for one in window.choices])


def _causal_cudnn(q: Array, k: Array, v: Array, window: int | None) -> Array:
    sides = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=sides, implementation="cudnn")


@functools.cache
def _tell(message: str) -> None:
    """Once, however many layers and programs it is true of."""
    logger.warning(message)
