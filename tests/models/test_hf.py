"""Facts about `hf.load`, with tiny random checkpoints that PyTorch's classes save.

- A model that loads computes what PyTorch's class computes, for every architecture in `MODELS`.
- Every parameter is the checkpoint's or was asked for; everything else is an error that says what to do.
- A field that PyTorch's class reads and Flax's does not is refused, or is known not to change the function.
"""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from transformers.models.auto.modeling_flax_auto import FLAX_MODEL_MAPPING_NAMES

from peanut_jax.models import hf, hf_faults

SIZE = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZE, "intermediate_size": 24, "max_position_embeddings": 24}
GPT = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
T5 = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
VISION = {**SIZE, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
LLAMA = {**BERT, "num_key_value_heads": 1}
# Model type: the task to compare, and the smallest configuration with everything else at its default.
MODELS = {
    "albert": ("masked-lm", {**BERT, "embedding_size": 8}),
    "bart": (
        "seq2seq-lm",
        {"vocab_size": 61, "d_model": 16, "max_position_embeddings": 24}
        | {f"{stack}_{field}": 2 for stack in ("encoder", "decoder") for field in ("layers", "attention_heads")}
        | {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    ),
    "bert": ("sequence-classification", BERT),
    "bloom": ("causal-lm", {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "dinov2": ("image-classification", {**VISION, "num_labels": 3}),
    "distilbert": (
        "token-classification",
        {"vocab_size": 61, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    ),
    "electra": ("sequence-classification", {**BERT, "embedding_size": 8}),
    "gemma": ("causal-lm", {**LLAMA, "head_dim": 8}),
    "gpt2": ("causal-lm", GPT),
    "gpt_neo": (
        "causal-lm",
        {"vocab_size": 61, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 24},
    ),
    "gptj": ("causal-lm", {**GPT, "rotary_dim": 4}),
    "llama": ("causal-lm", LLAMA),
    "mistral": ("causal-lm", LLAMA),
    "opt": ("causal-lm", {**SIZE, "ffn_dim": 24, "max_position_embeddings": 24, "word_embed_proj_dim": 8}),
    "resnet": ("image-classification", {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2]}),
    "roberta": ("question-answering", BERT),
    "roformer": ("base", BERT),
    "t5": ("seq2seq-lm", T5),
    "vit": ("image-classification", {**VISION, "num_labels": 3}),
    "whisper": ("base", {"vocab_size": 61, "d_model": 16, "num_mel_bins": 4}),
}
IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}


def make_config(model_type, **overrides):
    special = {} if "hidden_sizes" in MODELS[model_type][1] else IDS
    return transformers.CONFIG_MAPPING[model_type](**{**special, **MODELS[model_type][1], **overrides})


def make_torch(model_type, task=None, dtype="float32", **overrides):
    """PyTorch's model of a task with random numbers in every parameter, so that no bias or scale is trivial."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = make_config(model_type, **overrides)
    config._attn_implementation = "eager"  # the other one of PyTorch ignores GPT-2's attention scales
    flax_class = getattr(transformers, hf.TASKS[task or MODELS[model_type][0]])._model_mapping[type(config)]
    model = getattr(transformers, flax_class.__name__.removeprefix("Flax"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.tie_weights()
    return model.eval().to(getattr(torch, dtype))


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def make_inputs(config):
    rng = np.random.default_rng(1)
    if config.model_type in ("vit", "dinov2", "resnet"):
        return {"pixel_values": rng.normal(size=(2, 3, 8, 8)).astype(np.float32)}
    ids = rng.integers(5, 61, (2, 12))
    mask = np.ones_like(ids)
    ids[1, 8:], mask[1, 8:] = config.pad_token_id, 0
    decoder = {"decoder_input_ids": rng.integers(5, 61, (2, 5))} if config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


def gap(torch_model, model, params):
    """The largest difference of the two models' first output, where it is not padding."""
    import torch

    inputs = make_inputs(torch_model.config)
    with torch.no_grad():
        expected = torch_model(**{name: torch.tensor(value) for name, value in inputs.items()})[0].numpy()
    got = jax.jit(lambda params: model(**inputs, params=params)[0])(params)
    assert got.shape == expected.shape
    difference = np.abs(np.asarray(got) - expected)
    mask = inputs.get("attention_mask")
    same = mask is not None and mask.shape == difference.shape[:2]
    return difference[mask > 0].max() if same else difference.max()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a tiny BERT, saved as the bare base."""
    return save(make_torch("bert", "base"), tmp_path_factory.mktemp("bert"))


@pytest.fixture
def copy(bert, tmp_path):
    """A copy of it to damage: `copy(tensors, **config)` rewrites both."""

    def write(change=lambda tensors: tensors, **config):
        save_file(change(load_file(bert / "model.safetensors")), tmp_path / "model.safetensors")
        raw = json.loads((bert / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return tmp_path

    return write


# ---- the same function as PyTorch


@pytest.mark.parametrize("model_type", [name for name in MODELS if name not in ("roformer", "whisper")])
def test_equals_torch(model_type, tmp_path):
    overrides = {"sliding_window": 24} if model_type == "mistral" else {}
    theirs = make_torch(model_type, **overrides)
    model, params = hf.load(save(theirs, tmp_path), MODELS[model_type][0])
    assert gap(theirs, model, params) < 1e-4


def test_dinov2_refuses_other_image_sizes(tmp_path):
    model, params = hf.load(save(make_torch("dinov2"), tmp_path), "image-classification")
    with pytest.raises(ValueError, match=r"right only for images of \(8, 8\), got \(12, 8\)"):
        model(jnp.zeros((1, 3, 12, 8)), params=params)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_dtypes(stored, tmp_path):
    theirs = make_torch("bert", "base", dtype=stored)
    model, params = hf.load(save(theirs, tmp_path), dtype=jnp.float32)
    kernel = params["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]
    weight = theirs.encoder.layer[0].attention.self.query.weight
    assert np.array_equal(kernel, weight.detach().float().numpy().T)
    model, params = hf.load(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert model(**make_inputs(model.config), params=params)[0].dtype == jnp.bfloat16


def test_without_torch_and_in_shards(tmp_path):
    theirs = make_torch("gpt2")
    save(theirs, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    program = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from peanut_jax.models import hf
model, params = hf.load({str(tmp_path)!r}, "causal-lm")
ids = np.arange(24).reshape(2, 12)
np.save({str(tmp_path / "logits.npy")!r}, model(ids, params=params).logits)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    import torch

    expected = theirs(torch.arange(24).reshape(2, 12)).logits.detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "resnet"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "msgpack"])
def test_checkpoints_of_flax(model_type, safe, tmp_path):
    """Saved as a base, loaded as a base and as a model with a new head; resnet has two collections."""
    theirs = make_torch(model_type, "base")
    model, params = hf.load(save(theirs, tmp_path / "torch"))
    model.save_pretrained(tmp_path / "flax", params=params, safe_serialization=safe)
    again = hf.load(tmp_path / "flax")[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)
    task = {"bert": "token-classification", "resnet": "image-classification"}[model_type]
    headed = flatten_dict(hf.load(tmp_path / "flax", task)[1])
    base = {path: value for path, value in headed.items() if "classifier" not in path}
    assert all(any(np.array_equal(value, one) for one in jax.tree.leaves(params)) for value in base.values())
    assert len(headed) == len(base) + 2


def test_msgpack_in_shards(bert, tmp_path):
    model, params = hf.load(bert)
    model.save_pretrained(tmp_path, params=params, max_shard_size="10KB")
    assert (tmp_path / "flax_model.msgpack.index.json").exists()
    jax.tree.map(np.testing.assert_array_equal, params, hf.load(tmp_path)[1])


@pytest.mark.large
def test_generates_as_torch_does(tmp_path):
    """With the cache, and with the checkpoint's own generation_config.json."""
    import torch

    theirs = make_torch("gpt2")
    theirs.generation_config = transformers.GenerationConfig(max_new_tokens=7, **IDS)
    model, params = hf.load(save(theirs, tmp_path), "causal-lm")
    ids = np.arange(5, 10)[None]
    expected = theirs.generate(torch.tensor(ids)).numpy()[0]
    got = model.generate(ids, params=params).sequences[0]
    assert len(got) == 12
    np.testing.assert_array_equal(got[: len(expected)], expected)  # Flax pads up to the length


@pytest.mark.parametrize("flax", [False, True])
def test_hub_name(bert, monkeypatch, tmp_path, flax):
    """Each file is asked for alone, so that a repository with Flax's weights and no others loads too."""
    asked, repository = [], tmp_path if flax else bert
    if flax:
        model, params = hf.load(bert)
        model.save_pretrained(tmp_path, params=params)
        assert not list(tmp_path.glob("*.safetensors"))

    def cached_file(name, filename, revision, **_):
        asked.append((name, revision))
        path = repository / filename
        return str(path) if path.exists() else None

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    model, params = hf.load("someone/bert-tiny", revision="v2")
    assert set(asked) == {("someone/bert-tiny", "v2")}
    assert model.config.name_or_path == "someone/bert-tiny"
    jax.tree.map(np.testing.assert_array_equal, params, hf.load(bert)[1])


# ---- every parameter accounted for


def test_new_head_depends_on_the_seed_and_is_reported(bert, caplog):
    def load(seed):
        return hf.load(bert, "sequence-classification", seed=seed, num_labels=5)[1]

    with caplog.at_level(logging.WARNING, hf.__name__):
        first, again, other = load(0), load(0), load(1)
    assert "no classifier/bias, classifier/kernel, drawn from seed 0" in caplog.text
    kernel = first["classifier"]["kernel"]
    assert kernel.shape == (16, 5)
    assert kernel.std() > 0
    assert np.array_equal(kernel, again["classifier"]["kernel"])
    assert not np.array_equal(kernel, other["classifier"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, first["bert"], other["bert"])


def test_language_model_head_is_not_drawn(bert):
    with pytest.raises(ValueError, match=r"lacks 5 parameters of FlaxBertForMaskedLM: cls/predictions/bias, .*new_m"):
        hf.load(bert, "masked-lm")


def test_part_of_a_head_is_not_drawn(tmp_path):
    save(make_torch("roberta", "sequence-classification"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["classifier.out_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 parameters .*: classifier/out_proj/kernel"):
        hf.load(tmp_path, "sequence-classification")


def test_missing_base_parameter(copy):
    folder = copy(lambda tensors: {name: value for name, value in tensors.items() if "pooler" not in name})
    with pytest.raises(ValueError, match=r"lacks 2 parameters .*: pooler/dense/bias, .*new_modules=\('dense',"):
        hf.load(folder)
    _, params = hf.load(folder, new_modules=["pooler"])
    assert params["pooler"]["dense"]["kernel"].shape == (16, 16)
    with pytest.raises(ValueError, match=r"no module 'poolr'; closest: \['pooler'\]"):
        hf.load(folder, new_modules=["poolr"])
    with pytest.raises(ValueError, match=r"a string; write \('pooler',\)"):
        hf.load(folder, new_modules="pooler")


def test_other_shape(tmp_path):
    save(make_torch("bert", "sequence-classification"), tmp_path)
    with pytest.raises(ValueError, match=r"'classifier/\w+' is \(.*2,?\) in .* \(.*7,?\) in .*\('classifier',\)"):
        hf.load(tmp_path, "sequence-classification", num_labels=7)
    _, params = hf.load(tmp_path, "sequence-classification", num_labels=7, new_modules=("classifier",))
    assert params["classifier"]["kernel"].shape == (16, 7)


def test_unexpected_tensor_of_the_base(copy):
    folder = copy(lambda tensors: tensors | {"encoder.layer.0.adapter.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"no place for 1 tensors .*: encoder\.layer\.0\.adapter\.weight"):
        hf.load(folder)


def test_harmless_tensors(bert, copy):
    """Buffers, another task's head, and names of layer norms in checkpoints of 2018."""

    def age(tensors):
        old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in tensors.items()}
        old = {f"bert.{name.replace('LayerNorm.bias', 'LayerNorm.beta')}": value for name, value in old.items()}
        ids = {"bert.embeddings.position_ids": np.arange(24)[None]}
        return old | ids | {"cls.predictions.bias": np.ones(61, np.float32)}

    jax.tree.map(np.testing.assert_array_equal, hf.load(copy(age))[1], hf.load(bert)[1])


def test_gpt2_masks_and_t5_copies(tmp_path):
    one = np.ones((1, 1, 2, 2), np.float32)
    cases = {
        "gpt2": lambda old: {"transformer.h.0.attn.bias": one, "transformer.h.0.attn.masked_bias": one},
        "t5": lambda old: {"encoder.embed_tokens.weight": old["shared.weight"], "lm_head.weight": one},
    }
    for model_type, extra in cases.items():
        task, folder = MODELS[model_type][0], tmp_path / model_type
        theirs = save(make_torch(model_type), folder)
        expected = hf.load(folder, task)[1]
        tensors = load_file(theirs / "model.safetensors")
        save_file(tensors | extra(tensors), folder / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, hf.load(folder, task)[1], expected)
    save_file(tensors | {"encoder.embed_tokens.weight": 2 * tensors["shared.weight"]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no place for 1 tensors .*: encoder\.embed_tokens\.weight"):
        hf.load(folder, task)


def test_quantised_tensor(copy):
    name = "encoder.layer.0.output.dense.weight"
    with pytest.raises(ValueError, match="'encoder/layer/0/output/dense/kernel' is int8: quantised"):
        hf.load(copy(lambda tensors: tensors | {name: tensors[name].astype(np.int8)}))


# ---- arguments and files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "classify"}, "task must be one of base, pretraining, .*; got 'classify'"),
        ({"task": "seq2seq-lm"}, "'bert' has no Flax class for task 'seq2seq-lm', only for base, pretraining"),
        ({"dtype": jnp.int32}, "floating dtype such as float32 or bfloat16, got int32"),
        ({"hidden_dropout": 0.1}, r"'hidden_dropout' is no field of BertConfig .*closest: \['hidden_dropout_prob'"),
        ({"model_type": "gpt2"}, "'model_type' is no field of BertConfig to override"),
    ],
)
def test_wrong_arguments(bert, options, message):
    with pytest.raises(ValueError, match=message):
        hf.load(bert, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "brt"}, r"model_type 'brt' is unknown to transformers; closest: \['bert'"),
        ({"model_type": None}, "model_type 'None' is unknown"),
        ({"model_type": "phi"}, "model_type 'phi' has no Flax class. Train .phi. in PyTorch with HF PEFT"),
        (
            {"model_type": "qwen2"},
            "model_type 'qwen2' has no Flax class. Load 'qwen2' with .*load_decoder",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"hidden_act": "mish"}, "hidden_act='mish' .right only: 'gelu' or 'relu'"),
    ],
)
def test_wrong_configuration(copy, config, message):
    with pytest.raises(ValueError, match=message):
        hf.load(copy(**config))


def test_composites_are_refused():
    config = SimpleNamespace(model_type="vision-encoder-decoder")
    with pytest.raises(ValueError, match="load its two parts as models of their own"):
        hf_faults.check(config, "base")


def test_wrong_files(bert, copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="'/no/such/folder' does not exist"):
        hf.load("/no/such/folder")
    folder = copy()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt .*fetch it again"):
        hf.load(folder)
    save_file({"a": np.zeros(1)}, weights, metadata={"format": "tf"})
    with pytest.raises(ValueError, match=r"saved by 'tf'; only 'pt'"):
        hf.load(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only config\.json, pytorch_model\.bin.*never read: convert"):
        hf.load(folder)
    (folder / "flax_model.msgpack").write_bytes(b"\x81\xa1a")
    with pytest.raises(ValueError, match=r"flax_model\.msgpack is truncated or corrupt"):
        hf.load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"index\.json lists model-1\.safetensors, which is missing"):
        hf.load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="files beside it"):
        hf.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        hf.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; give a folder"):
        hf.load(folder)


@pytest.mark.parametrize("installed", [SimpleNamespace(__version__="5.0.0rc1"), None], ids=["5", "none"])
def test_transformers_without_flax(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", installed)
    with pytest.raises(ImportError, match=r"pip install 'peanut-jax\[hf-flax\]'"):
        hf.load("anything")


# ---- the fields that are refused

WRONG = {  # model type: task, field, a value that Flax runs wrongly, and others that are refused
    ("dinov2", "image-classification"): {"layerscale_value": 2.0},
    ("electra", "masked-lm"): {"hidden_act": "relu"},
    ("gemma", "causal-lm"): {"hidden_act": "relu", "rope_theta": 2e4},
    ("gpt2", "causal-lm"): {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    ("llama", "causal-lm"): {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ("mistral", "causal-lm"): {"sliding_window": None, "rope_theta": 1e6},
    ("roformer", "base"): {"is_decoder": True},
}


@pytest.mark.parametrize(("model_type", "task", "field"), [(*key, field) for key in WRONG for field in WRONG[key]])
def test_refused_fields_would_be_wrong(model_type, task, field, tmp_path, monkeypatch):
    """The refusal names field and value; without it the Flax class differs from PyTorch's."""
    changed = {"sliding_window": 24} if model_type == "mistral" else {}
    theirs = make_torch(model_type, task, **changed | {field: WRONG[model_type, task][field]})
    save(theirs, tmp_path)
    with pytest.raises(ValueError, match=rf"{field}=.*right only: .*(HF PEFT|load_decoder) instead"):
        hf.load(tmp_path, task)
    monkeypatch.setattr(hf_faults, "check", lambda config, task: None)
    assert gap(theirs, *hf.load(tmp_path, task)) > 1e-2


def test_every_rule_refuses_and_defaults_pass():
    """A value outside every rule is refused by name; the default configuration is not, but where it is wrong."""
    known_wrong = {"big_bird": "attention_type", "wav2vec2": "do_stable_layer_norm", "mistral": "sliding_window"}
    for model_type, rules in hf_faults.FIELDS.items():
        config = transformers.CONFIG_MAPPING[model_type]()
        if model_type not in known_wrong:
            hf_faults.check(config, "base")
        else:
            with pytest.raises(ValueError, match=known_wrong[model_type]):
                hf_faults.check(config, "base")
        for field in rules:
            setattr(config, field, -1 if field != "image_size" else (8, 8))
            with pytest.raises(ValueError, match=rf"\b{field}="):
                hf_faults.check(config, "base")
    for task, types in hf_faults.HEAD_FIELDS.items():
        for model_type, rules in types.items():
            for field in rules:
                config = transformers.CONFIG_MAPPING[model_type](**{field: "relu"})
                with pytest.raises(ValueError, match=f"{field}='relu'"):
                    hf_faults.check(config, task)


def test_tied_llama_is_refused_for_its_head_only():
    config = make_config("llama", tie_word_embeddings=True)
    hf_faults.check(config, "base")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True .*(in PyTorch with HF PEFT|load_decoder) instead"):
        hf_faults.check(config, "causal-lm")


# What PyTorch's class reads beyond Flax's and what does not change the function that Flax computes.
HARMLESS = {
    *("use_cache", "use_return_dict", "output_attentions", "output_hidden_states", "problem_type"),
    *("chunk_size_feed_forward", "gradient_checkpointing", "initializer_factor", "initializer_range"),
    *("pad_token_id", "decoder_start_token_id", "eos_token_id"),  # padding rows, loss, generation
    *("is_encoder_decoder", "is_decoder"),  # set by PyTorch's own stacks; roformer's is in the table
}
HEADS_FLAX_LACKS = {"num_labels", "classifier_dropout", "hidden_dropout"}
ROPE_UNUSED = {"partial_rotary_factor", "original_max_position_embeddings"}  # not run by PyTorch; within rope_scaling
SPEC_AUGMENT = {"apply_spec_augment"} | {
    f"mask_{axis}_{what}" for axis in ("time", "feature") for what in ("prob", "length", "min_masks")
}  # training only
SUMMARY = {
    f"summary_{what}" for what in ("first_dropout", "last_dropout", "proj_to_labels", "activation", "type", "use_proj")
}
HARMLESS_IN = {
    "beit": {"add_fpn", "batch_norm_eps", "out_indices", "pool_scales", "reshape_hidden_states", "use_auxiliary_head"}
    | {"semantic_loss_ignore_index"}
    | {f"auxiliary_{what}" for what in ("channels", "concat_input", "loss_weight", "num_convs")},  # segmentation
    "bloom": {*HEADS_FLAX_LACKS, "pretraining_tp", "slow_but_exact"},  # the same product in other pieces
    "clip": {"num_labels", "num_channels"},  # num_channels: the vision model's line of the table
    "dinov2": {"apply_layernorm", "reshape_hidden_states"},  # the backbone
    "gemma": ROPE_UNUSED,
    "gpt2": {*HEADS_FLAX_LACKS, *SUMMARY, "reorder_and_upcast_attn"},  # the same function in float32
    "gpt_neo": HEADS_FLAX_LACKS,
    "gptj": HEADS_FLAX_LACKS,
    "llama": ROPE_UNUSED,
    "marian": {"decoder_vocab_size"},  # unused with shared embeddings
    "mistral": ROPE_UNUSED,
    "mt5": HEADS_FLAX_LACKS,
    "opt": HEADS_FLAX_LACKS,
    "roformer": SUMMARY,  # those that matter are in the table, for multiple choice
    "t5": HEADS_FLAX_LACKS,
    "vit": {"encoder_stride"},  # masked image modelling
    "wav2vec2": {"num_labels", "classifier_proj_size", "use_weighted_layer_sum", "layerdrop", *SPEC_AUGMENT}
    | {"contrastive_logits_temperature", "ctc_loss_reduction", "ctc_zero_infinity", "diversity_loss_weight"}
    | {"tdnn_dilation", "tdnn_dim", "tdnn_kernel", "xvector_output_dim"},  # losses and heads that Flax lacks
    "whisper": {*SPEC_AUGMENT, "scale_embedding"},  # PyTorch reads scale_embedding and does not use it
}


def reads(config_class, *files):
    """Fields that source files read from a configuration, by their stored names."""
    text = re.sub(r'"""[\s\S]*?"""', "", "".join(file.read_text() for file in files))
    fields = {
        *re.findall(r"config\.([a-z]\w*)", text),
        *re.findall(r'getattr\(\s*[\w.]*config\s*,\s*"([a-z]\w*)"', text),
    }
    if "_tied_weights_keys" in text:
        fields.add("tie_word_embeddings")
    return {config_class.attribute_map.get(field, field) for field in fields}, text


SCANNED = sorted(set(FLAX_MODEL_MAPPING_NAMES) - set(hf_faults.COMPOSITES) - {"gpt-sw3"})  # a GPT-2 by another name


@pytest.mark.parametrize("model_type", SCANNED)
def test_fields_that_flax_does_not_read_are_accounted_for(model_type):
    root = Path(transformers.__file__).parent
    config_class = transformers.CONFIG_MAPPING[model_type]
    name = config_class.__module__.split(".")[-2]
    torch_file = root / "models" / name / f"modeling_{name}.py"
    if not torch_file.exists():
        pytest.skip("this transformers has no PyTorch sources")
    fields, text = reads(config_class, torch_file)
    if "ROPE_INIT_FUNCTIONS" in text:
        fields |= reads(config_class, root / "modeling_rope_utils.py")[0]
    flax = {name, "t5"} if name == "mt5" else {name}
    fields -= reads(config_class, *(root / "models" / part / f"modeling_flax_{part}.py" for part in flax))[0]
    rules = [hf_faults.FIELDS, *hf_faults.HEAD_FIELDS.values()]
    refused = {field for rule in rules for field in rule.get(model_type, {})}
    assert fields - refused - HARMLESS - HARMLESS_IN.get(model_type, set()) == set()
