"""What a task is: the config that says what to train on, and what it builds."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from peanut_jax.methods.base import Method
from peanut_jax.sharding import Rules
from peanut_jax.trainer.rows import Rows
from peanut_jax.training import LossFn

DTYPES = ("bfloat16", "float32")


class Task(NamedTuple):
    """A base, what is asked of it, and data.

    Attributes:
        params: The frozen base, on the mesh.
        loss_fn: As `make_train_step` takes it.
        sums: (params, batch) -> each metric summed over the batch's labels, and `weight`, how many labels those are.
        train, evaluation: Rows to train on, and rows to evaluate on; None for no evaluation. See `Rows` on how changed
            data are told.
        unit: The word for what the rate of training counts, such as "tokens".
        count: batch -> how many of those it holds.
    """

    params: PyTree
    loss_fn: LossFn
    sums: Callable[[PyTree, Any], dict[str, jax.Array]]
    train: Rows
    evaluation: Rows | None
    unit: str
    count: Callable[[Any], int]


@runtime_checkable
class TaskConfig(Protocol):
    """The `task` of a `Run`: a frozen dataclass whose fields JSON can hold, and which builds itself.

    `Classification` and `LanguageModelling` are two; one of your own may stand in the config file that uses it.

    A field that names a place of data may change when a run is resumed, if the data are the same there: such fields
    are listed in `SOURCES`, a class variable that may be left out.

    Attributes:
        METRICS: Names of the metrics in `Task.sums`, of which `loop.best` is one.
        model: Folder or hub name of the base, recorded with the adapter; None where there is none.
        evaluation: Where the evaluation data are; None for no evaluation.
    """

    METRICS: ClassVar[tuple[str, ...]]

    @property
    def model(self) -> str | None: ...

    @property
    def evaluation(self) -> str | None: ...

    def check(self, adapter: Method) -> None:
        """Refuses an adapter with which this task could not be learned.

        Raises:
            ValueError: what does not fit, and how to change it.
        """

    def build(self, mesh: Mesh, rules: Rules | None, seed: int) -> Task:
        """Loads the base onto the mesh and opens the data.

        Args:
            rules: How the base is sharded; None for the architecture's own table.
            seed: Draws a new head.

        Raises:
            FileNotFoundError, ValueError: a model or data that is missing or does not fit, by name.
        """
        ...
