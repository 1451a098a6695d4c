"""Tokens a second of greedy generation and beam search beside transformers' torch `generate`, alternating.

    python -m benchmarks.generate --batch 8 --width 512 --layers 8
    python -m benchmarks.generate --width 256 --layers 4 --vocab 4096
    python -m benchmarks.generate --new-tokens 64 --room 2048
    python -m benchmarks.generate --adapters 8 --rank 32

The same checkpoint, prompts and cores: a random float32 Llama, or the one in --model. Both write --new-tokens for each
prompt; compile time is not counted (the first run of each is thrown away).

With --room it is what is allowed that is compared: --new-tokens and --room, of which as many are used, since the
continuations end where they stand after --new-tokens. With --adapters: that many side by side, PEANuT's and LoRA's in
turn, one for each prompt in turn, beside a single one for all and the plain model.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import peanut_jax as pj
from benchmarks.timing import alternate, median_ratio
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.generate import generate
from peanut_jax.models.loading import load_decoder


def random_llama(folder: Path, args: argparse.Namespace) -> None:
    """A checkpoint; for --room of larger numbers, so that continuations do not soon repeat themselves."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 64, num_key_value_heads=args.width // 128,
        max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.02 if args.room is None else 0.1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def torch_generate(reference: Any, prompts: np.ndarray, args: argparse.Namespace) -> list[list[int]]:
    tokens = torch.from_numpy(prompts)
    out = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.new_tokens, do_sample=False,
        num_beams=args.beams, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[:, args.prompt_tokens :].tolist()


def load(args: argparse.Namespace) -> tuple[Any, Decoder, Any]:
    """The checkpoint in torch, and in the decoder with its parameters."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or Path(temporary)
        if args.model is None:
            random_llama(folder, args)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return reference, *load_decoder(folder, jnp.float32, scan_layers=False)


def beside_torch(reference: Any, model: Decoder, params: Any, prompts: np.ndarray, args: argparse.Namespace) -> None:
    """Tokens a second of both, and whether they are the same."""
    options = {"max_new_tokens": args.new_tokens, "num_beams": args.beams, "eos_token_ids": ()}
    answers: dict[str, list[list[int]]] = {}

    def ours() -> None:
        answers["peanut_jax"] = generate(model, params, prompts.tolist(), **options)

    def theirs() -> None:
        answers["torch"] = torch_generate(reference, prompts, args)

    seconds = alternate({"peanut_jax": ours, "torch": theirs}, args.repeats)
    pairs = zip(answers["peanut_jax"], answers["torch"], strict=True)
    same = np.mean([own == its for own, its in pairs])
    for name, values in seconds.items():
        record = {
            "who": name,
            "batch": args.batch,
            "beams": args.beams,
            "parameters": sum(parameter.numel() for parameter in reference.parameters()),
            "tokens_per_second": args.batch * args.new_tokens / float(np.median(values)),
            "speed_over_torch": 1 / median_ratio(values, seconds["torch"]),
            "rows_that_agree": float(same),
        }
        print(json.dumps(record), flush=True)


def with_room(model: Decoder, params: Any, prompts: np.ndarray, args: argparse.Namespace) -> None:
    """Seconds of the same continuations where --new-tokens and where --room are allowed."""
    model = model.clone(config=dataclasses.replace(model.config, max_position_embeddings=1 << 20))
    options: dict[str, Any] = {"num_beams": args.beams}
    free = generate(model, params, prompts.tolist(), max_new_tokens=args.new_tokens, eos_token_ids=(), **options)
    options["eos_token_ids"] = sorted({answer[-1] for answer in free})
    used: dict[int, int] = {}

    def allowed(room: int) -> Callable[[], None]:
        def run() -> None:
            answers = generate(model, params, prompts.tolist(), max_new_tokens=room, **options)
            used[room] = max(map(len, answers))

        return run

    seconds = alternate({str(room): allowed(room) for room in (args.new_tokens, args.room)}, args.repeats)
    for name, values in seconds.items():
        over = median_ratio(values, seconds[str(args.new_tokens)])
        print(json.dumps({"room": int(name), "used": used[int(name)], "seconds_over_exact_room": over}), flush=True)


def with_adapters(model: Decoder, params: Any, prompts: np.ndarray, args: argparse.Namespace) -> None:
    """Seconds without an adapter, with one for all rows, and with several side by side."""
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    kinds = [kind(r=args.rank, target_modules=targets) for kind in (pj.PeanutConfig, pj.LoraConfig)]
    adapters = [
        pj.factors(pj.init(jax.random.key(seed), params, kinds[seed % 2]), params, kinds[seed % 2])
        for seed in range(args.adapters)
    ]
    ids = [row % args.adapters for row in range(args.batch)]
    options = {"max_new_tokens": args.new_tokens, "num_beams": args.beams, "eos_token_ids": ()}
    given: dict[str, dict[str, Any]] = {
        "none": {},
        "one": {"factors": adapters[0]},
        "side by side": {"factors": adapters, "adapter_ids": ids},
    }
    steps: dict[str, Callable[[], Any]] = {
        name: partial(generate, model, params, prompts.tolist(), **options, **served) for name, served in given.items()
    }
    seconds = alternate(steps, args.repeats)
    for name, values in seconds.items():
        record = {"adapters": name, "seconds": float(np.median(values))}
        print(json.dumps({**record, "seconds_over_none": median_ratio(values, seconds["none"])}), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Llama checkpoint instead of a random one")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--room", type=int, help="compare with so many tokens allowed, instead of with torch")
    parser.add_argument("--adapters", type=int, help="compare so many side by side, instead of with torch")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    reference, model, params = load(args)
    prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, (args.batch, args.prompt_tokens))
    if args.room:
        with_room(model, params, prompts, args)
    elif args.adapters:
        with_adapters(model, params, prompts, args)
    else:
        beside_torch(reference, model, params, prompts, args)


if __name__ == "__main__":
    main()
