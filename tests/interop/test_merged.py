"""Merged checkpoints: what torch loads from them, what changed in the files, and what happens when things go wrong."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import peanut_jax as pj
from peanut_jax.base.kernels import flatten
from peanut_jax.files.safetensors import read_header
from peanut_jax.files.torch_checkpoint import MERGED_FILE
from peanut_jax.interop.lora import to_lora_folder
from peanut_jax.interop.merged import merge_folders
from peanut_jax.models import hf
from peanut_jax.models.loading import load_decoder
from tests.interop.conftest import scanned
from tests.interop.test_lora import ALL, assert_logits_close
from tests.interop.test_peft import TASK_TYPES, drawn
from tests.oracle import bridge

INDEX = "model.safetensors.index.json"


def contents(folder):
    """Every tensor's bytes, by name, over all shards."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: array.tobytes() for file in files for name, array in raw(file).items()}


def raw(file):
    header = read_header(file)
    data = file.read_bytes()[header.data :]
    return {name: np.frombuffer(data[e.start : e.stop], np.uint8) for name, e in header.entries.items()}


def from_pretrained(one, folder):
    return type(one.twin.torch).from_pretrained(folder)


@pytest.mark.matrix
@pytest.mark.parametrize("orientation", ["output", "input"])
@pytest.mark.parametrize("name", ALL)
def test_torch_gives_the_adapted_logits(family, tmp_path, name, orientation):
    one = family(name)
    config = pj.PeanutConfig(
        r=3, depth=1, act_fn="gelu", orientation=orientation, scaling=0.3, target_modules=one.targets,
        init_weights=False, task_type=TASK_TYPES.get(name), modules_to_save=["classifier"] if name == "vit" else None,
    )  # fmt: skip
    adapters = drawn(one.params, config)
    pj.export_merged(one.folder, tmp_path / "out", adapters, config)
    want = one.logits(pj.merge(one.params, adapters, config))
    assert np.abs(want - one.logits(one.params)).max() > 1e-2
    assert_logits_close(one.torch_logits(from_pretrained(one, tmp_path / "out")), want)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A bfloat16 Llama in shards, with a tokenizer file, a folder and stale copies of the weights beside it."""
    folder = tmp_path_factory.mktemp("sharded")
    family = bridge.FAMILIES["llama"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(family.config(**{**bridge.SIZES, **family.fields}))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="12KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (folder / name).write_bytes(b"old weights")
    assert len(list(folder.glob("model-*.safetensors"))) >= 4
    return folder


def test_only_adapted_tensors_change(sharded, tmp_path):
    _, params = hf.load(sharded, "causal-lm", dtype=jnp.bfloat16)
    config = pj.PeanutConfig(r=3, target_modules=["q_proj", "down_proj"], init_weights=False)
    adapters = drawn(params, config)
    pj.export_merged(sharded, tmp_path / "out", adapters, config, params)
    (sharded / "consolidated.safetensors").rename(tmp_path / "aside")
    before, after = contents(sharded), contents(tmp_path / "out")
    (tmp_path / "aside").rename(sharded / "consolidated.safetensors")
    assert list(before) == list(after)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
    # The same bits as merging in Flax gives, in the checkpoint's dtype.
    merged = flatten(pj.merge(params, adapters, config))
    for name in changed:
        want = merged[name.replace(".", "/").replace("weight", "kernel")].T
        got = np.frombuffer(after[name], jnp.bfloat16).reshape(want.shape)
        np.testing.assert_array_equal(got, np.asarray(want))
    # Files: the same, but for the weights, their stale copies and the record of the merge.
    names = {str(file.relative_to(sharded)) for file in sharded.rglob("*")}
    assert {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*")} == (
        names - {"pytorch_model.bin", "consolidated.safetensors", "model.gguf"}
    ) | {MERGED_FILE}
    for name in ("config.json", INDEX, "tokenizer.json", "generation_config.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sharded / name).read_bytes()
    for file in sharded.glob("model-*.safetensors"):
        head = read_header(file).data
        assert file.read_bytes()[:head] == (tmp_path / "out" / file.name).read_bytes()[:head]
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o777 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_scanned_layers_and_chosen_ones(sharded, tmp_path):
    _, params = hf.load(sharded, "causal-lm", dtype=jnp.bfloat16)
    stack = scanned(params, "model", "layers")
    config = pj.PeanutConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1], init_weights=False)
    adapters = drawn(stack, config)
    pj.export_merged(sharded, tmp_path / "out", adapters, config, stack)
    got = flatten(hf.load(tmp_path / "out", "causal-lm", dtype=jnp.bfloat16)[1])
    want = flatten(scanned(hf.load(tmp_path / "out", "causal-lm", dtype=jnp.bfloat16)[1], "model", "layers"))
    merged = flatten(pj.merge(stack, adapters, config))
    for path, leaf in merged.items():
        np.testing.assert_array_equal(want[path], leaf, err_msg=path)
    changed = {path for path, leaf in flatten(params).items() if not np.array_equal(leaf, got[path])}
    assert changed == {"model/layers/1/self_attn/q_proj/kernel"}


def test_two_adapters_add_up(family, tmp_path):
    one = family("bert")
    configs = [
        pj.PeanutConfig(r=3, target_modules=["query"], init_weights=False),
        pj.LoraConfig(r=2, target_modules=["query", "value"]),
    ]
    both = [jax.tree.map(lambda leaf: leaf + 0.05, drawn(one.params, config)) for config in configs]
    pj.export_merged(one.folder, tmp_path / "api", both, configs)
    for name, adapters, config in zip("ab", both, configs, strict=True):
        pj.save_adapter(tmp_path / name, adapters, config, one.params)
    merge_folders(one.folder, [tmp_path / "a", tmp_path / "b"], tmp_path / "folders")
    assert contents(tmp_path / "api") == contents(tmp_path / "folders")
    pairs = pj.combine(*(pj.factors(a, one.params, c) for a, c in zip(both, configs, strict=True)))
    want = pj.bind(lambda params: one.twin.flax(**one.twin.batch, params=params).logits, pairs)(one.params)
    assert_logits_close(one.torch_logits(from_pretrained(one, tmp_path / "api")), want)


# ---- prefixes and heads


@pytest.mark.parametrize("name", ["roberta", "bert", "vit"])
def test_a_new_head_on_a_bare_base(family, tmp_path, name):
    """The checkpoint of a base without a head: the head is added, and torch finds everything."""
    one = family(name)
    base = tmp_path / "base"
    one.twin.torch.base_model.save_pretrained(base)
    config = pj.PeanutConfig(
        r=3, target_modules=["query"], init_weights=False, task_type="SEQ_CLS" if name != "vit" else None,
        modules_to_save=["classifier"] if name == "vit" else None,
    )  # fmt: skip
    adapters = drawn(one.params, config)
    pj.export_merged(base, tmp_path / "out", adapters, config)
    want = one.logits(pj.merge(one.params, adapters, config))
    if name == "vit":  # no task_type names the class: the caller does
        model = type(one.twin.torch).from_pretrained(tmp_path / "out", num_labels=3)
    else:
        auto = transformers.AutoModelForSequenceClassification
        model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"]
        assert type(model) is type(one.twin.torch)
        assert model.config.architectures == [type(model).__name__]
        assert model.config.num_labels == 3
    assert_logits_close(one.torch_logits(model), want)


def test_a_new_head_in_shards(family, tmp_path):
    """Names gain the prefix in every shard and in the index."""
    one = family("bert")
    one.twin.torch.base_model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    config = pj.PeanutConfig(r=3, target_modules=["query"], init_weights=False, task_type="SEQ_CLS")
    adapters = drawn(one.params, config)
    pj.export_merged(tmp_path / "base", tmp_path / "out", adapters, config)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_logits_close(one.torch_logits(model), one.logits(pj.merge(one.params, adapters, config)))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for data in contents(tmp_path / "out").values())


def test_an_adapter_of_the_base_on_a_checkpoint_with_a_head(family, tmp_path):
    one = family("bert")
    _, params = hf.load(one.folder, "base")
    config = pj.PeanutConfig(r=3, target_modules=["query"], init_weights=False)
    adapters = drawn(params, config)
    assert next(iter(adapters.theta)).startswith("encoder/")
    pj.export_merged(one.folder, tmp_path / "out", adapters, config)
    on_head = pj.Adapters({f"bert/{path}": theta for path, theta in adapters.theta.items()}, {})
    want = one.logits(pj.merge(one.params, on_head, config))
    assert_logits_close(one.torch_logits(from_pretrained(one, tmp_path / "out")), want)


def test_old_names_of_layer_norms(family, tmp_path):
    one = family("bert")
    shutil.copytree(one.folder, tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, array in load_file(file).items():
        for new, old in names.items():
            name = name.replace(new, old)
        tensors[name] = array
    save_file(tensors, file, metadata={"format": "pt"})
    config = pj.PeanutConfig(r=2, target_modules=["query"], modules_to_save=["embeddings.LayerNorm"])
    adapters = drawn(one.params, config)
    pj.export_merged(tmp_path / "old", tmp_path / "out", adapters, config)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == tensors.keys()
    scale = adapters.saved["bert/embeddings/LayerNorm/scale"]
    np.testing.assert_array_equal(after["bert.embeddings.LayerNorm.gamma"], scale)


def test_a_head_of_another_size_is_refused(family, tmp_path):
    one = family("bert")
    config = pj.PeanutConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapters = drawn(one.params, config)
    adapters.saved["classifier/kernel"], adapters.saved["classifier/bias"] = jnp.ones((32, 5)), jnp.ones(5)
    with pytest.raises(ValueError, match=r"'classifier\.(bias|weight)' is \(5.*\) in adapter 0 and \(3"):
        pj.export_merged(one.folder, tmp_path / "out", adapters, config)
    assert not (tmp_path / "out").exists()


# ---- bad input: one clear error, and the disk as it was


@pytest.fixture
def case(family, tmp_path):
    """A checkpoint of its own, an adapter directory for it, and the adapter."""
    one = family("bert")
    source = tmp_path / "source"
    one.twin.torch.save_pretrained(source, max_shard_size="20KB")
    config = pj.PeanutConfig(r=2, target_modules=["query"], init_weights=False)
    adapters = drawn(one.params, config)
    pj.save_adapter(tmp_path / "adapter", adapters, config, one.params)
    return source, tmp_path / "adapter", tmp_path / "out"


def assert_nothing_left(out, *, kept=("source", "adapter")):
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(kept)


def test_an_existing_folder(case):
    source, adapter, out = case
    out.mkdir()
    (out / "mine").write_text("keep")
    for overwrite, message in ((False, r"exists; give another.*--overwrite"), (True, r"was not written here")):
        with pytest.raises(FileExistsError, match=message):
            merge_folders(source, [adapter], out, overwrite=overwrite)
    assert (out / "mine").read_text() == "keep"
    (out / "mine").unlink()
    for _ in range(2):
        merge_folders(source, [adapter], out, overwrite=True)
    (out / "more").write_text("of this merge")
    link = out.parent / "link"
    link.symlink_to(out)
    merge_folders(source, [adapter], link, overwrite=True)
    assert link.is_symlink()
    assert not (out / "more").exists()
    assert_nothing_left(out, kept=("source", "adapter", "out", "link"))


def test_a_crash_keeps_the_old_folder(case, monkeypatch):
    source, adapter, out = case
    merge_folders(source, [adapter], out)
    before = contents(out)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("peanut_jax.interop.merged.write_entry", fail)
    with pytest.raises(KeyboardInterrupt):
        merge_folders(source, [adapter], out, overwrite=True)
    assert contents(out) == before
    assert_nothing_left(out, kept=("source", "adapter", "out"))


def test_merged_weights_as_a_base(case):
    source, adapter, out = case
    merge_folders(source, [adapter], out)
    twice = out.parent / "twice"
    with pytest.raises(ValueError, match=r"another base.*layer\.0\.attention\.self\.query' differs"):
        merge_folders(out, [adapter], twice)
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # without the fingerprint, as PEFT writes it
    with pytest.raises(ValueError, match=r"holds merged weights"):
        merge_folders(out, [adapter], twice)
    assert not twice.exists()
    # An adapter that was trained on merged weights, though, may be merged into them.
    _, params = hf.load(out, "sequence-classification")
    config = pj.PeanutConfig(r=2, target_modules=["query"], init_weights=False)
    pj.save_adapter(out.parent / "second", drawn(params, config), config, params)
    merge_folders(out, [out.parent / "second"], twice)
    assert (twice / MERGED_FILE).is_file()


def test_another_base(case):
    source, adapter, out = case
    file = source / json.loads((source / INDEX).read_text())["weight_map"][NAME]
    tensors = load_file(file)
    tensors[NAME] = tensors[NAME] * 1.1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"another base.*layer\.1\.attention\.self\.query' differs"):
        merge_folders(source, [adapter], out)
    assert_nothing_left(out)
    merge_folders(source, [adapter], out, check_base=False)


NAME = "bert.encoder.layer.1.attention.self.query.weight"


def index_with(source, change):
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def first_shard(source):
    return sorted(source.glob("*.safetensors"))[0]


def add_flax_format(source):
    for file in source.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "flax"})


def twice(source):
    files = sorted(source.glob("*.safetensors"))
    name = next(iter(load_file(files[0])))
    save_file({**load_file(files[1]), name: np.ones(2, np.float32)}, files[1], metadata={"format": "pt"})


def quantised(source):
    file = source / json.loads((source / INDEX).read_text())["weight_map"][NAME]
    tensors = load_file(file)
    save_file({**tensors, NAME: tensors[NAME].astype(np.int8)}, file, metadata={"format": "pt"})


def pickles_only(source):
    for file in source.glob("*.safetensors*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda s: (s / "config.json").unlink(), FileNotFoundError, r"has no config\.json"),
        (lambda s: first_shard(s).unlink(), FileNotFoundError, r"lists model-00001.*which is missing"),
        (lambda s: first_shard(s).write_bytes(first_shard(s).read_bytes()[:-1]), ValueError, r"truncated or corrupt"),
        (lambda s: first_shard(s).write_bytes(b""), ValueError, r"truncated or corrupt"),
        (lambda s: index_with(s, lambda m: m.update({NAME: "../../secret"})), ValueError, r"files beside it"),
        (lambda s: index_with(s, lambda m: m.update({NAME: "/etc/passwd"})), ValueError, r"files beside it"),
        (lambda s: index_with(s, lambda m: m.update({NAME: 3})), ValueError, r"files beside it"),
        (lambda s: index_with(s, lambda m: m.pop(NAME)), ValueError, r"disagree about 'bert"),
        (lambda s: index_with(s, lambda m: m.update({"ghost": m[NAME]})), ValueError, r"disagree about 'ghost'"),
        (lambda s: (s / INDEX).write_text("{"), ValueError, r"not valid JSON"),
        (lambda s: (s / INDEX).write_text("{}"), ValueError, r"must hold a weight_map"),
        (lambda s: (s / INDEX).write_text('{"weight_map": []}'), ValueError, r"must hold a weight_map"),
        (add_flax_format, ValueError, r"saved by 'flax'; only PyTorch's names"),
        (twice, ValueError, r"is in model-00001.* and in model-00002"),
        (quantised, ValueError, r"dtype I8: quantised weights"),
        (pickles_only, FileNotFoundError, r"Pickle files \(\.bin\) are never read"),
    ],
)
def test_damaged_sources(case, damage, error, message):
    source, adapter, out = case
    damage(source)
    with pytest.raises(error, match=message):
        merge_folders(source, [adapter], out)
    assert_nothing_left(out)


def test_an_adapter_of_another_architecture(family, case):
    source, _, out = case
    one = family("llama")
    config = pj.PeanutConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"has no tensor 'model\.layers\.0\.self_attn\.q_proj\.weight', nor under"):
        pj.export_merged(source, out, drawn(one.params, config), config)


def test_an_adapter_of_another_width(case):
    source, _, out = case
    config = pj.PeanutConfig(r=2, target_modules=["query"])
    thetas = {
        f"bert/encoder/layer/{i}/attention/self/query/kernel": {"a": jnp.ones((64, 2)), "b": jnp.ones((2, 64))}
        for i in range(2)
    }
    adapters = pj.Adapters(thetas, {})
    with pytest.raises(ValueError, match=r"is \[32, 32\] in the checkpoint, for which a must be \(32, 2\)"):
        pj.export_merged(source, out, adapters, config)


@pytest.mark.parametrize("out", ["source", "source/inside", ".", "adapter", "adapter/inside"])
def test_folders_that_overlap(case, out):
    source, adapter, _ = case
    for write in (
        lambda out: merge_folders(source, [adapter], out, overwrite=True),
        lambda out: to_lora_folder(adapter, source, out, overwrite=True),
    ):
        with pytest.raises(ValueError, match=r"must lie apart"):
            write(source.parent / out)
    assert (source / "config.json").is_file()
    assert (adapter / "adapter_config.json").is_file()


def test_the_same_adapter_twice(case):
    source, adapter, out = case
    with pytest.raises(ValueError, match=r"given twice"):
        merge_folders(source, [adapter, adapter / ".." / "adapter"], out)


def test_a_prefix_that_is_not_certain(case, tmp_path):
    """Two towers with layers of the same names: the adapter's could be either's."""
    source, _, out = case
    two = tmp_path / "towers"
    two.mkdir()
    shutil.copyfile(source / "config.json", two / "config.json")
    kernel = np.ones((4, 4), np.float32)
    save_file({f"{tower}.layers.0.q.weight": kernel for tower in ("text", "vision")}, two / "model.safetensors")
    theta = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}
    with pytest.raises(ValueError, match=r"could be 'text\.layers\.0\.q' or 'vision\.layers\.0\.q'"):
        pj.export_merged(
            two, out, pj.Adapters({"layers/0/q/kernel": theta}, {}), pj.PeanutConfig(r=2, target_modules=["q"])
        )


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_tied_heads(tmp_path, saved):
    """PEFT trains one of the two matrices; a merged checkpoint would tie them again."""
    fields = {**bridge.SIZES, **bridge.FAMILIES["llama"].fields, "tie_word_embeddings": True}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.PeanutConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"saves '.*{saved}\.weight', and .* ties its head"):
        merge_folders(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


@pytest.fixture(scope="module")
def with_head(tmp_path_factory):
    """A base that ties its head and holds a copy of it, in the file, with an adapter of q_proj and one of the head."""
    folder = tmp_path_factory.mktemp("tied")
    fields = {**bridge.SIZES, **bridge.FAMILIES["llama"].fields, "tie_word_embeddings": True}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    for target in ("q_proj", "lm_head"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        config = peft.PeanutConfig(r=2, target_modules=[target])
        peft.get_peft_model(model, config).save_pretrained(folder / target)
    shutil.copytree(folder / "base", folder / "other")
    head[3, 1] += 1e-3
    save_file({**tensors, "lm_head.weight": head}, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_tied_head_in_the_file(with_head, tmp_path):
    """A copy of the embedding stays; it cannot be adapted apart from it, nor be another matrix from the start."""
    merge_folders(with_head / "base", [with_head / "q_proj"], tmp_path / "out")
    load_decoder(tmp_path / "out")
    with pytest.raises(ValueError, match=r"adapts 'lm_head\.weight', and .* ties its head"):
        merge_folders(with_head / "base", [with_head / "lm_head"], tmp_path / "no")
    for write in (
        lambda: merge_folders(with_head / "other", [with_head / "q_proj"], tmp_path / "no"),
        lambda: to_lora_folder(with_head / "q_proj", with_head / "other", tmp_path / "no"),
    ):
        with pytest.raises(ValueError, match=r"ties the head .*'lm_head\.weight' differs from"):
            write()
    assert not (tmp_path / "no").exists()


def test_saved_modules_without_a_place(case):
    source, _, out = case
    query = "bert/encoder/layer/0/attention/self/query/kernel"
    theta = {"a": jnp.ones((32, 2)), "b": jnp.ones((2, 32))}
    adapters = pj.Adapters({query: theta}, {"bert/encoder/extra/scale": jnp.ones(3)})
    config = pj.PeanutConfig(r=2, target_modules=["query"], modules_to_save=["extra"])
    with pytest.raises(ValueError, match=r"'bert\.encoder\.extra\.weight' of adapter 0 has no place"):
        pj.export_merged(source, out, adapters, config)


def test_saved_modules_that_overflow_the_checkpoints_dtype(family, tmp_path):
    one = family("bert")
    type(one.twin.torch).from_pretrained(one.folder).half().save_pretrained(tmp_path / "half")
    config = pj.PeanutConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapters = drawn(one.params, config)
    adapters.saved["classifier/bias"] = jnp.full(3, 1e6)
    with pytest.raises(ValueError, match=r"'classifier\.bias' of adapter 0 holds a NaN or an infinity .* float16"):
        pj.export_merged(tmp_path / "half", tmp_path / "out", adapters, config)


@pytest.mark.parametrize("trained_in", [jnp.float32, jnp.bfloat16])
def test_updates_are_computed_as_in_training(sharded, tmp_path, trained_in):
    """A bfloat16 checkpoint read as float32 gives updates of float32 factors; the directory says which."""
    _, params = hf.load(sharded, "causal-lm", dtype=trained_in)
    config = pj.PeanutConfig(r=3, target_modules=["down_proj"], init_weights=False)
    adapters = drawn(params, config)
    pj.save_adapter(tmp_path / "adapter", adapters, config, params)
    to_lora_folder(tmp_path / "adapter", sharded, tmp_path / "lora")
    lora, _ = pj.load_adapter(tmp_path / "lora", params)
    want, _ = pj.to_lora(adapters, params, config)
    for path, theta in want.theta.items():
        np.testing.assert_allclose(lora.theta[path]["a"], theta["a"], rtol=1e-5, atol=1e-6)
    merge_folders(sharded, [tmp_path / "adapter"], tmp_path / "out")
    pj.export_merged(sharded, tmp_path / "api", adapters, config, params)
    assert contents(tmp_path / "out") == contents(tmp_path / "api")


def test_stacks_of_different_heights(tmp_path):
    """Of layers 1 and 3, a stack of two has one."""
    rng = np.random.default_rng(0)
    params = {
        name: {"layers": {"q": {"kernel": jnp.asarray(rng.normal(size=(count, 4, 4)), jnp.float32)}}}
        for name, count in (("encoder", 4), ("decoder", 2))
    }
    tensors = {
        f"{name}.layers.{i}.q.weight": np.ascontiguousarray(np.asarray(tree["layers"]["q"]["kernel"][i]).T)
        for name, tree in params.items()
        for i in range(len(tree["layers"]["q"]["kernel"]))
    }
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = pj.PeanutConfig(r=2, target_modules=["q"], layers_to_transform=[1, 3], init_weights=False)
    adapters = pj.init(jax.random.key(0), params, config)
    for name, extra in (("with", (params,)), ("without", ())):
        pj.export_merged(tmp_path / "base", tmp_path / name, adapters, config, *extra)
        after = load_file(tmp_path / name / "model.safetensors")
        changed = {tensor for tensor in tensors if not np.array_equal(after[tensor], tensors[tensor])}
        assert changed == {"encoder.layers.1.q.weight", "encoder.layers.3.q.weight", "decoder.layers.1.q.weight"}


def test_nans(case, family):
    source, _, out = case
    one = family("bert")
    config = pj.PeanutConfig(r=2, target_modules=["query"], init_weights=False)
    adapters = jax.tree.map(lambda leaf: leaf.at[0, 0].set(jnp.inf), drawn(one.params, config))
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*query\.weight'"):
        pj.export_merged(source, out, adapters, config)
    assert_nothing_left(out)


FULL_DISK = """
import resource, signal, sys
from peanut_jax.interop.merged import merge_folders
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
try:
    merge_folders(sys.argv[1], [sys.argv[2]], sys.argv[3])
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_up(case):
    """A limit on the size of files stands in for the disk's: the write fails in the same place."""
    source, adapter, out = case
    command = [sys.executable, "-c", FULL_DISK, str(source), str(adapter), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"writing {out}; nothing of it was left behind" in result.stdout
    assert_nothing_left(out)


def test_safetensors_of_other_writers(case):
    """Metadata that is missing, and tensors in an order that is not the names'."""
    source, adapter, out = case
    for file in source.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            names = list(opened.keys())
        tensors = load_file(file)
        save_file({name: tensors[name] for name in reversed(names)}, file)
    merge_folders(source, [adapter], out)
    assert contents(out).keys() == contents(source).keys()
