"""Damaged files: every one is a ValueError that names the file, or reads as what it says; nothing else escapes."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peanut_jax as pj
from peanut_jax.files.safetensors import read_header, read_tensors
from peanut_jax.interop.merged import merge_folders
from peanut_jax.interop.peft_folder import CONFIG_FILE, WEIGHTS_FILE, read
from tests.interop.test_peft import drawn


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    one = family("bert")
    config = pj.PeanutConfig(r=2, depth=1, target_modules=["query"], task_type="SEQ_CLS")
    folder = tmp_path_factory.mktemp("fuzz")
    pj.save_adapter(folder / "adapter", drawn(one.params, config), config, one.params)
    shutil.copytree(one.folder, folder / "base")
    return folder


SIXTEENTHS = range(16)


@pytest.mark.parametrize("sixteenth", SIXTEENTHS)
@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_truncated_adapters(folders, tmp_path, file, sixteenth):
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    content = (folders / "adapter" / file).read_bytes()
    (tmp_path / "adapter" / file).write_bytes(content[: len(content) * sixteenth // 16])
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        read(tmp_path / "adapter")


@pytest.mark.parametrize("sixteenth", SIXTEENTHS)
def test_truncated_checkpoints(folders, tmp_path, sixteenth):
    shutil.copytree(folders / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * sixteenth // 16])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt"):
        merge_folders(tmp_path / "base", [folders / "adapter"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@settings(max_examples=200)
@given(data=st.data())
def test_bytes_changed_in_the_header(folders, data):
    """A header that still reads gives tensors of the sizes that it says."""
    content = bytearray((folders / "adapter" / WEIGHTS_FILE).read_bytes())
    length = int.from_bytes(content[:8], "little")
    for place in data.draw(st.lists(st.integers(0, 7 + length), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    file = folders / "changed.safetensors"
    file.write_bytes(content)
    try:
        tensors, _ = read_tensors(file)
    except ValueError:
        return
    assert all(entry.stop - entry.start == tensors[name].nbytes for name, entry in read_header(file).entries.items())


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(folders, content):
    file = folders / "arbitrary.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        read_tensors(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300)
@given(data=st.data())
def test_arbitrary_config_values(folders, data):
    fields = json.loads((folders / "adapter" / CONFIG_FILE).read_text())
    fields["peft_type"] = data.draw(st.sampled_from(["PEANUT", "PEANUT_INPUT", "LORA", "NONLINEAR_LORA"]))
    for name in data.draw(st.lists(st.sampled_from([*fields, "lora_alpha", "rank_pattern", "use_rslora"]), max_size=3)):
        fields[name] = data.draw(JSON)
    folder = folders / "config"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(folders / "adapter" / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(fields))
    try:
        config = read(folder).config
    except ValueError:
        return
    assert isinstance(config.r, int)
    assert np.isfinite(config.scaling)
