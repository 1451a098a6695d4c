"""The fingerprint depends on every element of every adapted kernel, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import peanut_jax as pj
from peanut_jax.base.digest import digest, hexadecimal
from tests.interop.conftest import scanned

CONFIG = pj.PeanutConfig(r=2, target_modules=["q_proj", "up_proj"])


def reference(matrix):
    """The definition, in Python's integers."""
    bits = np.asarray(jnp.asarray(matrix, jnp.bfloat16)).view(np.uint16).astype(object)

    def weights(size, seed):
        for i in range(size):
            h = (i + seed) % 2**32
            h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
            h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
            yield (h ^ (h >> 16)) | 1

    sums = [
        np.array(list(weights(len(bits), 2**32 - 1 - seed))) @ bits @ np.array(list(weights(bits.shape[1], seed)))
        for seed in (0x9E3779B9, 0x7F4A7C15)
    ]
    return "".join(f"{part % 2**32:08x}" for part in sums)


@pytest.fixture(scope="module")
def kernel():
    return jax.random.normal(jax.random.key(0), (16, 24))


def test_the_definition(kernel):
    """The values are kept in files: they must not move between versions, machines or compilers."""
    assert hexadecimal(digest(kernel)) == reference(kernel)
    assert hexadecimal(digest(jnp.arange(12.0).reshape(3, 4))) == reference(np.arange(12.0).reshape(3, 4))


def test_layouts_and_dtypes(family):
    one = family("llama")
    want = pj.fingerprint(one.params, CONFIG)
    assert want.keys() == {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}
    assert len(set(want.values())) == 4
    assert pj.fingerprint(scanned(one.params, "model", "layers"), CONFIG) == want
    assert pj.fingerprint({"params": one.params}, CONFIG) == want
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), one.params)
    assert pj.fingerprint(rounded, CONFIG) == want
    assert pj.fingerprint(jax.tree.map(np.asarray, one.params), CONFIG) == want


def test_sharding(family):
    one = family("llama")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    stack = scanned(one.params, "model", "layers")

    def place(leaf):
        fits = leaf.ndim == 3
        return jax.device_put(
            leaf, NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor") if fits else PartitionSpec())
        )

    assert pj.fingerprint(jax.tree.map(place, stack), CONFIG) == pj.fingerprint(one.params, CONFIG)


@pytest.mark.parametrize("shape", [(6, 10), (3, 6, 10)])
def test_the_same_under_x64(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    want = np.asarray(digest(jnp.asarray(kernel)))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(digest(jnp.asarray(kernel)), want)
        np.testing.assert_array_equal(digest(jnp.asarray(kernel, jnp.float64)), want)


@given(st.integers(0, 15), st.integers(0, 23), st.integers(0, 15), st.integers(0, 23))
def test_changes_show(row, column, other_row, other_column):
    kernel = jax.random.normal(jax.random.key(0), (16, 24))
    want = hexadecimal(digest(kernel))
    changed = kernel.at[row, column].multiply(1.01)
    assert hexadecimal(digest(changed)) != want
    if (row, column) != (other_row, other_column):
        one, two = kernel[row, column], kernel[other_row, other_column]
        swapped = kernel.at[row, column].set(two).at[other_row, other_column].set(one)
        assert hexadecimal(digest(swapped)) != want


def test_transposes_differ(kernel):
    square = kernel[:, :16]
    assert hexadecimal(digest(square)) != hexadecimal(digest(square.T))


def test_other_kernels_do_not_count(family):
    one = family("llama")
    params = {**one.params, "lm_head": jax.tree.map(lambda leaf: leaf + 1, one.params["lm_head"])}
    assert pj.fingerprint(params, CONFIG) == pj.fingerprint(one.params, CONFIG)
