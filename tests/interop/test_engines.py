"""What engines serve: the rules of `interop.engines`, each as its engine's source has it."""

import dataclasses

import pytest

from peanut_jax.interop.engines import ENGINES, Exported, check, is_known, refusal

LAYER = "model.layers.0"
LLAMA = Exported([f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj", f"{LAYER}.mlp.down_proj"], 8, (), "llama")


def changed(**fields):
    return dataclasses.replace(LLAMA, **fields)


def modules(*names):
    return changed(modules=[f"{LAYER}.{name}" for name in names])


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_of_a_llama_is_served_by_all(engine):
    assert refusal(ENGINES[engine], LLAMA) is None
    assert is_known(ENGINES[engine], LLAMA)


@pytest.mark.parametrize(
    ("engine", "lora", "reason"),
    [
        ("vllm", changed(rank=513), "ranks up to 512, and this adapter has 513"),
        (
            "vllm",
            changed(saved=["score.weight"]),
            "takes no saved modules beside a LoRA, and this adapter saves 's",
        ),
        ("vllm", changed(model_type="gpt2"), "serves no LoRA on a model of type 'gpt2'"),
        ("vllm", changed(modules=["lm_head"]), "serves no LoRA on the module 'lm_head' of a model of type 'llama'"),
        ("vllm", changed(modules=["layers.0.self_attn.q_proj"]), "on the module 'layers.0.self_attn.q_proj'"),
        ("sglang", changed(saved=["score.weight"]), "takes no saved modules"),
        ("sglang", modules("self_attn.q_proj"), "q_proj' only with one on v_proj of its layer"),
        ("sglang", modules("self_attn.v_proj"), "v_proj' only with one on q_proj"),
        ("sglang", modules("self_attn.k_proj"), "k_proj' only with one on q_proj and v_proj"),
        ("sglang", modules("mlp.up_proj"), "up_proj' only with one on gate_proj"),
        ("sglang", changed(modules=["model.embed_tokens"], model_type=None), "the module 'model.embed_tokens' of this"),
        ("llama.cpp", changed(saved=["model.norm.weight"]), "takes no saved modules"),
        ("llama.cpp", changed(modules=["transformer.h.0.attn.c_proj"], model_type="gpt2"), "a model of type 'gpt2'"),
    ],
)
def test_what_an_engine_does_not_serve(engine, lora, reason):
    assert reason in refusal(ENGINES[engine], lora)
    with pytest.raises(ValueError, match=r"; merge it instead: peanut-jax merge BASE$"):
        check(ENGINES[engine], lora, "peanut-jax merge BASE")
    assert refusal(ENGINES["peft"], lora) is None


def test_what_sglang_reads_together():
    assert (
        refusal(ENGINES["sglang"], modules("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")) is None
    )
    two = changed(modules=[f"{LAYER}.self_attn.q_proj", "model.layers.1.self_attn.v_proj"])
    assert "'model.layers.0.self_attn.q_proj' only with one on v_proj of its layer" in refusal(ENGINES["sglang"], two)


def test_a_model_that_is_not_known_is_left_to_the_engine():
    phi = changed(modules=["model.layers.0.self_attn.qkv_proj"], model_type="phi3")
    assert refusal(ENGINES["vllm"], phi) is None
    assert not is_known(ENGINES["vllm"], phi)


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (257, 320), (321, 512)])
def test_the_flag_is_the_next_one_up(rank, flag):
    (line,) = ENGINES["vllm"].lines("my base", "lora", rank)
    assert line == f"vllm serve 'my base' --enable-lora --max-lora-rank {flag} --lora-modules tuned=lora"
    assert f"--max-lora-rank {rank} " in ENGINES["sglang"].lines("base", "lora", rank)[0]
