"""What a kernel is: finding dense kernels in a Flax parameter tree, and seeing each as a stack of [d_in, d_out].

Modules store a kernel in their own layout: `nn.Dense` [d_in, d_out], `nn.DenseGeneral` [*in, *out], HF's `FlaxConv1D`
[d_out, d_in], each under leading layer axes inside `nn.scan`. A `Kernel` holds what is needed to move between that
layout and the one of the mathematics.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, PyTree

COLLECTION = "params"
# What a front end binds beside a kernel stands under this name in its module's params, and is not a parameter.
BOUND = "peanut_update"
# A leaf of a parameter tree: a jax or numpy array, or a jax.ShapeDtypeStruct where only shapes are asked for.
Leaf = Any
# Kernel path -> (number of input axes, number of output axes).
Splits = Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One dense kernel: where it is and how its axes divide.

    Attributes:
        path: Slash-separated path of the leaf within the 'params' collection, as `encoder/layer/0/query/kernel`.
        stack: Leading axes that index separate kernels: `nn.scan` layers, or the batch dims of a DenseGeneral.
        ins: Input axes (one for Dense). outs: Output axes.
        transposed: True where the module stores [d_out, d_in] (FlaxConv1D).
    """

    path: str
    stack: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    transposed: bool = False

    @property
    def module(self) -> str:
        """The dotted module path, the name that HF PEFT matches targets against."""
        return module_of(self.path)

    @property
    def d_in(self) -> int:
        return math.prod(self.ins)

    @property
    def d_out(self) -> int:
        return math.prod(self.outs)

    def matrix(self, stored: Leaf) -> Array:
        """The stored kernel as [*stack, d_in, d_out]."""
        stored = jnp.swapaxes(stored, -1, -2) if self.transposed else stored
        return stored.reshape(*self.stack, self.d_in, self.d_out)

    def stored(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        array = matrix.reshape(*self.stack, *self.ins, *self.outs)
        return jnp.swapaxes(array, -1, -2) if self.transposed else array


def module_of(path: str) -> str:
    """`a/b/kernel` -> `a.b`."""
    return path.rpartition("/")[0].replace("/", ".")


def flatten(params: PyTree) -> dict[str, Leaf]:
    """Slash-separated path -> leaf of the 'params' collection.

    Args:
        params: The collection itself (what HF Flax models take) or a Linen variables dict that holds it.

    Raises:
        ValueError: if it is not a mapping of arrays, naming the first leaf that is not one.
    """
    if not isinstance(params, (dict, flax.core.FrozenDict)):
        raise ValueError(f"params must be a nested mapping of arrays, got {type(params).__name__}{_hint(params)}")
    flat = flatten_dict(flax.core.unfreeze(params.get(COLLECTION, params)), sep="/")
    flat = {path: leaf for path, leaf in flat.items() if path.rpartition("/")[2] != BOUND}
    for path, leaf in flat.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            boxed = isinstance(leaf, nn.meta.AxisMetadata)
            hint = "; call flax.linen.meta.unbox(params) first" if boxed else ""
            raise ValueError(
                f"params must be a nested mapping of arrays, but {path!r} is a {type(leaf).__name__}{hint}"
            )
    if not flat:
        raise ValueError("params is empty: pass the model's parameters")
    return flat


def _hint(value: Any) -> str:
    """What to pass instead of something that is not a parameter tree."""
    kind = type(value)
    if kind.__module__.startswith("flax.nnx"):
        return "; peanut_jax adapts Linen modules: an NNX model's state is not a Linen parameter tree"
    if kind.__name__ == "Adapters":
        return ": are adapters and params swapped?"
    if isinstance(value, nn.Module):
        return "; pass the variables that its init returned, not the module"
    return ""


def replace(params: PyTree, leaves: Mapping[str, Array]) -> PyTree:
    """A new tree of the same kind with `leaves` (path -> array) put in; `params` is not touched."""
    tree = flax.core.unfreeze(params)
    within = (COLLECTION,) if COLLECTION in tree else ()
    for path, leaf in leaves.items():
        tree = _put(tree, (*within, *path.split("/")), leaf)
    return flax.core.freeze(tree) if isinstance(params, flax.core.FrozenDict) else tree


def _put(tree: Mapping[str, Any], keys: Sequence[str], leaf: Array) -> dict[str, Any]:
    head, *rest = keys
    return {**tree, head: _put(tree.get(head, {}), rest, leaf) if rest else leaf}


def find(flat: Mapping[str, Leaf], splits: Splits | None = None) -> dict[str, Kernel]:
    """Every dense kernel of a flat tree, by path, in the tree's order.

    A leaf named `kernel` with two axes is one. With more axes a kernel is a layer stack, a DenseGeneral or a
    convolution, which shapes alone do not always tell apart: `splits` decides where given, then the bias (its shape is
    stack + outs), and without a bias every axis but the last two is taken for the stack. The interceptor compares this
    with the module that runs and raises where it was wrong, so a wrong reading is never silent.

    Args:
        flat: Path -> array, from `flatten`.
        splits: From a config's `kernel_axes`.
    """
    splits = splits or {}
    conv1d = _conv1d_blocks(flat)
    found = {}
    for path, leaf in flat.items():
        if not (path == "kernel" or path.endswith("/kernel")) or leaf.ndim < 2:
            continue
        split = splits.get(path) or _axes_from_shapes(path, leaf, flat.get(path.removesuffix("kernel") + "bias"))
        if split is None:
            continue
        n_in, n_out = split
        shape, n_stack = tuple(leaf.shape), leaf.ndim - n_in - n_out
        if n_in < 1 or n_out < 1 or n_stack < 0:
            raise ValueError(f"axes of kernel {path!r} must be (inputs, outputs) within {shape}, got {split}")
        transposed = _block(path) in conv1d and split == (1, 1)
        if transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        found[path] = Kernel(
            path, shape[:n_stack], shape[n_stack : n_stack + n_in], shape[n_stack + n_in :], transposed
        )
    return found


def _axes_from_shapes(path: str, kernel: Leaf, bias: Leaf | None) -> tuple[int, int] | None:
    if kernel.ndim == 2:
        return 1, 1
    if re.search(r"conv", module_of(path).rpartition(".")[2], re.IGNORECASE) or kernel.ndim > 4:
        return None
    if bias is None:
        return (1, 1) if kernel.ndim == 3 else None
    for n_stack in range(kernel.ndim - 2, -1, -1):
        n_out = bias.ndim - n_stack
        n_in = kernel.ndim - n_stack - n_out
        shape = tuple(kernel.shape[:n_stack]) + tuple(kernel.shape[kernel.ndim - n_out :])
        if n_out >= 1 and n_in >= 1 and shape == tuple(bias.shape) and n_in + n_out <= 3:
            return n_in, n_out
    return None


# Only HF's GPT-2 uses FlaxConv1D (transformers 4.57, models/gpt2/modeling_flax_gpt2.py), which stores [d_out, d_in].
# A square kernel does not show it, so it is read off the block: its names, and c_attn [3 d, d] taller than wide (a
# GPT-2 written with nn.Dense has [d, 3 d]).
_CONV1D = re.compile(r"(?P<block>(?:.*/)?)(?:attn|crossattention|mlp)/(?:c_attn|q_attn|c_proj|c_fc)/kernel")


def named_conv1d(path: str) -> bool:
    """Whether the path is one that `find` would take for a FlaxConv1D."""
    return _CONV1D.fullmatch(path) is not None


def _block(path: str) -> str | None:
    match = _CONV1D.fullmatch(path)
    return match["block"] if match else None


def _conv1d_blocks(flat: Mapping[str, Leaf]) -> set[str]:
    return {
        block
        for path, leaf in flat.items()
        if path.endswith("attn/c_attn/kernel") and leaf.ndim >= 2 and leaf.shape[-2] > leaf.shape[-1]
        if (block := _block(path)) is not None
    }
