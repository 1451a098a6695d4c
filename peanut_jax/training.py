"""Training: a step that differentiates the adapters alone, and the optax way for one tree that holds everything."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from peanut_jax.adapters import Adapters, check_key, compute_updates, labels, with_saved
from peanut_jax.frontends.linen import applying, bind
from peanut_jax.methods.base import Method, checked
from peanut_jax.methods.fields import is_real

LossFn = Callable[[PyTree, PyTree, PRNGKeyArray], Any]


@struct.dataclass
class TrainState:
    """All that changes in training; the base parameters are not in it.

    Attributes:
        step: Optimizer steps taken.
        adapters: From `init`.
        opt_state: State of the optimizer, for the adapters alone.
        key: PRNG key; each step folds `step` into it, so a resumed run draws what an unbroken one draws.
    """

    step: Int[Array, ""]
    adapters: Adapters
    opt_state: optax.OptState
    key: PRNGKeyArray

    @classmethod
    def create(cls, adapters: Adapters, tx: optax.GradientTransformation, key: PRNGKeyArray) -> "TrainState":
        """The state before the first step. The arrays are copied: the step donates its state's buffers.

        Raises:
            ValueError: an integer for a key, something else than an optimizer.
        """
        check_key(key)
        _check_optimizer(tx)
        adapters = jax.tree.map(jnp.array, adapters)
        return cls(step=jnp.zeros((), jnp.int32), adapters=adapters, opt_state=tx.init(adapters), key=jnp.array(key))


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    config: Method,
    *,
    accumulate_steps: int = 1,
    max_grad_norm: float | None = None,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A jitted `step(state, params, batch) -> (state, metrics)` that updates the adapters and saved modules.

    The tweaker runs once a step: its factors are computed before the microbatches, their cotangents are summed over the
    microbatches, and one pullback at the end turns the sum into theta's gradient. `params` is read and never written.

    Args:
        loss_fn: `loss_fn(params, batch, key) -> loss` or `(loss, metrics)`, written for the plain model; `loss` a
            scalar mean, `metrics` a dict of scalars. With a metric `"weight"` (say the tokens that count), microbatches
            are averaged in proportion to it; without, equally.
        tx: Any optax transformation. `partition` gives adapters and saved modules one each.
        config: The adapters' config; its `dropout` is applied.
        accumulate_steps: Microbatches; the leading axis of every leaf of `batch` is divided into that many.
        max_grad_norm: Clips the global norm of the gradient.

    Returns:
        The step. `state` is donated. metrics: `loss`, `grad_norm` (before clipping) and those of `loss_fn`, on device.

    Raises:
        ValueError: a bad argument; a batch that does not divide by `accumulate_steps`.

    Examples:
        >>> model, batch = nn.Dense(3), {"x": jnp.ones((8, 4)), "y": jnp.ones((8, 3))}
        >>> params = model.init(jax.random.key(0), batch["x"])
        >>> def loss_fn(params, batch, key):
        ...     return optax.l2_loss(model.apply(params, batch["x"]), batch["y"]).mean()
        >>> config, tx = pj.PeanutConfig(r=2, target_modules="all-linear"), optax.adamw(1e-3)
        >>> step = pj.make_train_step(loss_fn, tx, config, max_grad_norm=1.0)
        >>> state = pj.TrainState.create(pj.init(jax.random.key(1), params, config), tx, jax.random.key(2))
        >>> state, metrics = step(state, params, batch)
        >>> int(state.step), sorted(metrics)
        (1, ['grad_norm', 'loss'])
    """
    checked(config)
    _check_optimizer(tx)
    _check_arguments(loss_fn, accumulate_steps, max_grad_norm)

    def loss(seen, params, microbatch, key):
        bound, saved = seen
        adapted = bind(loss_fn, bound, config.dropout)
        result = adapted(with_saved(params, Adapters({}, saved)), microbatch, key)
        value, metrics = result if isinstance(result, tuple) else (result, {})
        if not isinstance(metrics, Mapping):
            got = "array" if isinstance(metrics, jax.Array) else type(metrics).__name__
            raise ValueError(f"loss_fn must return loss or (loss, dict of metrics), got {got} as metrics")
        metrics = {name: jnp.asarray(metric) for name, metric in {"loss": value, "weight": 1.0, **metrics}.items()}
        return value, metrics

    def step(state: TrainState, params: PyTree, batch: PyTree):
        if not isinstance(state, TrainState):
            raise ValueError(f"step takes (state, params, batch), got a {type(state).__name__} first")
        # What the model sees of the adapters: the updates, and the saved modules. Paid once, pulled back once.
        seen, pullback = jax.vjp(lambda a: (compute_updates(a, params, config), a.saved), state.adapters)
        key = jax.random.fold_in(state.key, state.step)

        def grads_of(batch, key):
            with applying({}):  # around the backward pass too, which may trace what a loss of its own rules calls
                return jax.grad(loss, has_aux=True)(seen, params, batch, key)

        if accumulate_steps == 1:
            grads, metrics = grads_of(batch, key)
            del metrics["weight"]
        else:
            grads, metrics = _accumulate(grads_of, seen, _split(batch, accumulate_steps), key, accumulate_steps)
        (grads,) = pullback(grads)
        norm = optax.tree.norm(grads)
        if max_grad_norm is not None:
            grads = _clipped(grads, norm, max_grad_norm)
        changes, opt_state = tx.update(grads, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, changes)
        new = TrainState(step=state.step + 1, adapters=adapters, opt_state=opt_state, key=state.key)
        return new, {**metrics, "grad_norm": norm}

    return jax.jit(step, donate_argnums=0)


def _check_optimizer(tx: Any) -> None:
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise ValueError(f"tx must be an optax transformation such as optax.adamw(1e-3), got {type(tx).__name__}")


def _check_arguments(loss_fn: LossFn, accumulate_steps: Any, max_grad_norm: Any) -> None:
    if not isinstance(accumulate_steps, int) or isinstance(accumulate_steps, bool) or accumulate_steps < 1:
        raise ValueError(f"accumulate_steps must be an integer of at least 1, got {accumulate_steps!r}")
    if max_grad_norm is not None and (not is_real(max_grad_norm) or not max_grad_norm > 0):
        raise ValueError(f"max_grad_norm must be above 0 or None, got {max_grad_norm!r}")
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of (params, batch, key), got {type(loss_fn).__name__}")
    try:
        signature = inspect.signature(loss_fn)
    except ValueError:  # a builtin has none
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ValueError(f"loss_fn must take (params, batch, key), and takes {signature}: {error}") from error


def _clipped(grads: PyTree, norm: Float[Array, ""], largest: float) -> PyTree:
    factor = jnp.minimum(1.0, largest / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)


def _accumulate(grads_of: Callable, seen: PyTree, microbatches: PyTree, key: PRNGKeyArray, n: int):
    """The mean of gradients and metrics over microbatches, by weight, in one `lax.scan`."""

    def weighted(microbatch, key):
        grads, metrics = grads_of(microbatch, key)
        weight = metrics.pop("weight").astype(jnp.float32)
        # The mean over a microbatch in which nothing counts may be 0 / 0; a NaN of any other is to be seen.
        return weight, jax.tree.map(
            lambda v: jnp.where(weight == 0, 0, weight * v.astype(jnp.float32)), (grads, metrics)
        )

    def body(total, xs):
        return jax.tree.map(jnp.add, total, weighted(*xs)), None

    keys = jax.random.split(key, n)
    first = jax.eval_shape(lambda xs: weighted(*jax.tree.map(lambda x: x[0], xs)), (microbatches, keys))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    (weight, sums), _ = jax.lax.scan(body, zeros, (microbatches, keys))
    # Where nothing counts in any of them the sums are 0, and so is the mean.
    grads, metrics = jax.tree.map(lambda s: s / jnp.where(weight == 0, 1, weight), sums)
    grads = jax.tree.map(lambda g, like: g.astype(like.dtype), grads, seen)
    return grads, metrics


def _split(batch: PyTree, n: int) -> PyTree:
    """[B, ...] -> [n, B / n, ...]. Strided, so that a batch axis sharded over devices stays sharded."""

    def split(leaf):
        if not jnp.ndim(leaf):
            raise ValueError("every leaf of batch must have the rows as its first axis to be divided, got a scalar")
        if leaf.shape[0] % n:
            raise ValueError(f"a batch of {leaf.shape[0]} does not divide into accumulate_steps={n} microbatches")
        return jnp.swapaxes(leaf.reshape(leaf.shape[0] // n, n, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def partition(
    *, adapters: optax.GradientTransformation, saved: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One optimizer for the adapters and another for the saved modules, as with a learning rate for the head.

    Examples:
        >>> params = {"query": {"kernel": jnp.ones((4, 6))}, "head": {"kernel": jnp.ones((6, 2))}}
        >>> config = pj.PeanutConfig(r=2, target_modules=["query"], modules_to_save=["head"])
        >>> adapters = pj.init(jax.random.key(0), params, config)
        >>> tx = pj.partition(adapters=optax.sgd(1.0), saved=optax.sgd(0.5))
        >>> changes, _ = tx.update(jax.tree.map(jnp.ones_like, adapters), tx.init(adapters))
        >>> float(changes.theta["query/kernel"]["a"][0, 0]), float(changes.saved["head/kernel"][0, 0])
        (-1.0, -0.5)
    """
    return optax.partition({"adapter": adapters, "saved": saved}, labels)


def trainable_mask(tree: PyTree) -> PyTree:
    """For a tree `{"params": params, "adapters": adapters}`: the same tree, True under "adapters", False elsewhere.

    Raises:
        ValueError: if the tree has no "adapters".
    """
    if "adapters" not in tree:
        raise ValueError(f"the tree must hold its adapters under 'adapters', got the keys {sorted(tree)}")
    return {name: jax.tree.map(lambda _, on=(name == "adapters"): on, subtree) for name, subtree in tree.items()}


def freeze(
    tx: optax.GradientTransformation, mask: Callable[[PyTree], PyTree] = trainable_mask
) -> optax.GradientTransformation:
    """`tx` for the leaves that `mask` marks; the others get a zero update and no optimizer state.

    For code that keeps one tree. `make_train_step` is faster: it never asks for a gradient of the base.

    Args:
        tx: Any optax transformation.
        mask: tree -> tree of bools, True where `tx` applies.

    Examples:
        >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
        >>> adapters = pj.init(jax.random.key(0), params, pj.PeanutConfig(r=2, target_modules=["query"]))
        >>> tree = {"params": params, "adapters": adapters}
        >>> tx = pj.freeze(optax.sgd(1.0))
        >>> changes, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree))
        >>> {name: float(jax.tree.leaves(part)[0].max()) for name, part in changes.items()}
        {'adapters': -1.0, 'params': 0.0}
    """

    def names(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda on: "train" if on else "freeze", mask(tree))

    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, names)
