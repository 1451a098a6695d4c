"""What a train step costs beside LoRA's: XLA's FLOPs and temporary bytes, and seconds, alternating with LoRA.

    python -m benchmarks.step_cost --method peanut --tokens 2048 --rank 32 --depth 2

A Llama of 4 layers, width 1024, with random weights; q, k, v, up and down projections adapted; AdamW. With
`--model flax-llama` it is transformers' class, with `--model decoder` ours, scanned; its FLOPs are then those of a
second program with the layers unrolled.

    lora            LoRA
    peanut          PEANuT by factors, as the library trains it
    materialized    PEANuT with dW formed and multiplied in every layer, as HF PEFT does
    merged          PEANuT with W0 + dW formed and used as the kernel

XLA counts the body of a loop once, so with `--accumulate` above 1 compare bytes, seconds and `tweaker_dots_in_loops`
(the products that read a frozen kernel with r columns inside a while loop, from the compiled HLO; 0 is the claim), not
FLOPs.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import FlaxLlamaForCausalLM, LlamaConfig

import peanut_jax as pj
from benchmarks.timing import alternate, median_ratio, stepping
from peanut_jax import hlo
from peanut_jax.base.kernels import flatten, replace
from peanut_jax.methods.base import Method
from peanut_jax.models.decoder import Decoder, variable_shapes
from peanut_jax.models.decoder_config import REMAT_POLICIES, from_hf

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
METHODS = ("lora", "peanut", "materialized", "merged")


def llama_config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 64, max_position_embeddings=args.seq,
        tie_word_embeddings=False,
    )  # fmt: skip


def draw(shapes: dict, dtype: Any) -> dict:
    """Random parameters, without a slow compiled initialisation."""
    rng = np.random.default_rng(0)

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        norm = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(np.ones(leaf.shape) if norm else rng.normal(0, 0.02, leaf.shape), dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def flax_llama(args: argparse.Namespace) -> tuple[Callable, dict]:
    """transformers' FlaxLlama: loss_fn and random parameters in `args.dtype`."""
    dtype = jnp.dtype(args.dtype)
    model = FlaxLlamaForCausalLM(llama_config(args), _do_init=False, input_shape=(1, 8), dtype=dtype)
    shapes = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, 8)))

    def loss_fn(params, batch, key):
        logits = model(batch, params=params, train=True, dropout_rng=key).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch[:, 1:]).mean()

    return loss_fn, draw(shapes, dtype)


def decoder(args: argparse.Namespace, unroll: int = 1) -> tuple[Callable, dict]:
    """Our decoder, the same sizes."""
    config = from_hf(llama_config(args).to_dict(), remat=args.remat, unroll=unroll)
    model = Decoder(config, jnp.dtype(args.dtype))
    shapes = variable_shapes(model)
    # One chunk when the layers are unrolled, so that the loss is no loop either.
    chunk = args.tokens if unroll > 1 else args.chunk

    def loss_fn(params, batch, key):
        weights = jnp.ones(batch.shape).at[:, -1].set(0)
        total, count = model.apply(params, batch, jnp.roll(batch, -1, 1), weights, chunk=chunk, method="loss")
        return total / count

    return loss_fn, draw(shapes, jnp.dtype(args.dtype))


MODELS: dict[str, Callable[..., tuple[Callable, dict]]] = {"flax-llama": flax_llama, "decoder": decoder}


def materialized(fn: Callable, pairs: dict) -> Callable:
    """`fn` with x @ dW added to every adapted Dense, dW formed as a matrix."""
    updates = {path: pair.delta() for path, pair in pairs.items()}

    def add(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        update = updates.get("/".join((*context.module.path, "kernel")))
        return y if update is None else y + args[0].astype(y.dtype) @ update.astype(y.dtype)

    def call(params, *args):
        with nn.intercept_methods(add):
            return fn(params, *args)

    return call


def merged(fn: Callable, pairs: dict) -> Callable:
    """`fn` on W0 + dW."""

    def call(params, *args):
        flat = flatten(params)
        return fn(
            replace(params, {p: flat[p] + pair.delta().astype(flat[p].dtype) for p, pair in pairs.items()}), *args
        )

    return call


def make_step(method: str, loss_fn: Callable, config: Method, tx, accumulate: int) -> Any:
    """A jitted step; the two that form dW are written here, for the library has no such road."""
    if method in ("lora", "peanut"):
        return pj.make_train_step(loss_fn, tx, config, accumulate_steps=accumulate)
    if accumulate != 1:
        raise SystemExit(f"--accumulate is for lora and peanut, not {method}")
    form = {"materialized": materialized, "merged": merged}[method]

    def step(state, params, batch):
        def loss(adapters):
            return form(loss_fn, pj.factors(adapters, params, config))(params, batch, state.key)

        value, grads = jax.value_and_grad(loss)(state.adapters)
        updates, opt_state = tx.update(grads, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        return state.replace(step=state.step + 1, adapters=adapters, opt_state=opt_state), {"loss": value}

    return jax.jit(step, donate_argnums=0)


def tweaker_dots_in_loops(program: str, rank: int, sides: set[int]) -> int:
    """Dots in the bodies of while loops whose operands are a kernel and its r columns, so part of the tweaker.

    Such a dot has one operand with two kernel sides and gives [side, r] or [r, side]: no token axis.
    """

    def gives_factor(made: hlo.Instruction) -> bool:
        small, *rest = sorted(size for size in hlo.dims(made.shapes[0]) if size != 1) or [0]
        return small == rank and len(rest) == 1 and rest[0] in sides

    def is_kernel(operand: hlo.Instruction) -> bool:
        found = hlo.dims(operand.shapes[0])
        return bool(found) and sides.issuperset(found)

    return len({
        run.instruction.name
        for run in hlo.executions(program)
        if run.loops and run.instruction.opcode in ("dot", "custom-call") and len(run.instruction.shapes) == 1
        if gives_factor(run.instruction) and any(map(is_kernel, run.operands))
    })  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="flax-llama")
    parser.add_argument("--remat", choices=REMAT_POLICIES, default="full", help="the decoder's")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of the decoder's loss at a time")
    parser.add_argument("--method", choices=METHODS, default="peanut")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a step, in sequences of --seq")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--orientation", choices=("output", "input"), default="output")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches a step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each; 0 to only compile")
    args = parser.parse_args()
    if args.tokens // args.accumulate in kernel_sides(args):
        parser.error(
            "a microbatch of as many tokens as a kernel has rows hides the tweaker's products: change --tokens"
        )
    return args


def kernel_sides(args: argparse.Namespace) -> set[int]:
    """Rows and columns of the adapted kernels."""
    return {args.width, args.width * 11 // 4}


def configs(args: argparse.Namespace) -> dict[str, Method]:
    """Method -> its config: LoRA, and what is compared with it."""
    lora = pj.LoraConfig(r=args.rank, target_modules=TARGETS)
    peanut = pj.PeanutConfig(r=args.rank, depth=args.depth, orientation=args.orientation, target_modules=TARGETS)
    return {"lora": lora} if args.method == "lora" else {"lora": lora, args.method: peanut}


def record(method: str, args: argparse.Namespace, trainable: int, step: Any, counted: Any) -> dict[str, Any]:
    """What the compiled step says of its cost.

    Args:
        trainable: Number of trained parameters.
        step: The compiled step.
        counted: The compiled step whose FLOPs are counted, with the layers unrolled.
    """
    return {
        "method": method,
        "model": args.model,
        "remat": args.remat if args.model == "decoder" else None,
        "tokens": args.tokens,
        "rank": args.rank,
        "depth": None if method == "lora" else args.depth,
        "orientation": None if method == "lora" else args.orientation,
        "accumulate": args.accumulate,
        "dtype": args.dtype,
        "trainable": trainable,
        "flops": counted.cost_analysis()["flops"],
        "temp_bytes": step.memory_analysis().temp_size_in_bytes,
        "tweaker_dots_in_loops": tweaker_dots_in_loops(step.as_text(), args.rank, kernel_sides(args)),
    }


def over_lora(own: dict[str, Any], lora: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The record with its ratios to LoRA's, and the times where they were taken."""
    timed = {}
    if seconds:
        times = seconds[own["method"]]
        ratio = median_ratio(times, seconds["lora"])
        timed = {"median_seconds": float(np.median(times)), "seconds_over_lora": ratio}
    ratios = {f"{name}_over_lora": own[name] / lora[name] for name in ("flops", "temp_bytes")}
    return {**own, **timed, **ratios}


def main() -> None:
    args = _arguments()
    loss_fn, params = MODELS[args.model](args)
    unrolled = decoder(args, args.layers)[0] if args.model == "decoder" else None
    tokens = jax.random.randint(jax.random.key(1), (args.tokens // args.seq, args.seq), 0, args.vocab)
    tx = optax.adamw(1e-3)
    records: dict[str, dict] = {}
    steps = {}
    for method, config in configs(args).items():
        state = pj.TrainState.create(pj.init(jax.random.key(0), params, config), tx, jax.random.key(2))
        step = make_step(method, loss_fn, config, tx, args.accumulate).lower(state, params, tokens).compile()
        counted = step
        if unrolled is not None:
            counted = make_step(method, unrolled, config, tx, args.accumulate).lower(state, params, tokens).compile()
        records[method] = record(method, args, pj.count(state.adapters), step, counted)
        steps[method] = stepping(step, state, params, tokens)
    seconds = alternate(steps, args.repeats) if args.repeats else {}
    for own in records.values():
        print(json.dumps(over_lora(own, records["lora"], seconds)), flush=True)


if __name__ == "__main__":
    main()
