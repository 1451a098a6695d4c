"""Which keys of its own row a query sees, kept in arrays as long as the row and never as [seq, seq]."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# What a remat policy may keep under this name: the output and the logsumexp, where the backward pass needs no more.
RESIDUALS = "attention_residuals"
# Later than any position: the window of a layer that sees every key.
_EVERYTHING = np.iinfo(np.int32).max // 2


@flax.struct.dataclass
class Sight:
    """A query sees itself and the earlier tokens of its segment, no further back than its layer's window.

    Attributes:
        positions: Of each token in its sequence.
        segments: Number of the sequence that a token belongs to; padding is 0 and sees padding alone. None: each row is
            one sequence, and padding, if any, is on the right, where no token sees it.
        counted: Positions go up by one from token to token, so that places in the row tell distances. Where they do
            not, a query does not see a key of a later position either.
    """

    positions: Int[Array, "batch seq"]
    segments: Int[Array, "batch seq"] | None
    counted: bool = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Window:
    """How many keys back a layer's queries see, themselves included.

    Attributes:
        choices: The windows of the layers that share a program; None sees every key.
        index: Which of them the layer has; None where there is one.
    """

    index: Int[Array, "*layers"] | None
    choices: tuple[int | None, ...] = flax.struct.field(pytree_node=False)

    def limit(self) -> Any:
        """The window as an array; None sees every key."""
        if self.choices == (None,):
            return None
        if self.index is None:
            return jnp.asarray(self.choices[0])
        return jnp.array([_EVERYTHING if one is None else one for one in self.choices])[self.index]


def layer_windows(windows: tuple[int | None, ...]) -> Window:
    """The windows of a stack of layers that is scanned."""
    choices = tuple(dict.fromkeys(windows))
    index = None if len(choices) == 1 else jnp.array([choices.index(one) for one in windows])
    return Window(index, choices)


def make_sight(
    shape: tuple[int, ...],
    real: Bool[Array, "batch seq"] | None = None,
    segments: Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
) -> Sight:
    """What the arguments of `Decoder.__call__` mean.

    Args:
        shape: (batch, seq).
        real: False for padding; None where there is none.
        segments: A number that comes again, after another, is another sequence.
        positions: None counts them.
    """
    if segments is not None:
        segments = renumber(segments)
    counted = positions is None
    if positions is None:
        positions = count_positions(jnp.ones(shape, bool) if real is None else real, segments)
    if real is not None:
        segments = jnp.where(real, 1 if segments is None else segments, 0)
    return Sight(positions, segments, counted)


Tokens = tuple[Int[Array, " some"], Int[Array, "batch some"], Int[Array, "batch some"] | None]


def seen(sight: Sight, window: Int[Array, ""] | int | None) -> Bool[Array, "batch seq seq"]:
    """The dense mask, quadratic in the row's length."""
    tokens = jnp.arange(sight.positions.shape[1]), sight.positions, sight.segments
    return between(tokens, tokens, window, sight.counted)


def between(
    queries: Tokens, keys: Tokens, window: Int[Array, ""] | int | None, counted: bool
) -> Bool[Array, "batch queries keys"]:
    """Which of some keys each of some queries sees.

    Args:
        queries, keys: Their places in the row, positions and segments.
        counted: As in `Sight`.
    """
    (place, position, segment), (key_place, key_position, key_segment) = queries, keys
    allowed = (place[:, None] >= key_place)[None]
    if segment is not None and key_segment is not None:
        allowed &= segment[:, :, None] == key_segment[:, None, :]
    if counted and window is None:
        return allowed
    distance = position[:, :, None] - key_position[:, None, :]
    if not counted:
        allowed &= distance >= 0
    return allowed if window is None else allowed & (distance < window)


def count_positions(
    real: Bool[Array, "batch seq"], segments: Int[Array, "batch seq"] | None
) -> Int[Array, "batch seq"]:
    """Each token's position in its row or segment, padding left out; 0 for padding before the first token."""
    positions = jnp.cumsum(real, axis=-1) - 1
    if segments is not None:
        positions -= jax.lax.cummax(jnp.where(_starts(segments), positions, 0), axis=1)
    return jnp.maximum(positions, 0)


def renumber(segments: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Runs of one number as segments of their own, so that a number that comes again is another sequence."""
    return jnp.where(segments != 0, jnp.cumsum(_starts(segments), axis=-1), 0)


def _starts(segments: Int[Array, "batch seq"]) -> Bool[Array, "batch seq"]:
    """Where a token's segment is not that of the token before it."""
    first = jnp.ones_like(segments[:, :1], bool)
    return jnp.concatenate([first, segments[:, 1:] != segments[:, :-1]], axis=-1)
