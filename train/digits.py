"""scikit-learn's handwritten digits as a task: 0-4 to pretrain on, 5-9 to adapt to. Nothing is downloaded.

1,797 grey pictures of 8 x 8 pixels, about 180 of each digit.

References:
    `sklearn.datasets.load_digits`; the test part of https://doi.org/10.24432/C50P49.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int, PyTree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from peanut_jax.methods.base import Method
from peanut_jax.models import hf
from peanut_jax.sharding import Rules, shard
from peanut_jax.trainer.checks import check_choice
from peanut_jax.trainer.rows import Row, digest_arrays
from peanut_jax.trainer.tasks.base import Direction, Task
from peanut_jax.trainer.tasks.losses import classification_sums, mean_loss

SPLIT_SEED = 0
N_CLASSES = 5
BODY, HEAD = "vit", "classifier"  # the modules of the ViT
LOW, HIGH = "0-4", "5-9"
# Half of the second set is for testing, so that one picture is no more than about 0.2 points of accuracy.
_TEST_FRACTION = {LOW: 0.2, HIGH: 0.5}


class Pictures(NamedTuple):
    """Pictures in [-1, 1], channels first as HF's image models take them, and labels 0 to 4; both on the host."""

    images: Float[np.ndarray, "n 1 8 8"]
    labels: Int[np.ndarray, " n"]


class PictureRows:
    """Pictures as rows of a task."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures.labels)

    def __getitem__(self, i: int) -> Row:
        images, labels = self.pictures
        return {"images": images[i], "labels": labels[i], "weights": np.ones((), np.float32)}

    def digest(self) -> str:
        """Every picture and label; see `peanut_jax.trainer.rows.Digested`."""
        return digest_arrays(self.pictures._asdict())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """A ViT of HF transformers on five of the digits.

    Attributes:
        model: Folder of the checkpoint.
        digits: "0-4", with the checkpoint's own head, or "5-9", with a new one that is drawn from the run's seed.
    """

    METRICS: ClassVar[Mapping[str, Direction]] = {"loss": "min", "accuracy": "max"}
    evaluation: ClassVar[str] = "pictures that are not trained on"

    model: str
    digits: str = HIGH

    def __post_init__(self) -> None:
        check_choice("task.digits", self.digits, (LOW, HIGH))

    def check(self, adapter: Method) -> None:
        """Refuses an adapter that leaves a new head untrained.

        Raises:
            ValueError: as said.
        """
        if self.digits == HIGH and HEAD not in (adapter.modules_to_save or ()):
            raise ValueError(
                f"adapter.modules_to_save must name the new head {HEAD!r}, got {adapter.modules_to_save!r}"
            )

    def build(self, mesh: Mesh, rules: Rules | None, seed: int) -> Task:
        """The ViT and the pictures; see `peanut_jax.trainer.tasks.base.TaskConfig`."""
        new_modules = (HEAD,) if self.digits == HIGH else ()
        model, params = hf.load(self.model, "image-classification", seed=seed, new_modules=new_modules)

        # Knows nothing of adapters: the library adapts the model from outside.
        def sums(params: PyTree, batch: Any) -> dict[str, jax.Array]:
            logits = model(batch["images"], params=params).logits
            return classification_sums(logits, batch["labels"], batch["weights"])

        def loss_fn(params: PyTree, batch: Any, key: Any) -> Any:
            return mean_loss(sums(params, batch))  # no key: this model has no dropout

        train, test = split(self.digits)
        return Task(
            params=shard(params, mesh, rules or [(".*", PartitionSpec())]),
            loss_fn=loss_fn,
            sums=sums,
            train=PictureRows(train),
            evaluation=PictureRows(test),
            unit="pictures",
            count=lambda batch: batch["labels"].size,
        )


def split(digits: str) -> tuple[Pictures, Pictures]:
    """(Pictures to train on, pictures to test on) of the digits "0-4" or "5-9", the same at every call."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    chosen = (labels >= N_CLASSES) == (digits == HIGH)
    return stratified(Pictures(images[chosen], labels[chosen].astype(np.int32) % N_CLASSES), _TEST_FRACTION[digits])


def stratified(pictures: Pictures, test_fraction: float) -> tuple[Pictures, Pictures]:
    """Divides pictures at random with a fixed seed, each label in the same proportion on both sides."""
    images, labels = pictures
    parts = train_test_split(images, labels, test_size=test_fraction, stratify=labels, random_state=SPLIT_SEED)
    train_images, test_images, train_labels, test_labels = parts
    return Pictures(train_images, train_labels), Pictures(test_images, test_labels)
