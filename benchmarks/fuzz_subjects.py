"""What `benchmarks.fuzz` damages: small folders of every kind that the library reads, and how it reads them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import peft
import torch
import transformers

import peanut_jax as pj
from peanut_jax.interop.lora import to_lora_folder
from peanut_jax.interop.merged import merge_folders
from peanut_jax.models import hf
from peanut_jax.models.loading import load_decoder

_LLAMA = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip
_BERT = transformers.BertConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16, num_labels=2,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A folder that can be read.

    Attributes:
        files: Those in it that are damaged, one a case.
        read: Reads a folder of this kind and returns what came out.
    """

    name: str
    folder: Path
    files: Sequence[str]
    read: Callable[[Path], Any]


def subjects(folder: Path) -> list[Subject]:
    """One of each kind, made in `folder`."""
    torch.manual_seed(0)
    llama, bert = folder / "llama", folder / "bert"
    transformers.LlamaForCausalLM(_LLAMA).save_pretrained(llama)
    transformers.BertForSequenceClassification(_BERT).save_pretrained(bert)
    return [*_bases(folder, llama, bert), *_adapters(folder, llama)]


def _bases(folder: Path, llama: Path, bert: Path) -> list[Subject]:
    sharded, flax = folder / "sharded", folder / "flax"
    transformers.LlamaForCausalLM.from_pretrained(llama).save_pretrained(sharded, max_shard_size="8KB")
    model, params = hf.load(bert, "sequence-classification")
    model.save_pretrained(flax, params=params, safe_serialization=False)

    def load_bert(path: Path) -> Any:
        return hf.load(path, "sequence-classification")[1]

    def load_llama(path: Path) -> Any:
        return load_decoder(path, "float32")[1]

    return [
        Subject("decoder", llama, ("config.json", "model.safetensors"), load_llama),
        Subject("decoder in shards", sharded, _files(sharded), load_llama),
        Subject("encoder", bert, ("config.json", "model.safetensors"), load_bert),
        Subject("encoder of Flax", flax, ("config.json", "flax_model.msgpack"), load_bert),
    ]


def _adapters(folder: Path, llama: Path) -> list[Subject]:
    _, params = load_decoder(llama, "float32")
    config = pj.PeanutConfig(
        r=2, depth=1, target_modules=r"model\.layers\..*\.(q_proj|down_proj)", init_weights=False,
        modules_to_save=["norm"],
    )  # fmt: skip
    base = torch.nn.Module.state_dict(transformers.LlamaForCausalLM.from_pretrained(llama))
    found = []
    for name, one in {"PEANuT": config, "DoRA": pj.DoraConfig(r=2, scaling=0.5, target_modules=["q_proj"])}.items():
        pj.save_adapter(folder / name, pj.init(jax.random.key(0), params, one), one, params)
        found.append(Subject(name, folder / name, _files(folder / name), lambda path: pj.load_adapter(path, params)))
    lora = folder / "LoRA"
    model = transformers.LlamaForCausalLM(_LLAMA)
    model.load_state_dict(base)
    fields: dict[str, Any] = {"layers_to_transform": [0, 1], "layers_pattern": "layers"}
    patterns: dict[str, Any] = {"rank_pattern": {"layers.0.*q_proj": 1}, "alpha_pattern": {"v_proj": 8}}
    peft_config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **fields, **patterns)
    peft.get_peft_model(model, peft_config).save_pretrained(str(lora))
    found.append(Subject("LoRA as factors", lora, _files(lora), lambda path: pj.from_lora(path, params)))
    return [*found, *_exports(folder, llama, found[0].folder)]


def _exports(folder: Path, llama: Path, adapter: Path) -> list[Subject]:
    """Folders with a base and an adapter, both of which can be damaged."""
    pair = folder / "pair"
    for name, source in (("base", llama), ("adapter", adapter)):
        (pair / name).mkdir(parents=True)
        for file in source.iterdir():
            (pair / name / file.name).write_bytes(file.read_bytes())
    files = [f"{name}/{file}" for name in ("base", "adapter") for file in _files(pair / name)]

    def merge(path: Path) -> None:
        merge_folders(path / "base", [path / "adapter"], path / "merged")

    def to_lora(path: Path) -> None:
        to_lora_folder(path / "adapter", path / "base", path / "lora")

    return [Subject("merge", pair, files, merge), Subject("to_lora", pair, files, to_lora)]


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
