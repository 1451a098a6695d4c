"""What a sharded train step moves and holds on each device, PEANuT beside LoRA at equal rank. Compiled, never run.

    python -m benchmarks.sharding --mesh data=2,fsdp=2,tensor=2 --depth 2
    python -m benchmarks.sharding --mesh data=8 fsdp=8 tensor=8 --orientation output input --depth 0 2 --summary
    python -m benchmarks.sharding --mesh data=4,fsdp=16,tensor=4 --layers 80 --width 8192 --intermediate 28672 \
        --heads 64 --kv-heads 8 --vocab 128256 --batch 64 --seq 2048 --dtype bfloat16 --unconstrained --summary

The devices are fake CPU devices, as many as the mesh has places; all arrays are abstract. A line for each collective:

    kind, shape, bytes      of one execution, on one device (`peanut_jax.hlo`); XLA puts several all-reduces into one,
                            here each is a line of its own
    times, places           executions a step, and how many collectives of the program are alike
    group_size, axes        who takes part, and the mesh axes that this group runs along
    owner                   model: forward and backward pass; tweaker: from theta to the factors and back;
                            optimizer: all that follows (the gradient's norm among it)

then a line for each method with its sums, and PEANuT's sums over LoRA's. XLA on CPU computes in float32 what is
bfloat16: with `--dtype bfloat16` the step is compiled in float32, and the model's collectives, the base and the
temporary arrays are counted at half, as `peanut_jax.plan` does. The tweaker and the optimizer are float32 either way.

`--unconstrained` also compiles the step without `peanut_jax.sharding.constrain`, that is with the shardings of the
parameters, the batch and the state alone.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from transformers import FlaxRobertaForSequenceClassification, RobertaConfig

import peanut_jax as pj
from benchmarks.moves import SCOPE, Move, moves
from peanut_jax.methods.base import Method
from peanut_jax.methods.peanut import ORIENTATIONS
from peanut_jax.models.decoder import CHUNK, Decoder, language_loss, variable_shapes
from peanut_jax.models.decoder_config import DecoderConfig, from_hf
from peanut_jax.plan import device_bytes, program_of
from peanut_jax.sharding import (
    batch_sharding,
    batch_shards,
    make_mesh,
    mesh_of,
    mesh_sizes,
    rules_for,
    shard,
    sharded_train_step,
    state_shapes,
)
from peanut_jax.training import LossFn, make_train_step

# With down_proj, whose rows are on `tensor`, kernels of both cuts.
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "roberta": ["query", "value"]}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to train, its parameters and batch as shapes with shardings."""

    loss_fn: LossFn
    params: PyTree
    batch: PyTree
    targets: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Cost:
    """A step on one device, in bytes."""

    params: int
    state: int
    temporary: int
    moves: tuple[Move, ...]

    @property
    def traffic(self) -> int:
        return sum(move.traffic for move in self.moves)


def llama(config: DecoderConfig, mesh: Mesh, batch: int, seq: int) -> Case:
    """Our decoder with its language loss; `batch` rows over all devices."""
    model = Decoder(config, jnp.dtype("float32"))
    names = {"tokens": "int32", "labels": "int32", "weights": "float32", "segments": "int32"}
    rules = rules_for(config.model_type, scan_layers=config.scan_layers)
    params = shard(variable_shapes(model), mesh, rules)
    loss_fn = language_loss(model, CHUNK * batch_shards(mesh))
    return Case(loss_fn, params, _batch(names, (batch, seq), mesh), TARGETS["llama"])


def roberta(config: RobertaConfig, mesh: Mesh, batch: int, seq: int) -> Case:
    """transformers' FlaxRoberta for classification, with dropout."""
    model = FlaxRobertaForSequenceClassification(config, _do_init=False, input_shape=(1, 4))

    def loss_fn(params, batch, key):
        logits = model(batch["tokens"], params=params, dropout_rng=key, train=True).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 0] % config.num_labels).mean()

    params = shard(model.params_shape_tree, mesh, rules_for("roberta"))
    return Case(loss_fn, params, _batch({"tokens": "int32"}, (batch, seq), mesh), TARGETS["roberta"])


def compiled_step(case: Case, adapter: Method, *, constrained: bool = True) -> tuple[jax.stages.Compiled, Any]:
    """The train step with AdamW, and the state's shapes.

    Args:
        constrained: False leaves the activations to XLA.
    """
    tx = optax.adamw(1e-3)

    def loss_fn(params, batch, key):
        with jax.named_scope(SCOPE):
            return case.loss_fn(params, batch, key)

    state = state_shapes(case.params, adapter, tx)
    if constrained:
        step: Any = sharded_train_step(loss_fn, tx, adapter, state, case.params)
    else:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        out = shardings, NamedSharding(mesh_of(case.params), PartitionSpec())
        step = jax.jit(make_train_step(loss_fn, tx, adapter), donate_argnums=0, out_shardings=out)
    return step.lower(state, case.params, case.batch).compile(), state


def cost(case: Case, adapter: Method, *, constrained: bool = True, dtype: str = "float32") -> Cost:
    """What the train step takes on one device; see the head of this file for `dtype`."""
    compiled, state = compiled_step(case, adapter, constrained=constrained)
    text, temporary = program_of(compiled)
    half = 2 if dtype == "bfloat16" else 1
    return Cost(
        params=device_bytes(case.params) // half,
        state=device_bytes(state),
        temporary=temporary // half,
        moves=tuple(
            dataclasses.replace(move, bytes=move.bytes // (half if move.owner == "model" else 1))
            for move in moves(text, mesh_of(case.params))
        ),
    )


def summary(found: Cost) -> dict[str, Any]:
    """Bytes a step by owner, and by kind and axes."""
    by_owner: collections.Counter[str] = collections.Counter()
    by_axes: collections.Counter[str] = collections.Counter()
    for move in found.moves:
        by_owner[move.owner] += move.traffic
        by_axes[f"{move.kind} {'+'.join(move.axes)}"] += move.traffic
    return {
        "params_bytes": found.params,
        "state_bytes": found.state,
        "temp_bytes": found.temporary,
        "collective_bytes": found.traffic,
        "by_owner": dict(sorted(by_owner.items())),
        "by_kind_and_axes": dict(sorted(by_axes.items())),
    }


def _batch(names: Mapping[str, str], shape: tuple[int, int], mesh: Mesh) -> PyTree:
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(mesh)) for name, kind in names.items()}


def _case(args: argparse.Namespace, mesh: Mesh) -> Case:
    width, heads = args.width, args.heads or args.width // 64
    if args.model == "roberta":
        roberta_config = RobertaConfig(
            vocab_size=args.vocab, hidden_size=width, num_hidden_layers=args.layers, num_attention_heads=heads,
            intermediate_size=args.intermediate or 4 * width, max_position_embeddings=args.seq + 2, num_labels=3,
        )  # fmt: skip
        return roberta(roberta_config, mesh, args.batch, args.seq)
    fields = {
        "model_type": "llama", "vocab_size": args.vocab, "hidden_size": width, "num_hidden_layers": args.layers,
        "intermediate_size": args.intermediate or width * 11 // 4, "num_attention_heads": heads,
        "num_key_value_heads": args.kv_heads or heads, "max_position_embeddings": args.seq,
    }  # fmt: skip
    return llama(from_hf(fields), mesh, args.batch, args.seq)


def _report(head: dict[str, Any], found: Cost, lora: Cost | None, brief: bool) -> None:
    if not brief:
        for move, places in collections.Counter(found.moves).items():
            print(json.dumps({**head, **dataclasses.asdict(move), "places": places}))
    record = {**head, **summary(found)}
    if lora is not None:
        record |= {
            "collective_bytes_over_lora": found.traffic / lora.traffic,
            "temp_bytes_over_lora": found.temporary / lora.temporary,
        }
    print(json.dumps(record), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", nargs="+", default=["data=2,fsdp=2,tensor=2"], help="one or several of one size")
    parser.add_argument("--model", choices=sorted(TARGETS), default="llama")
    parser.add_argument("--orientation", nargs="+", choices=ORIENTATIONS, default=["output"])
    parser.add_argument("--depth", nargs="+", type=int, default=[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, help="default: 11/4 of the width, RoBERTa's: 4")
    parser.add_argument("--heads", type=int, help="default: one for 64 of the width")
    parser.add_argument("--kv-heads", type=int, help="the decoder's; default: as many as heads")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64, help="rows a step, over all devices")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--unconstrained", action="store_true", help="the step without `constrain` as well")
    parser.add_argument("--summary", action="store_true", help="no line for each collective")
    args = parser.parse_args()
    args.places = {math.prod(mesh_sizes(sizes).values()) for sizes in args.mesh}
    if len(args.places) > 1 or min(args.places) < 1:
        parser.error(f"the meshes must be of one size, without -1, got {' '.join(args.mesh)}")
    return args


def _compare(case: Case, args: argparse.Namespace, head: dict[str, Any], *, constrained: bool) -> None:
    """The lines of LoRA and of every PEANuT, on one mesh."""
    head = {**head, "model": args.model, "constrained": constrained, "dtype": args.dtype}
    options: dict[str, Any] = {"constrained": constrained, "dtype": args.dtype}
    lora = cost(case, pj.LoraConfig(r=args.rank, target_modules=case.targets), **options)
    _report({**head, "method": "lora"}, lora, None, args.summary)
    for orientation, depth in itertools.product(args.orientation, args.depth):
        config = pj.PeanutConfig(r=args.rank, depth=depth, orientation=orientation, target_modules=case.targets)
        own = {**head, "method": "peanut", "orientation": orientation, "depth": depth}
        _report(own, cost(case, config, **options), lora, args.summary)


def main() -> None:
    args = _arguments()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", *args.places)
    for sizes in args.mesh:
        case = _case(args, make_mesh(sizes))
        for constrained in (True, False) if args.unconstrained else (True,):
            _compare(case, args, {"mesh": sizes}, constrained=constrained)


if __name__ == "__main__":
    main()
