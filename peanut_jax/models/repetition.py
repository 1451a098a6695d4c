"""The penalty on tokens that have come before.

References:
    arXiv:1909.05858, section 4.1; transformers 4.57, `generation/logits_process.py`
    (`RepetitionPenaltyLogitsProcessor`), which counts the padding of a prompt too.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Which tokens of the vocabulary a row holds already; None where nothing is penalised.
Said = Bool[Array, "rows vocab"] | None


def said_in(tokens: Int[Array, "rows seq"], real: Bool[Array, "rows seq"], vocab: int) -> Bool[Array, "rows vocab"]:
    """The tokens that stand in each row, padding left out."""
    nothing = jnp.zeros((len(tokens), vocab), bool)
    return nothing.at[jnp.arange(len(tokens))[:, None], jnp.where(real, tokens, vocab)].set(True, mode="drop")


def said_too(said: Said, token: Int[Array, " rows"]) -> Said:
    """With one more token a row."""
    return None if said is None else said.at[jnp.arange(len(token)), token].set(True)


def penalised(
    scores: Float[Array, "rows vocab"], said: Said, penalty: Float[Array, ""] | None
) -> Float[Array, "rows vocab"]:
    """Scores, logits or log-probabilities, made less for tokens that have come before, by a penalty above 1."""
    if said is None or penalty is None:
        return scores
    return jnp.where(said, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
