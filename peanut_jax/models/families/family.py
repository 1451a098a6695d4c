"""What distinguishes one family of decoders from another."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from peanut_jax.models.config_fields import size

# Fields of a config.json, with the family's defaults for those that it leaves out.
Fields = Mapping[str, Any]
Windows = tuple[int | None, ...]


class Biases(NamedTuple):
    """Which dense layers have a bias: queries, keys and values; the attention's output; the MLP."""

    qkv: bool = False
    out: bool = False
    mlp: bool = False


def no_biases(fields: Fields) -> Biases:
    """No dense layer has a bias, whatever the fields say."""
    return Biases()


def every_key(fields: Fields, layers: int) -> Windows:
    """No layer has a window: each query sees every key before it."""
    return (None,) * layers


def window_of(fields: Fields) -> int | None:
    """The checked sliding_window: how many keys back a query sees; None for all."""
    window = fields["sliding_window"]
    return None if window is None else size("sliding_window", window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        defaults: What transformers 4.57 takes for fields that config.json leaves out (`models/*/configuration_*.py`).
            Older files leave out what was added to the class later. None of the classes ties the head to the
            embedding by default, whatever `PretrainedConfig` itself does.
        biases: Fields -> which dense layers have a bias.
        windows: Fields and the number of layers -> per layer, how many keys back a query sees; None for all.
        qk_norm: Whether queries and keys go through an RMSNorm, head by head.
    """

    defaults: Mapping[str, Any]
    biases: Callable[[Fields], Biases] = no_biases
    windows: Callable[[Fields, int], Windows] = every_key
    qk_norm: bool = False
