"""Which of a function's inputs its outputs depend on, as its traced program says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

# What a function raises that looks at values and so cannot be traced without them.
_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def unused(fn: Callable[[Any], Any], inputs: Mapping[str, Any], names: Sequence[str]) -> list[str] | None:
    """Those of `names` whose entry in `inputs`, a mapping of pytrees, no output of `fn(inputs)` depends on.

    Dead code is eliminated from the program, within its loops and inner calls too; an input that is then left over was
    never used. Nothing is run. None for a function that cannot be traced, since it looks at values.
    """
    leaves, structure = jax.tree.flatten(inputs)

    def arrays(leaves: list[Any]) -> list[Any]:
        outputs = jax.tree.leaves(fn(jax.tree.unflatten(structure, leaves)))
        return [leaf for leaf in outputs if isinstance(leaf, jax.Array)]

    try:
        closed = jax.make_jaxpr(arrays)(leaves)
    except _NEEDS_VALUES:
        return None
    _, kept = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    uses = jax.tree.unflatten(structure, kept)
    return [name for name in names if not any(jax.tree.leaves(uses[name]))]


def never_changes(fn: Callable[[Any], Any], inputs: Mapping[str, Any], names: Sequence[str], out: Any) -> list[str]:
    """`names`, if `fn(inputs)` is still `out` where their entries are NaN; else none of them.

    For a function that `unused` cannot trace: it is run a second time.
    """
    broken = {name: jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), inputs[name]) for name in names}
    try:
        other = fn({**inputs, **broken})
    except (ValueError, TypeError, ArithmeticError, AssertionError):  # what it says of a NaN
        return []
    structures: list[Any] = [jax.tree.structure(one) for one in (out, other)]
    same = structures[0] == structures[1] and all(map(np.array_equal, jax.tree.leaves(out), jax.tree.leaves(other)))
    return list(names) if same else []
