"""Slices by their names: how many chips, and what is refused."""

import pytest

from peanut_jax.topologies import parse_slice, slice_devices, slice_names


@pytest.mark.parametrize(
    ("name", "chips", "kind"),
    [("v4-8", 4, "TPU v4"), ("v5e-16", 16, "TPU v5 lite"), ("v5p-128", 64, "TPU v5"), ("v6e-256", 256, "TPU v6 lite")],
)
def test_a_slice_has_its_chips(name, chips, kind):
    devices = slice_devices(name)
    assert len(devices) == chips
    assert {device.device_kind for device in devices} == {kind}
    # A host has four chips, and of each chip JAX sees one device.
    assert len({device.process_index for device in devices}) == max(1, chips // 4)


def test_the_names_that_are_sold():
    assert parse_slice("v5litepod-16") == parse_slice(" V5E-16") == ("v5e", 16)
    assert all(parse_slice(name)[1] >= 1 for name in slice_names())


@pytest.mark.parametrize(
    ("name", "said"),
    [("v5e-17", "v5e-16"), ("v5p-4", "v5p-8"), ("v9-8", "v5p-8"), ("", "v5p-8"), (16, "v5p-8"), ("v5e-²", "v5e-16")],
)
def test_a_slice_that_does_not_exist(name, said):
    with pytest.raises(ValueError, match=f"is not a TPU slice.*{said}"):
        parse_slice(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'peanut-jax\[plan\]'"):
        slice_devices("v5e-4")
