"""Numbers of three fixed training steps: `python -m tests.golden.make` writes them to steps.json.

They pin what the equations alone do not: init draws, keys of kernels, the order of the step. A change of them is a
change for everyone who resumes a run, and needs its cause in the commit message.
"""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import peanut_jax as pj

FILE = Path(__file__).parent / "steps.json"


class Net(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(5, use_bias=False, name="first")(x))
        return nn.Dense(4, use_bias=False, name="second")(hidden)


def steps(orientation: str, depth: int) -> dict[str, float]:
    """Three AdamW steps of two microbatches on a two-layer network of fixed weights."""
    weights = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(weights.normal(size=shape), jnp.float32)}
        for name, shape in (("first", (6, 5)), ("second", (5, 4)))
    }
    x, y = (jnp.asarray(weights.normal(size=(8, width)), jnp.float32) for width in (6, 4))

    config = pj.PeanutConfig(
        r=3, depth=depth, act_fn="gelu", orientation=orientation, target_modules="all-linear", scaling=0.5
    )
    tx = optax.adamw(1e-2)
    step = pj.make_train_step(
        lambda params, batch, key: jnp.mean((Net().apply({"params": params}, batch["x"]) - batch["y"]) ** 2),
        tx,
        config,
        accumulate_steps=2,
        max_grad_norm=1.0,
    )
    state = pj.TrainState.create(pj.init(jax.random.key(0), params, config), tx, jax.random.key(1))
    numbers = {}
    for i in range(3):
        state, metrics = step(state, params, {"x": x, "y": y})
        numbers |= {f"{name} {i}": float(value) for name, value in metrics.items()}
    for path, theta in state.adapters.theta.items():
        numbers |= {f"{path} {name}": float(jnp.abs(leaf).sum()) for name, leaf in theta.items()}
    return numbers


CASES = {f"{o} {d}": (o, d) for o in ("output", "input") for d in (0, 1)}


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: steps(*case) for name, case in CASES.items()}, indent=1) + "\n")
