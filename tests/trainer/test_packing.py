"""Packed rows hold each example once, whole, with the loss on its response."""

import numpy as np
import pytest

from peanut_jax.trainer.packing import pack


def test_a_row_by_hand():
    packed = pack([([1, 2], [3, 4]), ([], [5, 6, 7]), ([8], [9])], 8)
    assert packed["tokens"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 0], [8, 9, 0, 0, 0, 0, 0, 0]]
    assert packed["segments"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert packed["labels"].tolist() == [[2, 3, 4, 0, 6, 7, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0]]
    assert packed["weights"].tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_every_response_token_counts_once():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, (50, 2))
    examples = [(list(rng.integers(1, 9, prompt)), list(rng.integers(1, 9, response))) for prompt, response in sizes]
    packed = pack(examples, 20)
    assert packed["weights"].sum() == sum(len(response) for _, response in examples)
    assert (packed["segments"] > 0).sum() == sum(len(prompt) + len(response) for prompt, response in examples)
    assert len(packed["tokens"]) < 50 / 1.5  # packed


def test_long_examples_are_cut():
    packed = pack([([1, 2], [3, 4, 5, 6])], 4)
    assert packed["tokens"].tolist() == [[1, 2, 3, 4]]
    assert packed["weights"].tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("examples", "message"),
    [([], "empty"), ([([1] * 4, [2])], "prompt of 4 and a response of 1"), ([([1], [])], "of 0")],
)
def test_bad_examples(examples, message):
    with pytest.raises(ValueError, match=message):
        pack(examples, 4)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (([1, 2], [90]), r"the response of example 1 holds token 90, outside the model's vocabulary of 90"),
        (([-1, 2], [3]), r"the prompt of example 1 holds token -1"),
        (([1, 2.5], [3]), r"the prompt of example 1 must be a list of token ids, got \[1, 2\.5\]"),
        (([1], [True]), r"the response of example 1 must be a list of token ids, got \[True\]"),
        (([1], [2**40]), r"the response of example 1 holds token 1099511627776"),
        (([1], ["a"]), r"the response of example 1 must be a list of token ids"),
    ],
)
def test_what_is_not_a_token_id(example, message):
    with pytest.raises(ValueError, match=message):
        pack([([1], [2]), example], 8, vocab_size=90)


def test_ids_that_no_model_has():
    assert pack([([1], [90, 2])], 8)["tokens"][0, 1] == 90
    with pytest.raises(ValueError, match="holds token -100"):
        pack([([1], [-100, 2])], 8)
    with pytest.raises(ValueError, match="holds token 2147483648"):
        pack([([1], [2**31])], 8)
