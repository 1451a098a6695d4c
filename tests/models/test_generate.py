"""Generation equals torch's `generate`: greedy and beams, ragged prompts, ends; with adapters merged and not."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import peanut_jax as pj
from peanut_jax.models import beam as searching
from peanut_jax.models import sampling as drawing
from peanut_jax.models.decoding import Prompts, Rules, stages
from peanut_jax.models.generate import Sampling, generate
from peanut_jax.models.loading import load_decoder
from peanut_jax.models.sampling import filtered
from tests.models.test_decoder import build

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [18]]


@pytest.fixture(scope="module", params=["llama3.1", "mistral", "qwen3"])
def models(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llama3")


@pytest.fixture(scope="module")
def llama(llama_folder):
    return build("llama3", llama_folder)


def torch_generate(model, prompts, **options):
    """The new tokens of each prompt, cut after the first end-of-sequence token."""
    length = max(map(len, prompts))
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **options)[:, length:].tolist()
    return [cut(row, options.get("eos_token_id") or []) for row in out]


def cut(row, eos):
    ends = [i for i, token in enumerate(row) if token in eos]
    return row[: ends[0] + 1] if ends else row


@pytest.mark.matrix
@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("eos", [(), (3,), tuple(range(3, 12)), tuple(range(3, 40))])
def test_greedy_and_beams(models, num_beams, eos):
    """Some of the rows end early with the larger sets of ends."""
    torch_model, model, params = models
    options = {"max_new_tokens": 20, "num_beams": num_beams}
    want = torch_generate(torch_model, PROMPTS, eos_token_id=list(eos) or None, **options)
    got = generate(model, params, PROMPTS, eos_token_ids=eos, **options)
    assert got == want
    if len(eos) > 30:
        assert min(map(len, got)) < 20


@pytest.mark.large
def test_beams_of_which_one_token_goes_on(llama):
    """As many ends as a search with beams can have."""
    torch_model, model, params = llama
    options = {"max_new_tokens": 6, "num_beams": 4}
    want = torch_generate(torch_model, PROMPTS, eos_token_id=list(range(1, 90)), **options)
    assert generate(model, params, PROMPTS, eos_token_ids=range(1, 90), **options) == want


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
def test_length_penalty(llama, length_penalty):
    torch_model, model, params = llama
    options = {"max_new_tokens": 12, "num_beams": 3, "length_penalty": length_penalty}
    want = torch_generate(torch_model, PROMPTS, eos_token_id=list(range(3, 25)), **options)
    assert generate(model, params, PROMPTS, eos_token_ids=range(3, 25), **options) == want


def adapter(params, seed, config):
    """Adapters of no small effect."""
    leaves, structure = jax.tree.flatten(pj.init(jax.random.key(seed), params, config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


@pytest.mark.parametrize("num_beams", [1, pytest.param(3, marks=pytest.mark.large)])
def test_repetition_penalty(llama, num_beams):
    torch_model, model, params = llama
    options = {"max_new_tokens": 12, "num_beams": num_beams, "repetition_penalty": 1.7}
    want = torch_generate(torch_model, PROMPTS, eos_token_id=None, **options)
    got = generate(model, params, PROMPTS, eos_token_ids=(), **options)
    assert got == want != generate(model, params, PROMPTS, eos_token_ids=(), **{**options, "repetition_penalty": 1.0})


@pytest.mark.parametrize(
    ("num_beams", "scan_layers"),
    [(1, True), *(pytest.param(4, scan, marks=pytest.mark.large) for scan in (True, False))],
)
def test_adapters_merged_unmerged_and_side_by_side(llama, llama_folder, num_beams, scan_layers):
    _, model, params = llama
    if not scan_layers:
        model, params = load_decoder(llama_folder, jnp.float32, scan_layers=False)
    options = {"max_new_tokens": 12, "num_beams": num_beams}
    targets = ["down_proj", "q_proj"]
    kinds = (
        pj.PeanutConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]),
        pj.LoraConfig(r=2, target_modules=targets),
        pj.DoraConfig(r=3, target_modules=targets),
    )
    adapters = [(adapter(params, seed, config), config) for seed, config in enumerate(kinds)]
    merged = [generate(model, pj.merge(params, *one), PROMPTS, **options) for one in adapters]
    plain = generate(model, params, PROMPTS, **options)
    assert plain != merged[0] != merged[1] != merged[2] != plain
    updates = [pj.compute_updates(one, params, config) for one, config in adapters]
    if num_beams == 1:
        assert generate(model, params, PROMPTS, factors=updates[0], **options) == merged[0]
    rows = generate(model, params, PROMPTS, factors=updates, adapter_ids=[1, 0, 2], **options)
    assert rows == [merged[1][0], merged[0][1], merged[2][2]]


def test_arrays_are_prompts_too(llama):
    _, model, params = llama
    prompts = np.arange(3, 13).reshape(2, 5)
    options = {"max_new_tokens": 4}
    want = generate(model, params, prompts.tolist(), eos_token_ids=[5], **options)
    assert generate(model, params, prompts, eos_token_ids=np.array([5]), **options) == want


def compiled():
    return [step._cache_size() for step in (drawing._start, drawing._go_on)]


def test_no_recompilation(llama):
    """Prompts, lengths and batches of one bucket, and whatever tokens are chosen by, share what was compiled."""
    _, model, params = llama
    prompts = [[5, 6], [7], [8] * 12, [9], [1] * 16, [2] * 3, [4], [3, 4]]
    generate(model, params, prompts, max_new_tokens=9, eos_token_ids=(3, 5), repetition_penalty=1.5)
    before = compiled()
    for rows, new, ends, penalty in ((5, 16, (7, 8), 1.2), (6, 3, (8, 9), 0.5), (7, 40, (4, 11), 3)):
        options = {"max_new_tokens": new, "eos_token_ids": ends, "repetition_penalty": penalty}
        assert len(generate(model, params, prompts[:rows], **options)) == rows
    assert compiled() == before
    for sampling in (Sampling(), Sampling(temperature=0.3), Sampling(top_k=3), Sampling(top_p=0.5, temperature=2.0)):
        generate(model, params, PROMPTS, max_new_tokens=16, sampling=sampling, key=jax.random.key(0))
    assert compiled() == [one + 1 for one in before]


def test_time_and_memory_follow_the_tokens():
    """A cache of the tokens so far, whatever is allowed."""
    assert stages(16, 32) == [64]
    assert stages(32, 2080) == [64, 128, 256, 512, 768, 1024, 1536, 2080]
    assert stages(2048, 2064) == [2064]
    assert stages(2048, 4096) == [3072, 4096]


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("num_beams", [1, pytest.param(4, marks=pytest.mark.large)])
def test_the_cache_is_written_in_place(llama_folder, llama, scan_layers, num_beams):
    """What a loop holds beside it is less than a copy of one of its layers, as the compiled program says."""
    model, params = load_decoder(llama_folder, jnp.float32, scan_layers=scan_layers)
    tokens, kind = jnp.zeros((8, 16), jnp.int32), drawing if num_beams == 1 else searching
    prompts = Prompts(params, tokens, tokens == 0, jnp.ones(8, bool), None)
    rules, options = Rules(jnp.int32(9), jnp.array([3]), None), {} if num_beams == 1 else {"num_beams": num_beams}
    extra = None if num_beams == 1 else jnp.float32(1)
    trees = []

    def started():
        state = kind._start(model, prompts, rules, extra, slots=2048, **options)
        trees.append(jax.tree.structure(state))
        return jax.tree.leaves(state)

    def go_on(leaves, params):
        again = prompts.replace(params=params)
        return kind._go_on(model, again, rules, extra, jax.tree.unflatten(trees[0], leaves))

    leaves = jax.eval_shape(started)
    memory = jax.jit(go_on, donate_argnums=0).lower(leaves, params).compile().memory_analysis()
    rows, config = 8 * num_beams, model.config
    layer = 2 * 4 * rows * 2048 * config.num_key_value_heads * config.head_dim
    assert memory.alias_size_in_bytes > config.num_hidden_layers * layer
    # A scan on CPU slices its layer's keys and values out.
    assert memory.temp_size_in_bytes < (1.2 * layer if scan_layers else 0.5 * layer)


def test_sampling(llama):
    _, model, params = llama
    options = {"max_new_tokens": 16, "sampling": Sampling(temperature=1.5), "key": jax.random.key(0)}
    drawn = generate(model, params, PROMPTS, **options)
    assert drawn == generate(model, params, PROMPTS, **options)
    assert drawn == generate(model, params, [*PROMPTS, [7]], **options)[:3]  # whatever else is in the batch
    assert drawn != generate(model, params, PROMPTS, **{**options, "key": jax.random.key(1)})
    greedy = generate(model, params, PROMPTS, max_new_tokens=16)
    assert drawn != greedy
    assert generate(model, params, PROMPTS, **{**options, "sampling": Sampling(top_k=1)}) == greedy


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.7, top_k=5), Sampling(top_p=0.6), Sampling(temperature=2.0, top_k=20, top_p=0.8)],
)
def test_filters_are_transformers(sampling):
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    want = warpers(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(
        filtered(jnp.asarray(logits), sampling.temperature, sampling.top_k or 50, sampling.top_p), want, rtol=1e-6
    )


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")
@pytest.mark.parametrize("num_beams", [1, pytest.param(4, marks=pytest.mark.large)])
def test_stories(num_beams):
    """Real weights with a tied head: 199 tokens, each torch's."""
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(STORIES).eval()
    model, params = load_decoder(STORIES, jnp.float32)
    prompts = [[1], [1, 403, 407, 261]]
    options = {"max_new_tokens": 199, "num_beams": num_beams}
    assert generate(model, params, prompts, eos_token_ids=(), **options) == torch_generate(
        torch_model, prompts, eos_token_id=None, **options
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, r"prompts is empty"),
        ({"prompts": [[1], []]}, r"prompt 1 is empty"),
        (
            {"prompts": [[1] * 60]},
            r"prompt 0 has 60 tokens, and with max_new_tokens=8 exceeds the model's context of 64",
        ),
        ({"prompts": [[90]]}, r"prompt 0 holds token 90, outside the model's vocabulary of 90; is the tokenizer"),
        ({"prompts": [[-1]]}, r"prompt 0 holds token -1"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be an integer of at least 1, got 0"),
        ({"num_beams": 0}, r"num_beams must be an integer of at least 1, got 0"),
        ({"num_beams": 2.0}, r"num_beams must be an integer .* got 2\.0"),
        ({"prompts": [1, 2]}, r"prompt 0 must be a list of token ids, got 1"),
        ({"prompts": ["text"]}, r"prompt 0 must be a list of token ids, got 'text'"),
        ({"prompts": [[1.5]]}, r"prompt 0 must be a list of token ids"),
        ({"factors": [{}], "adapter_ids": [0]}, r"factors holds no adapted kernel"),
        ({"sampling": Sampling()}, r"sampling needs a key"),
        ({"sampling": {"temperature": 1}}, r"sampling must be a Sampling or None"),
        ({"adapter_ids": [0]}, r"adapter_ids goes with a list"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be a number above 0, got 0"),
        ({"prompts": [[True, 2]]}, r"prompt 0 must be a list of token ids, got \[True, 2\]"),
        ({"prompts": [[2**70]]}, r"prompt 0 must be a list of token ids, got \[1180"),
        ({"prompts": [[2**32 + 5]]}, r"prompt 0 holds token 4294967301, outside"),
        ({"prompts": [[[1], [1, 2]]]}, r"prompt 0 must be a list of token ids"),
        ({"prompts": "text"}, r"prompts must be lists of token ids, got 'text'"),
        ({"prompts": None}, r"prompts must be lists of token ids, got None"),
        ({"max_new_tokens": True}, r"max_new_tokens must be an integer .* got True"),
        ({"num_beams": 10**9}, r"num_beams must be at most 1024, got 1000000000"),
        ({"eos_token_ids": [2.5]}, r"eos_token_ids must be a list of token ids, got \[2\.5\]"),
        ({"eos_token_ids": 90}, r"eos_token_ids hold token 90, outside the model's vocabulary of 90"),
        ({"eos_token_ids": [-1]}, r"eos_token_ids hold token -1"),
        ({"eos_token_ids": "</s>"}, r"eos_token_ids must be a list of token ids, got '</s>'"),
        ({"length_penalty": float("nan"), "num_beams": 2}, r"length_penalty must be a number that is finite, got nan"),
        (
            {"num_beams": 2, "eos_token_ids": range(90)},
            r"num_beams=2 keeps 91 continuations .* goes on beside the 90 eos_token_ids, and the vocabulary has 90",
        ),
        ({"factors": [{}], "adapter_ids": [3]}, r"adapter_ids must be 1 numbers below 1, got \[3\]"),
    ],
)
def test_bad_arguments(llama, change, message):
    _, model, params = llama
    with pytest.raises(ValueError, match=message):
        generate(model, params, **{"prompts": [[1]], "max_new_tokens": 8, **change})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0}, r"temperature must be above 0"),
        ({"temperature": float("inf")}, r"temperature must be a number that is finite, got inf"),
        ({"temperature": "hot"}, r"temperature must be a number that is finite, got 'hot'"),
        ({"top_p": None}, r"top_p must be a number that is finite, got None"),
        ({"top_k": True}, r"top_k must be an integer of at least 1 or None, got True"),
        ({"top_k": 0}, r"top_k"),
        ({"top_p": 0.0}, r"top_p must be in"),
    ],
)
def test_bad_sampling(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
