"""Twenty steps of the same training in HF PEFT and here: the loss curves stay together."""

import pytest

from benchmarks import against_peft

STEPS = 20


# SGD carries rounding on as it is; AdamW divides by the gradient's own size and so enlarges it.
@pytest.mark.parametrize(("optimizer", "depth", "rtol"), [("sgd", 1, 1e-4), ("adamw", 0, 1e-3)])
def test_losses(optimizer, depth, rtol):
    lr = against_peft.LEARNING_RATES[optimizer]
    sides = against_peft.build(None, {**against_peft.ADAPTER, "depth": depth}, optimizer, lr, seed=0)
    vocab = sides["peft"].model.config.vocab_size
    record = against_peft.compare(sides, against_peft.random_batches(16, vocab, seed=0), STEPS)
    assert len(record["our_losses"]) == len(record["peft_losses"]) == STEPS
    assert record["largest_relative_difference"] < rtol
