"""A pretrained language model adapted to another text with PEANuT and with LoRA, at equal parameters: both curves.

    python -m benchmarks.adapt_stories --model STORIES260K_DIR --data train.jsonl --png docs/stories.png

The model is a Llama (such as stories260K, which has read children's stories alone), the text a file of JSON lines with
a question and an answer (such as GSM8K's); the loss is on the answers. Rows are packed, the step is the library's, and
the curve is the loss on examples that are held out.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from transformers import AutoTokenizer

import peanut_jax as pj
from peanut_jax.methods.base import Method
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.loading import load_decoder
from peanut_jax.trainer.packing import pack

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def read_examples(path: Path, tokenizer, length: int) -> list[tuple[list[int], list[int]]]:
    """(question, answer) token ids of each line that fits into a row."""
    examples = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer(f"{record['question']}\n", add_special_tokens=False)["input_ids"]
        answer = tokenizer(record["answer"], add_special_tokens=False)["input_ids"]
        example = [tokenizer.bos_token_id, *prompt], [*answer, tokenizer.eos_token_id]
        if len(example[0]) + len(example[1]) <= length:
            examples.append(example)
    return examples


def lora_rank(params: dict, budget: int) -> tuple[int, int]:
    """The LoRA rank whose parameters are closest to the budget, and their number."""

    def size(r: int) -> int:
        return pj.count(pj.init(jax.random.key(0), params, pj.LoraConfig(r=r, target_modules=TARGETS)))

    sizes = {r: size(r) for r in range(1, 17)}
    best = min(sizes, key=lambda r: abs(sizes[r] - budget))
    return best, sizes[best]


def run(model: Decoder, params: dict, config: Method, train: dict, test: dict, args: argparse.Namespace, seed: int):
    """(step, held-out loss a token) every `args.every` steps."""

    def loss_fn(params, batch, key):
        total, count = model.apply(
            params, batch["tokens"], batch["labels"], batch["weights"], segments=batch["segments"], method="loss"
        )
        return total / count, {"weight": count}

    schedule = optax.warmup_cosine_decay_schedule(0.0, args.lr, args.steps // 20, args.steps)
    tx = optax.adamw(schedule, weight_decay=0.0)
    step = pj.make_train_step(loss_fn, tx, config, max_grad_norm=1.0)
    state = pj.TrainState.create(pj.init(jax.random.key(seed), params, config), tx, jax.random.key(seed))
    evaluate = jax.jit(pj.adapt(lambda params, batch: loss_fn(params, batch, None)[0], config))
    rng, curve = np.random.default_rng(seed), []
    for i in range(args.steps + 1):
        if i % args.every == 0:
            curve.append((i, float(evaluate(state.adapters, params, test))))
        rows = rng.choice(len(train["tokens"]), args.batch, replace=False)
        state, _ = step(state, params, {name: array[rows] for name, array in train.items()})
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--png", type=Path, required=True, metavar="FILE")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--held-out", type=int, default=32, help="examples of the curve")
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--rank", type=int, default=8, help="PEANuT's; LoRA's follows from its parameters")
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()

    model, params = load_decoder(args.model, jnp.float32, remat="none")
    examples = read_examples(args.data, AutoTokenizer.from_pretrained(args.model), args.length)
    held_out = min(args.held_out, len(examples) // 2)
    test, train = pack(examples[:held_out], args.length), pack(examples[held_out:], args.length)
    peanut = pj.PeanutConfig(r=args.rank, depth=args.depth, target_modules=TARGETS)
    budget = pj.count(pj.init(jax.random.key(0), params, peanut))
    rank, lora_size = lora_rank(params, budget)
    configs: dict[str, Method] = {
        f"PEANuT, r {args.rank}, depth {args.depth}: {budget:,} parameters": peanut,
        f"LoRA, r {rank}: {lora_size:,} parameters": pj.LoraConfig(r=rank, target_modules=TARGETS),
    }
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name, config in configs.items():
        curves = np.array([run(model, params, config, train, test, args, seed) for seed in range(args.seeds)])
        steps, losses = curves[0, :, 0], curves[:, :, 1]
        axes.plot(steps, losses.mean(0), label=name)
        axes.fill_between(steps, losses.min(0), losses.max(0), alpha=0.2)
        ends = losses[:, -1]
        record = {"name": name, "first": losses[:, 0].mean(), "last": ends.mean(), "range": [ends.min(), ends.max()]}
        print(json.dumps(record, default=float), flush=True)
    axes.set(xlabel="step", ylabel="held-out loss a token of the answer (nats)")
    axes.set_title(f"{len(examples) - held_out:,} examples, {args.batch} rows of {args.length} a step, lr {args.lr:g}")
    axes.legend()
    figure.savefig(args.png, dpi=120)


if __name__ == "__main__":
    main()
