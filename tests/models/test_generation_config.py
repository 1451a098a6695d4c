"""generation_config.json: what it says, what of it `generate` does, and what it cannot say."""

import json

import jax.numpy as jnp
import pytest
import torch
import transformers

from peanut_jax.models import generate as generating
from peanut_jax.models.decoder_config import from_hf
from peanut_jax.models.generate import generate
from peanut_jax.models.generation_config import GENERATION_FILE, Generation, Sampling, generation_of, read_generation
from peanut_jax.models.loading import load_decoder
from tests.models.test_decoder import FIELDS, SIZES
from tests.models.test_generate import PROMPTS, cut, torch_generate


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, Generation()),
        ({"eos_token_id": 7}, Generation(eos_token_ids=(7,))),
        ({"eos_token_id": [7, 5, 7]}, Generation(eos_token_ids=(7, 5))),
        ({"eos_token_id": None, "do_sample": None}, Generation()),
        ({"do_sample": True}, Generation(sampling=Sampling(top_k=50))),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0},
            Generation(sampling=Sampling(temperature=0.6, top_p=0.9)),
        ),
        (
            {"do_sample": True, "temperature": None, "top_p": None, "top_k": None},
            Generation(sampling=Sampling()),
        ),
        # Without do_sample these do nothing, 0 included.
        ({"do_sample": False, "temperature": 0, "top_p": 0.9, "min_p": 0.1}, Generation()),
        (
            {"transformers_version": "4.57.0", "_from_model_config": True, "bos_token_id": 1, "pad_token_id": 0,
             "max_length": 20, "max_new_tokens": 2048, "use_cache": True, "no_such_field": [1]},
            Generation(),
        ),
        (
            {"repetition_penalty": 1.05, "no_repeat_ngram_size": 0, "suppress_tokens": [], "num_beams": 4},
            Generation(repetition_penalty=1.05, ignored=("num_beams=4",)),
        ),
        ({"do_sample": True, "min_p": 0.1}, Generation(sampling=Sampling(top_k=50), ignored=("min_p=0.1",))),
        (
            {"eos_token_id": [7, 90, -1]},
            Generation(eos_token_ids=(7,), ignored=("eos_token_id=[90, -1], outside the vocabulary of 90",)),
        ),
    ],
)  # fmt: skip
def test_what_a_file_says(fields, want):
    assert read_generation(fields, 90) == want


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": "2"}, r"eos_token_id must be an integer or a list of up to 1024, got '2'"),
        ({"eos_token_id": [2, True]}, r"eos_token_id must be an integer or a list"),
        ({"eos_token_id": [[2]]}, r"eos_token_id must be an integer or a list"),
        ({"eos_token_id": 2.0}, r"eos_token_id must be an integer or a list"),
        ({"eos_token_id": {}}, r"eos_token_id must be an integer or a list"),
        ({"eos_token_id": list(range(2000))}, r"eos_token_id must be an integer or a list of up to 1024, got \[0, 1"),
        ({"do_sample": 1}, r"do_sample must be true or false, got 1"),
        ({"temperature": "hot"}, r"temperature must be a number that is finite, got 'hot'"),
        ({"temperature": 10**400}, r"temperature must be a number that is finite"),
        ({"top_p": [0.9]}, r"top_p must be a number that is finite, got \[0\.9\]"),
        ({"top_k": 2.5}, r"top_k must be an integer of at least 0 or null, got 2\.5"),
        ({"top_k": -1}, r"top_k must be an integer of at least 0 or null, got -1"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be a number above 0, got 0"),
        ({"repetition_penalty": "1.2"}, r"repetition_penalty must be a number above 0, got '1\.2'"),
        ({"do_sample": True, "temperature": 0}, r"temperature must be above 0"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1\.5"),
    ],
)
def test_what_it_cannot_say(tmp_path, fields, message):
    (tmp_path / GENERATION_FILE).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {message}") as error:
        generation_of(tmp_path, 90)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        ({}, (2,)),
        ({"eos_token_id": None}, ()),
        ({"eos_token_id": [3, 4]}, (3, 4)),
        ({"model_type": "mistral", "num_key_value_heads": 1}, (2,)),
        ({"model_type": "qwen2", "num_key_value_heads": 1}, ()),
        ({"model_type": "qwen2", "num_key_value_heads": 1, "eos_token_id": 5}, (5,)),
    ],
)
def test_without_the_file_it_is_the_config(change, ends):
    """With the default of the family's class in transformers where it is left out."""
    fields = {**FIELDS, **change}
    assert from_hf(fields).generation.eos_token_ids == ends
    own = {name: value for name, value in fields.items() if name != "model_type"}
    reference = transformers.CONFIG_MAPPING[fields["model_type"]](**own)
    theirs = transformers.GenerationConfig.from_model_config(reference).eos_token_id
    assert ends == (() if theirs is None else (theirs,) if isinstance(theirs, int) else tuple(theirs))


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A checkpoint that says which tokens end: some that its greedy answers hold, how to draw, and what to penalise."""
    folder = tmp_path_factory.mktemp("ending")
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    free = torch_generate(theirs, PROMPTS, eos_token_id=None, max_new_tokens=12)
    ends = [free[0][3], free[2][5]]
    theirs.generation_config = transformers.GenerationConfig(
        eos_token_id=ends,
        pad_token_id=0,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        repetition_penalty=1.2,
        no_repeat_ngram_size=12,
    )
    theirs.save_pretrained(folder)
    return free, ends, theirs, *load_decoder(folder, jnp.float32)


def test_generation_is_the_files_by_default(ending, caplog):
    free, ends, theirs, model, params = ending
    generating._note_ignored.cache_clear()
    options = {"max_new_tokens": 12}
    want = torch_generate(theirs, PROMPTS, **options)  # the file's ends, which torch fills up with padding
    got = generate(model, params, PROMPTS, **options)
    assert got == [cut(row, ends) for row in want] != [cut(row, ends) for row in free]
    assert caplog.text.count("what generate does not do: no_repeat_ngram_size=12") == 1
    got = generate(model, params, PROMPTS, repetition_penalty=1, **options)
    assert got == [cut(row, ends) for row in free]
    assert min(map(len, got)) < 12
    assert generate(model, params, PROMPTS, eos_token_ids=(), repetition_penalty=1, **options) == free
    assert caplog.text.count("no_repeat_ngram_size") == 1
    # Greedy whatever the file says; how it would draw is at hand.
    assert model.config.generation.sampling == Sampling(temperature=0.7, top_p=0.9, top_k=5)


def test_an_override_wins_over_the_file(ending, tmp_path):
    ending[2].save_pretrained(tmp_path)
    own = Generation(eos_token_ids=(9,))
    assert load_decoder(tmp_path, generation=own)[0].config.generation == own
    (tmp_path / GENERATION_FILE).unlink()
    assert load_decoder(tmp_path)[0].config.generation.eos_token_ids == (2,)
