"""A fingerprint of the base kernels that an adapter reads: dW is a function of W0, so another base is another update.

Every element counts, rounded to bfloat16 (a checkpoint read as bfloat16 and as float32 is the same base) and weighted
by its row and column. The sum is of integers, so it is the same whatever order, sharding, stacking or machine adds it
up; no array of the kernel's size is made for it, and a sharded kernel is not gathered.
"""

import logging
from collections.abc import Mapping

import jax
from jaxtyping import PyTree

from peanut_jax.base.digest import digest, hexadecimal
from peanut_jax.base.kernels import flatten
from peanut_jax.base.select import Target, select
from peanut_jax.base.torch_names import modules, rows_of
from peanut_jax.methods.base import AdapterConfig

logger = logging.getLogger(__name__)

Fingerprint = dict[str, str]


def fingerprint(params: PyTree, config: AdapterConfig) -> Fingerprint:
    """Torch module name -> 16 hexadecimal digits, for every kernel that `config` adapts.

    Args:
        params: The frozen base, of any sharding, float dtype and layout.
        config: What is adapted.

    Raises:
        ValueError: as `select`.
    """
    return of_targets(params, select(params, config))


def of_targets(params: PyTree, targets: Mapping[str, Target]) -> Fingerprint:
    """As `fingerprint`, of targets that are known already."""
    flat = flatten(params)
    found: Fingerprint = {}
    for path, target in targets.items():
        rows = rows_of(target)
        digests = jax.device_get(digest(target.matrix(flat[path]))).reshape(-1, 2)
        found |= {name: hexadecimal(digest) for name, digest in zip(modules(path, rows), digests, strict=True)}
    return found


def check(found: Mapping[str, str], saved: Mapping[str, str], adapter: str, base: str) -> None:
    """Compares kernels of the base with the fingerprint that was saved with the adapter.

    Raises:
        ValueError: naming the first kernel that differs.
    """
    different = [name for name, value in found.items() if saved.get(name) != value]
    if different:
        more = f" (and {len(different) - 1} more of {len(found)})" if len(found) > 1 else ""
        raise ValueError(
            f"{adapter} was trained on another base than {base}: kernel {different[0]!r}{more} differs. Its update is "
            "a function of the base's kernels; use the checkpoint that it was trained on, unmerged and not fine-tuned "
            "further"
        )


def note_absence(saved: Mapping[str, str], adapter: str) -> None:
    """Says so where an adapter has no fingerprint to check."""
    if not saved:
        logger.warning(
            "%s holds no fingerprint of its base (HF PEFT saves none): that this is the base is taken on trust", adapter
        )
