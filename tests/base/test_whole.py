"""The digest of a whole base: every leaf counts, exactly, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from peanut_jax.base import whole
from peanut_jax.base.whole import digests

RNG = np.random.default_rng(0)
LAYERS = [
    {"q_proj": {"kernel": RNG.normal(size=(16, 24)).astype(np.float32)}, "norm": {"scale": RNG.normal(size=16)}}
    for _ in range(3)
]
REST = {
    "embed": {"embedding": RNG.normal(size=(40, 16)).astype(np.float32)},
    "final": {"scale": np.ones(16, np.float32), "count": np.arange(5, dtype=np.int32), "on": np.ones(3, bool)},
}
SCANNED = {**REST, "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *LAYERS)}
NUMBERED = {**REST, "layers": {str(i): layer for i, layer in enumerate(LAYERS)}}


@pytest.fixture
def compiled(monkeypatch):
    """As if every leaf were a large one."""
    monkeypatch.setattr(whole, "_HOST_BYTES", -1)


def test_layouts_order_and_collections():
    want = digests(NUMBERED)
    assert {"layers.0.q_proj.kernel", "layers.2.norm.scale", "embed.embedding", "final.count"} < want.keys()
    assert len(want) == len(set(want.values())) == 10
    assert digests(SCANNED) == want
    assert digests(dict(reversed(SCANNED.items()))) == want
    variables = {"params": NUMBERED, "statistics": {"norm": {"mean": np.ones(4, np.float32)}}}
    assert digests(variables).keys() - want.keys() == {"statistics.norm.mean"}
    assert digests(variables).items() > want.items()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.large)])
def test_what_xla_adds_up_is_what_numpy_does(kind, monkeypatch):
    """Sharded over both axes of a mesh, for leaves of every kind and rank."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    tree = {**SCANNED, "pairs": {"w": RNG.normal(size=(300, 4)).astype(jnp.bfloat16)}}

    def place(leaf):
        spec = ["fsdp" if leaf.shape[0] % 4 == 0 else None, "tensor"][: leaf.ndim] + [None] * (leaf.ndim - 2)
        spec = [axis if size % 4 == 0 else None for axis, size in zip(spec, leaf.shape, strict=True)]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    found = digests(jax.tree.map(place, tree))
    monkeypatch.undo()
    assert found == digests(jax.tree.map(np.asarray, jax.tree.map(place, tree)))


@pytest.mark.usefixtures("compiled")
def test_no_array_of_a_leafs_size():
    shape = jax.ShapeDtypeStruct((1024, 2048), jnp.float32)
    weights = whole._weights(shape.shape, range(1, 2))
    memory = whole._program(None).lower(shape, weights).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.02 * 4 * 1024 * 2048


@pytest.mark.parametrize("path", ["q_proj/kernel", "norm/scale"])
def test_a_change_of_one_layer_names_that_layer(path):
    module, leaf = path.split("/")
    layers = jax.tree.map(np.copy, SCANNED["layers"])
    layers[module][leaf][1, 3] = np.nextafter(layers[module][leaf][1, 3], 9)
    want, found = digests(SCANNED), digests({**SCANNED, "layers": layers})
    names = [f"layers.1.{module}.{leaf}"]
    assert [name for name in want if want[name] != found[name]] == names


@pytest.mark.parametrize(
    "change",
    [
        lambda x: -x,  # of an even number of elements: sums of float32 bits modulo 2^32 would stay
        lambda x: x[::-1],
        lambda x: np.roll(x, 1, axis=-1),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, 0.0, x).astype(x.dtype),
        lambda x: x.reshape(16, 40),
        lambda x: np.zeros_like(x),
    ],
)
def test_changes_of_an_embedding_show(change):
    embedding = REST["embed"]["embedding"]
    changed = {**REST, "embed": {"embedding": change(embedding)}}
    assert digests(REST)["embed.embedding"] != digests(changed)["embed.embedding"]


def test_skipped_leaves_do_not_count():
    assert digests(SCANNED, ["embed/embedding"]).keys() == digests(SCANNED).keys() - {"embed.embedding"}


def test_a_module_that_is_called_as_a_container_and_is_none():
    """Its rows are no layers."""
    assert digests({"h": {"kernel": np.ones((6, 4)), "bias": np.ones(4)}}).keys() == {"h.kernel", "h.bias"}
