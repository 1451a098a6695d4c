"""Facts about new parameters: each is drawn from the distribution that PyTorch's class draws it from.

PyTorch's class of a tiny configuration is built and saved, and every parameter of the Flax class that reads it is drawn
again by `hf_init`: constants must be equal, and random ones alike in their spread and in the whole distribution.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict
from scipy.stats import ks_2samp

from peanut_jax.models import hf, hf_faults, hf_init

torch = pytest.importorskip("torch")

IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
WIDE = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
TEXT = {**WIDE, **IDS, "vocab_size": 97, "max_position_embeddings": 40, "initializer_range": 0.05, "num_labels": 200}
GPT = {"n_embd": 48, "n_layer": 3, "n_head": 2, "n_positions": 40, "vocab_size": 97, "initializer_range": 0.05, **IDS}
LLAMA = {**TEXT, "max_position_embeddings": 64, "head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": False}
STACKS = {
    **{f"{stack}_{what}": size for stack in ("encoder", "decoder") for what, size in
       (("layers", 1), ("attention_heads", 2), ("ffn_dim", 40))},
    **IDS, "vocab_size": 97, "d_model": 48, "max_position_embeddings": 40, "init_std": 0.07, "num_labels": 200,
}  # fmt: skip
T5 = {
    **IDS, "vocab_size": 97, "d_model": 48, "d_kv": 24, "d_ff": 40, "num_layers": 1, "num_heads": 2,
    "initializer_factor": 0.7, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VISION = {**WIDE, "image_size": 8, "patch_size": 4, "initializer_range": 0.05, "num_labels": 200}
CONVOLUTIONS = {"embedding_size": 32, "hidden_sizes": [32, 48], "depths": [1, 2], "num_labels": 200}
TOWER = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 48, "intermediate_size": 40}
CONFIGS = {
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus"), STACKS),
    **dict.fromkeys(("bert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta"), TEXT),
    **dict.fromkeys(("beit", "dinov2", "vit"), VISION),
    **dict.fromkeys(("llama", "gemma"), LLAMA),
    **dict.fromkeys(("longt5", "mt5", "t5"), T5),
    "albert": {**TEXT, "embedding_size": 24},
    "big_bird": {**TEXT, "attention_type": "original_full"},
    "bloom": {**IDS, "vocab_size": 97, "hidden_size": 48, "n_layer": 1, "n_head": 2, "initializer_range": 0.05},
    "clip": {
        "projection_dim": 48, "initializer_factor": 1.3, "text_config": TOWER | {"vocab_size": 97},
        "vision_config": TOWER | {"image_size": 8, "patch_size": 4, "initializer_range": 0.05},
    },
    "distilbert": {**TEXT, "dim": 48, "n_layers": 1, "n_heads": 2, "hidden_dim": 40},
    "electra": {**TEXT, "embedding_size": 24},
    "gpt2": GPT,
    "gpt_neo": {
        **IDS, "vocab_size": 97, "hidden_size": 48, "num_layers": 2, "num_heads": 2, "initializer_range": 0.05,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 40,
    },
    "gptj": {**GPT, "rotary_dim": 4},
    "mistral": {**LLAMA, "sliding_window": 64},
    "opt": {**TEXT, "ffn_dim": 40, "word_embed_proj_dim": 24, "init_std": 0.07},
    "regnet": {**CONVOLUTIONS, "groups_width": 16},
    "resnet": CONVOLUTIONS,
    "wav2vec2": {
        **WIDE, **IDS, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "num_feat_extract_layers": 2,
        "conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4, "add_adapter": True, "num_adapter_layers": 1, "codevector_dim": 48,
        "proj_codevector_dim": 40, "output_hidden_size": 48, "conv_bias": False, "initializer_range": 0.05,
    },
    "whisper": {**STACKS, "num_mel_bins": 20, "max_source_positions": 40, "max_target_positions": 40},
    "xglm": {**STACKS, "ffn_dim": 40, "num_layers": 1, "attention_heads": 2},
}  # fmt: skip
# Behind a weight norm, where PyTorch's own draw does not arrive; and sinusoids.
AS_FLAX_DRAWS = {"wav2vec2": "pos_conv_embed", "whisper": "embed_positions"}

# (model type, task) -> Flax class, by name: to import them all takes seconds.
OFFERS = {
    (model_type, task): name
    for task, auto in hf.TASKS.items()
    for model_type, name in getattr(transformers, auto)._model_mapping._model_mapping.items()
    if model_type not in {*hf_faults.COMPOSITES, "gpt-sw3"}  # a GPT-2 by another name
}
# One of each kind of head.
HEADS = [
    ("bert", "sequence-classification"), ("roberta", "sequence-classification"),
    ("dinov2", "image-classification"), ("resnet", "image-classification"),
]  # fmt: skip


def make_config(model_type, task):
    fields = dict(CONFIGS[model_type])
    if task in ("question-answering", "pretraining", "next-sentence-prediction"):
        fields.pop("num_labels", None)
    if task == "causal-lm" and model_type in ("bert", "big_bird", "electra", "roberta", "xlm-roberta"):
        fields["is_decoder"] = True
    if task == "causal-lm" and model_type == "bart":
        fields |= {"is_decoder": True, "is_encoder_decoder": False}
    return transformers.CONFIG_MAPPING[model_type](**fields)


def torch_class(flax_name):
    """The class of PyTorch that a Flax class is named for, which transformers itself need not export."""
    name = flax_name.removeprefix("Flax")
    if name == "BertForCausalLM":
        return transformers.BertLMHeadModel
    module = getattr(transformers, flax_name).__module__.replace("modeling_flax_", "modeling_")
    return getattr(importlib.import_module(module), name)


def alike(theirs, ours):
    """Whether two samples could be of one distribution: five standard errors of the spread, and Kolmogorov-Smirnov."""
    if theirs.std() == 0 or ours.std() == 0:
        return np.array_equal(theirs, ours)
    if theirs.ndim == 2 and not np.array_equal((theirs == 0).all(1), (ours == 0).all(1)):
        return False  # the row of an embedding for padding
    close = abs(ours.std() / theirs.std() - 1) < max(0.05, 5 / np.sqrt(ours.size))
    return close and ks_2samp(theirs.ravel(), ours.ravel()).pvalue > 1e-5


def different(model_type, task, folder, *, head_only=False):
    """The parameters that are drawn otherwise here than in PyTorch, of the head or of the whole model."""
    torch.manual_seed(0)
    torch_class(OFFERS[model_type, task])(make_config(model_type, task)).save_pretrained(folder)
    model, params = hf.load(folder, task)
    theirs = flatten_dict(params)
    shapes = {path: value.shape for path, value in theirs.items()}
    found = []
    for path, value in theirs.items():
        if head_only and model.base_model_prefix in path:
            continue
        draw = hf_init.draw_of(model.config, path, shapes)
        if draw is None:
            assert AS_FLAX_DRAWS[model_type] in path
            continue
        ours = np.asarray(draw(hf_init.key_of(jax.random.key(1), path), value.shape))
        if not alike(np.asarray(value), ours):
            found.append(f"{'/'.join(path)} {value.shape}: torch {value.std():.4f}, here {ours.std():.4f}")
    return found


@pytest.mark.parametrize(("model_type", "task"), HEADS)
def test_heads_are_drawn_as_torch_draws_them(model_type, task, tmp_path):
    assert different(model_type, task, tmp_path, head_only=True) == []


@pytest.mark.large
@pytest.mark.parametrize(("model_type", "task"), list(OFFERS))
def test_every_parameter_is_drawn_as_torch_draws_it(model_type, task, tmp_path):
    assert different(model_type, task, tmp_path) == []


def test_all_architectures_are_compared():
    assert {model_type for model_type, _ in OFFERS} == CONFIGS.keys()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a bare RoBERTa."""
    folder = tmp_path_factory.mktemp("roberta")
    transformers.RobertaModel(make_config("roberta", "base")).save_pretrained(folder)
    return folder


def test_a_new_head_is_normal_with_the_range_of_the_configuration(base):
    """By `hf.load`, with each layer of the head drawn from a key of its own."""
    head = hf.load(base, "sequence-classification", num_labels=200, initializer_range=0.3)[1]["classifier"]
    for layer, size in (("dense", 48 * 48), ("out_proj", 48 * 200)):
        kernel = head[layer]["kernel"]
        assert abs(kernel.std() / 0.3 - 1) < 5 / np.sqrt(2 * size)
        assert not head[layer]["bias"].any()
    assert not np.array_equal(head["dense"]["kernel"], head["out_proj"]["kernel"][:, :48])


def test_what_else_is_drawn_changes_nothing(base):
    alone = hf.load(base, "sequence-classification", seed=5)[1]
    with_more = hf.load(base, "sequence-classification", seed=5, new_modules=("word_embeddings",))[1]
    jax.tree.map(np.testing.assert_array_equal, alone["classifier"], with_more["classifier"])


def test_a_head_in_half_precision_is_the_float32_one_rounded(base):
    exact, rounded = (
        hf.load(base, "sequence-classification", dtype=dtype)[1]["classifier"]["dense"]["kernel"]
        for dtype in ("float32", "bfloat16")
    )
    assert np.array_equal(exact.astype(jnp.bfloat16), rounded)


@pytest.mark.parametrize("std", [0.02, 1.5])
def test_truncation_is_torchs(std):
    """At values of -2 and 2, not at two standard deviations."""
    ours = np.asarray(hf_init.truncated(std)(jax.random.key(0), (20000,)))
    theirs = torch.nn.init.trunc_normal_(torch.empty(20000), std=std, generator=torch.Generator().manual_seed(0))
    assert alike(theirs.numpy(), ours)
    assert abs(ours).max() <= 2
    assert (abs(ours).max() > 2 * std) == (std < 1)


@pytest.mark.parametrize("value", ["0.02", -1.0, float("nan"), True])
def test_a_range_that_is_not_one(base, value):
    hf.load(base, initializer_range=value)  # draws nothing
    with pytest.raises(
        ValueError, match=r"'roberta' by its configuration's initializer_range.*pass initializer_range="
    ):
        hf.load(base, "sequence-classification", initializer_range=value)
