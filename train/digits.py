"""scikit-learn's handwritten digits as a pretraining task (0-4) and a task to adapt to (5-9). Nothing is downloaded.

1,797 grey pictures of 8 x 8 pixels, about 180 of each digit.

References:
    `sklearn.datasets.load_digits`; the test part of https://doi.org/10.24432/C50P49.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLIT_SEED = 0
N_CLASSES = 5


class Pictures(NamedTuple):
    """Pictures in [-1, 1], channels first as HF's image models take them, and labels 0 to 4."""

    images: Float[Array, "n 1 8 8"]
    labels: Int[Array, " n"]


class Task(NamedTuple):
    """Pictures to train on, and others to test on."""

    train: Pictures
    test: Pictures


def tasks() -> tuple[Task, Task]:
    """(Digits 0-4 to pretrain on, digits 5-9 relabelled 0-4 to adapt to), the same at every call.

    Half of the second task is for testing, so that one picture is no more than about 0.2 points of accuracy.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    high = labels >= N_CLASSES
    return (
        split(images[~high], labels[~high], test_fraction=0.2),
        split(images[high], labels[high] - N_CLASSES, test_fraction=0.5),
    )


def split(images: np.ndarray, labels: np.ndarray, test_fraction: float) -> Task:
    """Divides pictures at random with a fixed seed, each label in the same proportion on both sides."""
    parts = train_test_split(images, labels, test_size=test_fraction, stratify=labels, random_state=SPLIT_SEED)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
    return Task(Pictures(train_images, train_labels), Pictures(test_images, test_labels))


def batches(pictures: Pictures, seed: int, batch_size: int, n_steps: int) -> Iterator[Pictures]:
    """`n_steps` batches in a shuffled order that depends on `seed` alone; every epoch is shuffled anew."""
    rng = np.random.default_rng(seed)
    n = len(pictures.labels)
    n_epochs = -(-n_steps * batch_size // n)
    order = np.concatenate([rng.permutation(n) for _ in range(n_epochs)])
    for start in range(0, n_steps * batch_size, batch_size):
        rows = order[start : start + batch_size]
        yield Pictures(pictures.images[rows], pictures.labels[rows])
