"""Eight host devices, shapes checked on every call, and no network."""

import collections
import os

# Compiling is most of these tests' time, and LLVM's optimisations most of the compiling.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
# libtpu is installed as a compiler, and there is no TPU to look for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from beartype import beartype
from jaxtyping import install_import_hook, jaxtyped

# The modules whose functions take arrays with shapes. Not here, because their own checks have to meet bad arguments:
# the configs (`methods.base`, `lora`, `peanut`, `subset`), of which `update` alone is checked below, `training`,
# `models.generate` and `models.sampling`.
# The pytrees of `training`, `adapters` and `models.cache` may also hold shapes, shardings, labels or axes in the
# place of arrays.
CHECKED = [f"peanut_jax.{name}" for name in (
    "methods.activations", "methods.dora", "methods.peanut_start", "methods.tweaker", "matrices", "updates", "xla_cpu",
    "base.digest", "frontends.linen_modules", "sharding",
    "models.attention.cached", "models.attention.roads", "models.attention.splash", "models.beam", "models.decoder",
    "models.decoding", "models.layers", "models.repetition", "models.rope", "models.serving", "models.side_by_side",
    "interop.lora", "interop.lora_factors", "interop.merged",
    "run_checkpoint_leaves", "trainer.curves", "trainer.guard",
)]  # fmt: skip
with install_import_hook(CHECKED, "beartype.beartype"):
    import peanut_jax
    import peanut_jax.models.generate
    import peanut_jax.run_checkpoint_leaves
    import peanut_jax.sharding
    import peanut_jax.trainer.curves
    import peanut_jax.trainer.guard

for method in (peanut_jax.LoraConfig, peanut_jax.PeanutConfig):
    method.update = jaxtyped(typechecker=beartype)(method.update)

# ruff: noqa: E402
import jax
import pytest
from hypothesis import settings
from transformers import BertConfig, FlaxBertForSequenceClassification

settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("suite")

# Parameters of a test that are told apart by their value, others by identity.
_PLAIN = (str, int, float, tuple, type(None))


def pytest_collection_modifyitems(items):
    """The slowest files first, so that no worker ends with them alone; and what `make test` leaves to `make test-all`.

    A test that is marked `matrix` runs there until each value of each of its parameters has come up; the other
    combinations are `large`.
    """
    slow = ("test_processes.py", "test_sharding.py", "test_run.py", "test_docs.py")
    items.sort(key=lambda item: slow.index(item.path.name) if item.path.name in slow else len(slow))
    seen = collections.defaultdict(set)
    for item in items:
        if item.get_closest_marker("matrix"):
            params = item.callspec.params.items()
            values = {f"{name}={value if isinstance(value, _PLAIN) else id(value)}" for name, value in params}
            if values <= seen[item.nodeid.partition("[")[0]]:
                item.add_marker(pytest.mark.large)
            seen[item.nodeid.partition("[")[0]] |= values


@pytest.fixture(scope="session")
def bert():
    """A tiny BERT classifier: `bert.params` are its float32 parameters."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
    )
    return FlaxBertForSequenceClassification(config, seed=0, input_shape=(1, 4))


@pytest.fixture(scope="session")
def tokens():
    return jax.random.randint(jax.random.key(7), (4, 10), 0, 50)
