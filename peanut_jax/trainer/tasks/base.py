"""What a task is: the config that says what to train on, and what it builds."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from peanut_jax.methods.base import Method
from peanut_jax.sharding import Rules
from peanut_jax.trainer.rows import Rows
from peanut_jax.training import LossFn

DTYPES = ("bfloat16", "float32")
Direction = Literal["min", "max"]
DIRECTIONS: tuple[Direction, ...] = ("min", "max")


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
        remats: Remat policy -> the loss_fn with it, the one that recomputes the least first. The first whose step fits
            the devices' memory is taken in the place of `loss_fn`; none: `loss_fn` is.
    """

    params: PyTree
    loss_fn: LossFn
    sums: Callable[[PyTree, Any], dict[str, jax.Array]]
    train: Rows
    evaluation: Rows | None
    unit: str
    count: Callable[[Any], int]
    remats: Mapping[str, LossFn] = MappingProxyType({})


@runtime_checkable
class TaskConfig(Protocol):
    """The `task` of a `Run`: a frozen dataclass whose fields JSON can hold, and which builds itself.

    `Classification` and `LanguageModelling` are two; one of your own may stand in the config file that uses it.

    A field that names a place of data may change when a run is resumed, if the data are the same there: such fields
    are listed in `SOURCES`, a class variable that may be left out. `FREE` is another, for fields that say how, and not
    what, is computed, and may change too.

    Attributes:
        METRICS: Each metric in `Task.sums`, of which `loop.best` is one, and whether its "min" or "max" is the best. A
            tuple of names says it of "loss" alone, whose best is its "min".
        model: Folder or hub name of the base, recorded with the adapter; None where there is none.
        evaluation: Where the evaluation data are; None for no evaluation.
    """

    @property
    def METRICS(self) -> Mapping[str, Direction] | tuple[str, ...]: ...

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


def directions(metrics: Any) -> dict[str, Direction | None]:
    """Whether "min" or "max" is the best of each of a task's `METRICS`; None where they do not say.

    Raises:
        ValueError: what is neither a mapping from names to these two nor a tuple of names.
    """
    if isinstance(metrics, (tuple, list)):
        metrics = {name: "min" if name == "loss" else None for name in metrics}
        allowed: tuple[Any, ...] = (*DIRECTIONS, None)
    else:
        allowed = DIRECTIONS
    if not isinstance(metrics, Mapping) or not metrics:
        raise ValueError(f'METRICS must be like {{"loss": "min", "accuracy": "max"}}, got {metrics!r}')
    for name, best in metrics.items():
        if not isinstance(name, str) or best not in allowed:
            raise ValueError(f"METRICS must say 'min' or 'max' of each metric's name, got {best!r} of {name!r}")
    return dict(metrics)
