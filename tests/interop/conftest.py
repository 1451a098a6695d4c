"""Torch on one thread; tiny models in torch and in Flax, one of each family for the whole session."""

import functools

import jax
import pytest
import torch

from tests.oracle import bridge


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    torch.set_num_threads(1)


class Family:
    """A model in torch and Flax, the folder of its checkpoint, and one compiled forward pass of the plain model."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.twin = bridge.build(name, folder)
        self.params, self.targets = self.twin.params, list(self.twin.targets)
        self._forward = jax.jit(lambda params: self.twin.flax(**self.twin.batch, params=params).logits)

    def logits(self, params):
        """Flax's, at full precision; every tree of the same shapes shares the compiled function."""
        with jax.default_matmul_precision("highest"):
            return self._forward(params)

    def torch_logits(self, model):
        with torch.no_grad():
            return model.eval()(**self.twin.torch_batch()).logits.float().numpy()


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """name -> Family."""
    return functools.cache(lambda name: Family(name, tmp_path_factory.getbasetemp() / f"checkpoint-{name}"))


def scanned(params, *container):
    """The same parameters with the numbered layers under `container` stacked, as nn.scan keeps them."""
    head, *rest = container
    if rest:
        return {**params, head: scanned(params[head], *rest)}
    layers = [params[head][str(i)] for i in range(len(params[head]))]
    return {**params, head: jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *layers)}
