"""Losses that tasks share."""

import jax
import jax.numpy as jnp
import optax


def classification_sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """Cross-entropy, correct answers and weights of the labels, summed over a batch.

    Args:
        logits: [rows, classes], of any floating dtype; computed with in float32.
        labels: [rows] integers.
        weights: [rows], how much each label counts.
    """
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    each = {"loss": loss, "accuracy": logits.argmax(-1) == labels, "weight": 1.0}
    return {name: (values * weights).sum() for name, values in each.items()}


def mean_loss(sums: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, the other metrics), each a mean, as `make_train_step` takes them, from sums over a batch."""
    rest = dict(sums)
    weight = rest.pop("weight")
    means = {name: value / weight for name, value in rest.items()}
    return means.pop("loss"), {**means, "weight": weight}
