"""What is fetched of a hub repository: one copy of the weights, and the small files beside them."""

import json

import huggingface_hub
import pytest
import transformers
from huggingface_hub.utils import filter_repo_objects

from peanut_jax.files.hub import INDEX_FILE, local_folder
from peanut_jax.files.torch_checkpoint import open_checkpoint
from tests.models.test_decoder import SIZES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BESIDE = [".gitattributes", "LICENSE", "README.md", "config.json", "generation_config.json", "special_tokens_map.json",
          "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
          "merges.txt"]  # fmt: skip
ENCODER = ["README.md", "config.json", "vocab.txt", "model.safetensors"]
# Files of real repositories: those that are wanted, and the other copies of their weights.
REPOSITORIES = {
    "mistral": (
        [*BESIDE, INDEX_FILE, *SHARDS, "params.json", "tekken.json"],
        ["consolidated.safetensors", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
    ),
    "llama": (
        [*BESIDE, INDEX_FILE, *SHARDS],
        ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model",
         "consolidated.00.safetensors"],
    ),
    "gemma": ([*BESIDE, INDEX_FILE, *SHARDS], ["gemma-2b.gguf", "gemma-2b-it.Q4_K_M.gguf", "gemma.llamafile"]),
    "gpt-oss": (
        [*BESIDE, INDEX_FILE, *SHARDS], ["metal/model.bin", "original/model.safetensors", "original/dtypes.json"],
    ),
    "one-file": (
        [*BESIDE, "model.safetensors"],
        ["model.fp16.safetensors", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "pytorch_model.bin",
         "old/model.safetensors", "optimizer.pt", "training_args.bin", "checkpoint-500/model.safetensors",
         "checkpoint-500/trainer_state.json", "runs/Nov21/events.out.tfevents.1",
         "adapters/one/adapter_model.safetensors"],
    ),
    "bert": (
        ENCODER,
        ["coreml/fill-mask/float32_model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
         "coreml/fill-mask/float32_model.mlpackage/Manifest.json", "onnx/model.onnx", "onnx/config.json",
         "onnx/model_quantized.onnx", "model.onnx_data", "openvino/openvino_model.xml", "openvino/openvino_model.bin",
         "openvino_model.xml", "flax_model-00001-of-00002.msgpack", "flax_model.msgpack.index.json",
         "saved_model/saved_model.pb", "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"],
    ),
    "sentence-transformer": (
        [*ENCODER, "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"],
        ["2_Dense/pytorch_model.bin", "pytorch_model.bin", "onnx/model_O4.onnx"],
    ),
    "adapter": (
        ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
        ["adapter_model.bin", "checkpoint-10/adapter_model.safetensors", "optimizer.pt", "other/model.safetensors"],
    ),
    "whole-and-shards": ([*BESIDE, INDEX_FILE, "model.safetensors"], SHARDS),
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(files)` makes a repository of these files; the answer lists the revisions that were asked for."""

    def make(files):
        folder, asked = tmp_path / "snapshots" / COMMIT, []

        def snapshot_download(name, *, revision=None, allow_patterns=None, ignore_patterns=None):
            assert name == "someone/model"
            asked.append(revision)
            for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                path = folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files[file])
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return make


def index(shards):
    return json.dumps({"weight_map": {f"tensor.{i}": name for i, name in enumerate(shards)}}).encode()


def under(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_one_copy_of_the_weights_is_fetched(hub, name):
    wanted, others = REPOSITORIES[name]
    asked = hub({file: index(SHARDS) if file == INDEX_FILE else b"{}" for file in (*wanted, *others)})
    folder = local_folder("someone/model", "v2")
    assert under(folder) == set(wanted)
    assert asked[0] == "v2"
    assert set(asked[1:]) == {COMMIT}  # a push between two downloads changes nothing


def test_what_the_cache_holds_is_not_asked_for_again(hub):
    asked = hub(dict.fromkeys(REPOSITORIES["adapter"][0], b"{}"))
    local_folder("someone/model")
    assert len(asked) == 2
    local_folder("someone/model")
    assert len(asked) == 3


def test_shards_of_any_name(hub):
    """The index names files, not patterns."""
    shards = ["weights[1].safetensors", "weights*.safetensors"]
    hub({"config.json": b"{}", INDEX_FILE: index(shards), **dict.fromkeys([*shards, "weights1.safetensors"], b"")})
    assert under(local_folder("someone/model")) == {"config.json", INDEX_FILE, *shards}


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_checkpoint_of_the_hub_opens(hub, tmp_path, shard_size):
    torch_model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    torch_model.save_pretrained(tmp_path / "own", max_shard_size=shard_size)
    files = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    assert (INDEX_FILE in files) == (shard_size == "20KB")
    hub({**files, "consolidated.safetensors": b"damaged"})
    assert open_checkpoint("someone/model").entries.keys() == torch_model.state_dict().keys()


def test_a_repository_with_pickles_alone(hub):
    hub({"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors .*only config\.json"):
        open_checkpoint("someone/model")
