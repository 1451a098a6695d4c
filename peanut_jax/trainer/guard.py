"""A loss or gradient that is not finite: made plain to the optimizer, and traced to the leaf that it began in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from peanut_jax.training import LossFn, TrainState


class Guard(NamedTuple):
    """What `guard` keeps in the optimizer's state.

    Attributes:
        streak: Steps in a row, up to the last, whose gradient was not finite.
        worst: Among `jax.tree.leaves` of the gradient, the leaf with the largest norm, a NaN before any number; in a
            streak, that of its first step, since a NaN in the adapters is in every leaf one step later.
    """

    streak: Int[Array, ""]
    worst: Int[Array, ""]


def guard(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, which leaves everything as it is where the gradient or its norm is not finite.

    The norm too: an infinite one is clipped to a gradient of zeros, which the moments would take for a real one.
    """
    tx = optax.apply_if_finite(tx, max_consecutive_errors=jnp.iinfo(jnp.int32).max)  # the loop counts them itself

    def init(params: PyTree) -> tuple[Guard, Any]:
        return Guard(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), tx.init(params)

    def update(grads: PyTree, state: tuple[Guard, Any], params: PyTree | None = None) -> tuple[PyTree, Any]:
        before, inner = state
        squares = jnp.stack([jnp.square(g.astype(jnp.float32)).sum() for g in jax.tree.leaves(grads)])
        finite = jnp.isfinite(squares.sum())
        streak = jnp.where(finite, 0, before.streak + 1)
        worst = jnp.argmax(squares).astype(jnp.int32)  # argmax takes a NaN for the largest
        grads = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), grads)
        updates, inner = tx.update(grads, inner, params)
        return updates, (Guard(streak, jnp.where(streak > 1, before.worst, worst)), inner)

    return optax.GradientTransformation(init, update)


def guarded(loss_fn: LossFn) -> LossFn:
    """`loss_fn` whose gradient is not finite either where the loss is not."""

    def call(params: PyTree, batch: PyTree, key: Any) -> Any:
        loss, metrics = loss_fn(params, batch, key)
        return loss * jnp.where(jnp.isfinite(loss), 1.0, jnp.nan), metrics

    return call


def leaf_name(tree: PyTree, index: int) -> str:
    """The path of leaf number `index` of an adapter, such as `model/layers/self_attn/q_proj/kernel a`."""
    path, _ = jax.tree.leaves_with_path(tree)[index]
    return " ".join(str(part.key) for part in path)


def not_finite(state: TrainState) -> str | None:
    """The first leaf of a state's adapters or optimizer that holds a NaN or an infinity, by name; None without one."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state.opt_state)}
    adapters = {leaf_name(state.adapters, i): leaf for i, leaf in enumerate(jax.tree.leaves(state.adapters))}
    named = {**adapters, **{f"optimizer{name}": leaf for name, leaf in leaves.items()}}
    flags = {name: _is_finite(leaf) for name, leaf in named.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    return next((name for name, fine in jax.device_get(flags).items() if not fine), None)


@jax.jit
def _is_finite(leaf: Array) -> Bool[Array, ""]:
    return jnp.isfinite(leaf).all()
