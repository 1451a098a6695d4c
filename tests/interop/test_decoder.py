"""The decoder's scanned layers to HF's names and back: adapters, LoRA and merged weights, in torch for each family."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import peanut_jax as pj
from peanut_jax.cli import main
from peanut_jax.models.loading import load_decoder
from tests.interop.test_peft import assert_identical, drawn
from tests.models.test_decoder import build

TOKENS = np.random.default_rng(0).integers(3, 90, (2, 12))


@pytest.fixture(scope="module", params=["llama2", "llama3.2", "mistral", "qwen2", "qwen3"])
def built(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "base"
    _, model, params = build(request.param, folder)
    config = pj.PeanutConfig(
        r=3, depth=1, act_fn="silu", target_modules=["q_proj", "v_proj", "down_proj"], init_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapters = drawn(params, config)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(pj.adapt(model.apply, config))(adapters, params, TOKENS)
        assert np.abs(want - model.apply(params, TOKENS)).max() > 1e-2
    return folder, params, config, adapters, np.asarray(want)


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def torch_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_adapters(built, tmp_path):
    folder, params, config, adapters, want = built
    pj.save_adapter(tmp_path, adapters, config, params)
    assert_identical(pj.load_adapter(tmp_path, params)[0], adapters)
    got = torch_logits(peft.PeftModel.from_pretrained(torch_base(folder), tmp_path))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_lora(built, tmp_path):
    folder, params, config, adapters, want = built
    pj.to_lora(adapters, params, config, tmp_path)
    got = torch_logits(peft.PeftModel.from_pretrained(torch_base(folder), tmp_path))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_merged(built, tmp_path):
    """Torch's logits and ours, from the same files; a tied head stays tied."""
    folder, params, config, adapters, want = built
    pj.export_merged(folder, tmp_path / "out", adapters, config, params)
    model = torch_base(tmp_path / "out")
    np.testing.assert_allclose(torch_logits(model), want, rtol=0, atol=1e-4)
    merged, loaded = load_decoder(tmp_path / "out", jnp.float32)
    np.testing.assert_allclose(jax.jit(merged.apply)(loaded, TOKENS), want, rtol=0, atol=1e-4)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == merged.config.tie_word_embeddings
    stored = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.weight" in stored) != merged.config.tie_word_embeddings


def test_verify(built, tmp_path, capsys):
    """The command runs these checkpoints with the decoder, which transformers' Flax classes would refuse."""
    folder, params, config, adapters, _ = built
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    pj.save_adapter(adapter, adapters, config, params)
    assert main(["merge", str(folder), "--adapter", adapter, "--out", out]) == 0
    assert main(["verify", str(folder), out, "--adapter", adapter]) == 0
    assert "logits of shape (2, 16, 90)" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--target-modules", "q_proj", "--r", "4"]) == 0
    assert "model/layers/self_attn/q_proj/kernel" in capsys.readouterr().out
