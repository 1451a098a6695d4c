"""Damaged files: every one is a ValueError that names the file, or reads as what it says; nothing else escapes."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

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


def changed(folders, tmp_path, **fields):
    """A copy of the adapter whose config has these fields."""
    folder = tmp_path / "adapter"
    shutil.copytree(folders / "adapter", folder)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def with_header(file, change):
    """Writes the safetensors file anew with `change` of its header's text."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = change(content[8 : 8 + length].decode()).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])


def test_no_metadata_is_none(folders, tmp_path):
    folder = changed(folders, tmp_path)
    with_header(folder / WEIGHTS_FILE, lambda head: '{"__metadata__": null, ' + head[head.index('"base_model') :])
    assert read(folder).thetas.keys() == read(folders / "adapter").thetas.keys()
    assert not read(folder).fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested deeper"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"a": 1}', "map"),
    ],
)
def test_a_damaged_fingerprint(folders, tmp_path, text, message):
    folder = changed(folders, tmp_path)
    file = folder / WEIGHTS_FILE
    save_file(load_file(file), file, {"format": "pt", "peanut_jax.base_fingerprint": text})
    with pytest.raises(ValueError, match=message) as error:
        read(folder)
    assert str(file) in str(error.value)
    assert len(str(error.value)) <= 500


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "([a-z0-9.]+)+!"}, "more than 3 s|matched none"),
        ({"target_modules": "a{99999999999}"}, "repetition number is too large"),
        ({"target_modules": "(" * 20_000}, "20000 characters"),
        ({"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "x(?i)"}, "not one: global flags"),
        ({"peft_type": "LORA", "lora_alpha": 4, "rank_pattern": {"(": 1}}, "not one: missing"),
        ({"peft_type": "LORA", "lora_alpha": 4, "rank_pattern": []}, "must be an object"),
        ({"base_model_name_or_path": {}}, "base_model_name_or_path must be a string"),
        ({"init_weights": "x" * 10**6}, "init_weights must be True or False"),
        ({"target_modules": ["x" * 10**6]}, "at most 20000 names of at most 1000 characters"),
    ],
)
def test_fields_of_strangers(folders, family, tmp_path, fields, message):
    is_lora = fields.get("peft_type") == "LORA"
    foreign = dict.fromkeys(("depth", "act_fn", "init_weights", "scaling")) if is_lora else {}
    folder = changed(folders, tmp_path, **fields, **foreign)
    if is_lora:
        tensors = {name.replace("peanut", "lora"): one for name, one in load_file(folder / WEIGHTS_FILE).items()}
        save_file({name: one for name, one in tensors.items() if "coders" not in name}, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message) as error:
        pj.load_adapter(folder, family("bert").params)
    assert len(str(error.value)) <= 500


def test_patterns_with_alternatives_and_groups(folders, family, tmp_path):
    """They name the module that holds the layers, whatever they are made of."""
    folder = changed(folders, tmp_path, layers_to_transform=[0, 1], layers_pattern="(x)|(layer)")
    adapters, config = pj.load_adapter(folder, family("bert").params)
    assert len(adapters.theta) == 2
    assert config.layers_pattern == "(x)|(layer)"


@pytest.mark.parametrize("value", [1e39, np.inf, np.nan])
def test_values_beyond_float32(folders, family, tmp_path, value):
    folder = changed(folders, tmp_path)
    file = folder / WEIGHTS_FILE
    tensors = {name: tensor.astype(np.float64) for name, tensor in load_file(file).items()}
    next(iter(tensors.values()))[0] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match="holds a NaN or an infinity"):
        pj.load_adapter(folder, family("bert").params)


@pytest.mark.parametrize("patterns", [{}, {"alpha_pattern": {"query": 1e38}}])
def test_factors_that_a_scaling_makes_infinite(folders, family, tmp_path, patterns):
    one = family("bert")
    config = pj.LoraConfig(r=2, target_modules=["query"])
    pj.save_adapter(tmp_path / "lora", drawn(one.params, config), config, one.params)
    path = tmp_path / "lora" / CONFIG_FILE
    fields = json.loads(path.read_text()) | (patterns or {"lora_alpha": 2e38})
    path.write_text(json.dumps(fields))
    tensors = {name: tensor * 100 for name, tensor in load_file(tmp_path / "lora" / WEIGHTS_FILE).items()}
    save_file(tensors, tmp_path / "lora" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="is an infinity once scaling="):
        pj.from_lora(tmp_path / "lora", one.params)


def test_links_that_lead_out_of_a_source(folders, tmp_path):
    """Weights may lie elsewhere, and files in the hub's cache are links to its blobs; what is copied unread may not."""
    secret = tmp_path / "secret"
    secret.write_text("a key")
    cache = tmp_path / "models--a--b"
    base = cache / "snapshots" / "1"
    shutil.copytree(folders / "base", base)
    (cache / "blobs").mkdir()
    for name, blob in (("config.json", cache / "blobs" / "c"), ("model.safetensors", tmp_path / "weights")):
        (base / name).rename(blob)
        (base / name).symlink_to(blob)
    merge_folders(base, [folders / "adapter"], tmp_path / "merged")
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    for target in (secret, tmp_path, tmp_path / "nowhere", base, "link"):
        (base / "link").symlink_to(target)
        with pytest.raises((ValueError, OSError), match="link"):
            merge_folders(base, [folders / "adapter"], tmp_path / "a" / "deep" / "place")
        assert not (tmp_path / "a").exists()
        (base / "link").unlink()
