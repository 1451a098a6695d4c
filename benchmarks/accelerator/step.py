"""Train steps: their rates and memory, each method beside LoRA, remat policies, attention roads."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import peanut_jax as pj
from benchmarks.accelerator.context import Context
from benchmarks.accelerator.flops import step_flops
from benchmarks.accelerator.memory import check_fits, device_bytes, program_bytes
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.sizes import Step
from benchmarks.accelerator.weights import random_params, random_tokens
from benchmarks.shapes import decoder_config
from benchmarks.timing import alternate, median_ratio, repeated
from peanut_jax.methods.base import Method
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.decoder_config import ATTENTIONS, REMAT_POLICIES

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
# Rounds in which methods are compared, after a warm-up.
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One method on one setting, with one remat policy.

    Attributes:
        name: The setting's, in `Sizes.steps`.
    """

    name: str
    step: Step
    method: str
    remat: str
    attention: str = "auto"

    @property
    def title(self) -> str:
        return f"{self.name} {self.method} remat={self.remat} attention={self.attention}"


def run(record: Record, context: Context, name: str) -> None:
    """Every method on one setting, with the first remat policy that fits, then all of them in turn for the ratios."""
    step, params = setting(context, name)
    running: dict[str, Callable[[], None]] = {}
    seconds = 0.0
    first, policies = step.methods[0], step.remat
    for method in step.methods:
        line, stepper = first_that_fits(
            record, context, [Case(name, step, method, policy) for policy in policies], params
        )
        if line is not None and stepper is not None:
            running[method] = stepper
            seconds += line["median_seconds"]
            policies = (line["remat"],)  # what is compared recomputes alike
    if first in running and len(running) > 1:
        about, needs = {"step": name, "over": first}, (ROUNDS + 1) * seconds
        record.run(f"{name} ratios", partial(ratios, running, first), about, needs)


def sweep(record: Record, context: Context, field: str) -> None:
    """PEANuT on one setting, once for each remat policy or attention road."""
    name = context.sizes.swept
    step, params = setting(context, name)
    method = peanut_of(step)
    if field == "remat":
        for policy in REMAT_POLICIES:
            first_that_fits(record, context, [Case(name, step, method, policy)], params)
        return
    kept = context.remat.get(name, step.remat[0])
    for road in ATTENTIONS:
        cases = [Case(name, step, method, policy, road) for policy in step.remat[step.remat.index(kept) :]]
        first_that_fits(record, context, cases, params)


def setting(context: Context, name: str) -> tuple[Step, PyTree]:
    """A step of the sizes, and random parameters for it."""
    step = context.sizes.steps[name]
    return step, random_params(Decoder(decoder_config(step.shapes), jnp.dtype(context.sizes.dtype)))


def peanut_of(step: Step) -> str:
    """The first of its methods that is PEANuT."""
    return next(method for method in step.methods if method != "lora")


class Stepper:
    """A compiled step that goes on from its own state."""

    def __init__(self, compiled: Any, state: pj.TrainState, params: PyTree, batch: Any):
        self._compiled, self._state, self._rest = compiled, state, (params, batch)
        self.loss = float("nan")

    def __call__(self) -> None:
        self._state, metrics = self._compiled(self._state, *self._rest)
        jax.block_until_ready((self._state, metrics))
        self.loss = float(metrics["loss"])


def first_that_fits(
    record: Record, context: Context, cases: Sequence[Case], params: PyTree
) -> tuple[dict[str, Any] | None, Stepper | None]:
    """The line of the first case that fits the memory, and its step."""
    for case in cases:
        found: list[Stepper] = []
        work = partial(_measure, context, case, params, found)
        line = record.run(case.title, work, _about(case), at_first=context.sizes.case_seconds)
        if line is not None:
            return line, found[0]
        if not record.out_of_memory:
            break
    return None, None


def _about(case: Case) -> dict[str, Any]:
    step = case.step
    return {
        "step": case.name,
        "shapes": step.shapes,
        "method": case.method,
        "rows": step.rows,
        "seq": step.seq,
        "rank": step.rank,
        "targets": list(step.targets),
        "remat": case.remat,
        "attention": case.attention,
    }


def _measure(context: Context, case: Case, params: PyTree, found: list[Stepper]) -> dict[str, Any]:
    """Compiles, checks the memory, warms up and repeats one case; appends its step to `found`."""
    began = time.perf_counter()
    train, start, batch = program(case, context.sizes.dtype)
    arguments = start(params), params, batch()
    trained = pj.count(arguments[0].adapters)
    lowered = train.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = {"trace_seconds": traced - began, "compile_seconds": time.perf_counter() - traced}
    memory = program_bytes(compiled)
    check_fits(memory, device_bytes())
    stepper = Stepper(compiled, *arguments)
    times = repeated(stepper, seconds=context.sizes.repeat_seconds)
    if not np.isfinite(stepper.loss):
        raise FloatingPointError(f"the loss after {len(times) + 1} steps is {stepper.loss}")
    found.append(stepper)
    median = float(np.median(times))
    depth = None if case.method == "lora" else int(case.method.removeprefix("peanut-"))
    rates = {name: count / median / 1e12 for name, count in step_flops(case.step, depth, trained).items()}
    peak = context.peak_tflops
    return {
        "median_seconds": median,
        "repeats": len(times),
        "spread": (max(times) - min(times)) / median,
        "tokens_per_second": case.step.tokens / median,
        **rates,
        "base_of_peak": rates["base_tflops"] / peak if peak else None,
        "model_of_peak": rates["model_tflops"] / peak if peak else None,
        **seconds,
        **memory,
        "peak_bytes_of_process": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "trained": trained,
        "loss": stepper.loss,
    }


def program(case: Case, dtype: str) -> tuple[Any, Callable[[PyTree], pj.TrainState], Callable[[], Array]]:
    """A case's step, the state that it starts from for some parameters, and its batch."""
    step = case.step
    model = Decoder(decoder_config(step.shapes, remat=case.remat, attention=case.attention), jnp.dtype(dtype))
    config, tx = method_config(case.method, step), optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def start(params: PyTree) -> pj.TrainState:
        return pj.TrainState.create(pj.init(jax.random.key(0), params, config), tx, jax.random.key(2))

    train = pj.make_train_step(plain_loss(model), tx, config, max_grad_norm=step.clip)
    return train, start, lambda: random_tokens(step.rows, step.seq, model.config.vocab_size)


def method_config(method: str, step: Step) -> Method:
    """Config of "lora" or "peanut-D" on a step's targets."""
    if method == "lora":
        return pj.LoraConfig(r=step.rank, target_modules=step.targets)
    return pj.PeanutConfig(r=step.rank, depth=int(method.removeprefix("peanut-")), target_modules=step.targets)


def plain_loss(model: Decoder) -> Callable[[PyTree, Array, Any], Array]:
    """The mean loss of full rows of tokens without padding, each its own label's predecessor."""

    def loss_fn(params: PyTree, tokens: Array, key: Any) -> Array:
        weights = jnp.ones(tokens.shape).at[:, -1].set(0)
        total, count = model.apply(params, tokens, jnp.roll(tokens, -1, 1), weights, method="loss")
        return total / count

    return loss_fn


def ratios(running: Mapping[str, Callable[[], None]], first: str) -> dict[str, Any]:
    """Each method's seconds over the first's, in turn: what the machine does to one it does to the others."""
    seconds = alternate(running, ROUNDS)
    return {"seconds_over_first": {name: median_ratio(times, seconds[first]) for name, times in seconds.items()}}
