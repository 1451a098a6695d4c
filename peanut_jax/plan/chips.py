"""Accelerators by the names that they are sold under: published peak rates, and the memory that a program can have."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence

from peanut_jax import hlo
from peanut_jax.messages import short

# What a well-tuned step reaches of a chip's peak rates; for the time estimate alone.
COMPUTE_SHARE, LINK_SHARE = 0.5, 0.7
_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak rates of one device.

    Attributes:
        flops: bfloat16 FLOP/s, dense.
        memory: Bytes that a program can have.
        link: Bytes/s that it sends around a ring in its pod or node: one direction, and of a TPU along one axis.
        network: Bytes/s that it sends to another node.
        node: Devices of a node; 0 where all are linked alike (a TPU pod).
    """

    flops: float
    memory: float
    link: float
    network: float = 0.0
    node: int = 0

    def seconds(self, flops: float, collectives: Sequence[hlo.Collective]) -> float:
        """An estimate: products and ring collectives at a share of the peak rates, one after the other."""
        return flops / (self.flops * COMPUTE_SHARE) + sum(_link_seconds(one, self) for one in collectives)


# Sources. TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, peak compute and inter-chip interconnect (v4: 2,400 Gb/s of
# six links, arXiv:2304.01433; v5e 400, v5p 1,200, v6e 800 GB/s in both directions), of which a ring along one axis
# takes 2 of 4 links (v5e, v6e) or 2 of 6 (v4, v5p). They are sold with 32, 16, 95 and 32 GB; the memory here is what
# libtpu 0.0.51 says that a program can have, in the error of one that asks for more: 30.75, 15.75, 95.73 and
# 31.24 GiB.
# GPU: NVIDIA's data sheets of A100, H100, H200 and B200 SXM and of L40S, nvidia.com/en-us/data-center/{a100,h100,h200,
# dgx-b200,l40s}. Dense: half of what the sheets give with sparsity. The memory is the one on the label, in 10^9 bytes:
# a card has some percent more, which the CUDA context and XLA's own reserve take. NVLink in one direction, with a port
# of 400 Gb/s (A100: 200) for each GPU, as in DGX systems; L40S: PCIe 4.0 x16 in one direction, half such a port.
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(275e12, 30.75 * _GIB, 100e9),
    "v5e": Chip(197e12, 15.75 * _GIB, 100e9),
    "v5p": Chip(459e12, 95.73 * _GIB, 200e9),
    "v6e": Chip(918e12, 31.24 * _GIB, 200e9),
    "a100-40gb": Chip(312e12, 40e9, 300e9, 25e9, 8),
    "a100": Chip(312e12, 80e9, 300e9, 25e9, 8),
    "h100": Chip(989e12, 80e9, 450e9, 50e9, 8),
    "h200": Chip(989e12, 141e9, 450e9, 50e9, 8),
    "b200": Chip(2250e12, 180e9, 900e9, 50e9, 8),
    "l40s": Chip(362e12, 48e9, 32e9, 25e9, 8),
}
# Other names of the same: of clouds, and `jax.Device.device_kind`'s.
_ALIASES = {
    "a100-80gb": "a100", "h100-80gb": "h100", "h200-141gb": "h200", "b200-180gb": "b200", "l40s-48gb": "l40s",
    "v5litepod": "v5e", "v5-lite": "v5e", "v5": "v5p", "v6-lite": "v6e", "trillium": "v6e",
}  # fmt: skip
_DECORATION = re.compile(r"nvidia|tpu|sxm\d?|hbm\d?e?")


def chip_name(name: str) -> str:
    """The key in `CHIPS` of a chip, in whatever case and with whatever is often said beside it.

    Raises:
        ValueError: a chip that is not there, with those that are close.

    Examples:
        >>> from peanut_jax.plan import chip_name
        >>> chip_name("NVIDIA A100-SXM4-40GB"), chip_name("TPU v5 lite"), chip_name("H200")
        ('a100-40gb', 'v5e', 'h200')
    """
    plain = _DECORATION.sub("", name.lower()) if isinstance(name, str) else ""
    words = re.sub(r"(?<=\d)-(?=gb)", "", "-".join(re.findall(r"[a-z0-9]+", plain)))
    found = _ALIASES.get(words, words)
    if found not in CHIPS:
        near = difflib.get_close_matches(words, CHIPS) or sorted(CHIPS)
        raise ValueError(f"{short(name)} is not a chip that is known: such as {', '.join(near)}")
    return found


def _link_seconds(one: hlo.Collective, chip: Chip) -> float:
    share = (one.group_size - 1) / one.group_size
    sent = one.bytes * one.times * {"all-reduce": 2 * share, "collective-permute": 1}.get(one.kind, share)
    return sent / min(_rate(group, chip) for group in one.groups) / LINK_SHARE


def _rate(group: tuple[int, ...], chip: Chip) -> float:
    """Bytes/s of a ring over a group; between nodes its members in a node share their ports."""
    nodes = [device // chip.node for device in group] if chip.node else [0]
    together = min(nodes.count(node) for node in nodes)
    return chip.link if len(set(nodes)) == 1 else min(chip.link, chip.network * together)
