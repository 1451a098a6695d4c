"""What the mesh costs PEANuT, read from compiled programs that are never run: sizes are those of a real layer."""

from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import peanut_jax as pj
from benchmarks.moves import axes_of, moves, op_names, owner
from benchmarks.sharding import TARGETS, cost, llama
from peanut_jax.base.kernels import flatten
from peanut_jax.models.decoder_config import from_hf
from peanut_jax.sharding import make_mesh, shard, state_shardings

# Sizes that shapes are told apart by; each divides by every part of the meshes below.
D_IN, D_OUT, R, STACK = 48, 80, 6, 3
LAYERS, WIDTH, WIDE, HEADS, KV_HEADS, BATCH, SEQ, RANK = 3, 1024, 2816, 16, 8, 64, 320, 24
CUBE = "data=2,fsdp=2,tensor=2"


def factor_moves(spec, orientation, stack):
    """The collectives of `factors`, and those of its pullback, for one kernel of [D_IN, D_OUT]."""
    mesh, parts = make_mesh("fsdp=2,tensor=4"), (None,) * len(stack)
    shapes = {"kernel": (*stack, D_IN, D_OUT), "bias": (*stack, D_OUT)}
    params = {"dense": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}
    params = shard(params, mesh, [(".*kernel", P(*parts, *spec)), (".*", P())])
    config = pj.PeanutConfig(r=R, depth=1, orientation=orientation, target_modules=["dense"])
    state = jax.eval_shape(
        lambda: pj.TrainState.create(pj.init(jax.random.key(0), params, config), optax.sgd(1.0), jax.random.key(0))
    )
    shardings = state_shardings(state, params, config).adapters
    adapters = jax.tree.map(abstract, state.adapters, shardings)
    held = pj.LowRank(NamedSharding(mesh, P(*parts, spec[0], None)), NamedSharding(mesh, P(*parts, None, spec[1])))
    out = {"dense/kernel": held}

    def factors(adapters, params):
        return pj.factors(adapters, params, config)

    def pulled_back(adapters, params, cotangents):
        return jax.vjp(lambda adapters: factors(adapters, params), adapters)[1](cotangents)[0]

    cotangents = jax.tree.map(abstract, jax.eval_shape(factors, adapters, params), out)
    forward = jax.jit(factors, out_shardings=out).lower(adapters, params)
    both = jax.jit(pulled_back, out_shardings=shardings).lower(adapters, params, cotangents)
    return [list(moves(lowered.compile().as_text(), mesh)) for lowered in (forward, both)]


def abstract(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def big(found):
    """(kind, dimensions in order of size, axes) of what is larger than E and D, which every device holds."""
    return Counter(
        (move.kind, tuple(sorted(n for n in move.dims if n != 1)), move.axes)
        for move in found
        if max(move.dims, default=0) > R
    )


@pytest.mark.parametrize("stack", [(), (STACK,)], ids=["one", "stacked"])
@pytest.mark.parametrize("orientation", ["output", "input"])
@pytest.mark.parametrize(
    "spec", [("tensor", None), (None, "tensor"), ("fsdp", "tensor"), ("tensor", "fsdp"), (None, ("fsdp", "tensor"))]
)
def test_factors_cost_one_all_reduce_where_the_tweaker_sums_and_none_elsewhere(spec, orientation, stack):
    """W0 @ A sums over the columns: free with rows cut, one all-reduce of [d_in, r] with columns cut. W0^T @ A, the
    input orientation, sums over the rows: free with columns cut, one of [d_out, r] with rows cut. The gradient of A
    sums over the other side, and so it is the other way round."""
    sizes = {None: 1, "fsdp": 2, "tensor": 4, ("fsdp", "tensor"): 8}
    sides = [
        (tuple(sorted((*stack, side // sizes[own], R))), (other,) if isinstance(other, str) else other)
        for side, own, other in [(D_IN, *spec), (D_OUT, *reversed(spec))]
    ]
    reads, grads = sides if orientation == "output" else sides[::-1]
    forward, both = factor_moves(spec, orientation, stack)
    assert big(forward) == Counter([("all-reduce", *reads)] if reads[1] else [])
    assert all(max(move.dims, default=0) > R for move in forward)
    # The pullback begins with what A reads, for the activation's derivative.
    assert big(both) == Counter(("all-reduce", *side) for side in (reads, grads) if side[1])


@cache
def model(sizes):
    fields = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": WIDTH, "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    }  # fmt: skip
    return llama(from_hf(fields), make_mesh(sizes), BATCH, SEQ)


@cache
def step(sizes, method, constrained=True):
    """The cost of a step; `method` is "lora", or PEANuT's (orientation, depth)."""
    options = {"r": RANK, "target_modules": TARGETS["llama"]}
    config = pj.LoraConfig(**options)
    if method != "lora":
        config = pj.PeanutConfig(**options, orientation=method[0], depth=method[1])
    return cost(model(sizes), config, constrained=constrained)


def of(found, whose):
    return Counter(move for move in found.moves if move.owner == whose)


def gathered(sizes):
    """What a device holds of each kernel once fsdp is gathered: the layers' (of one layer), and the tables outside."""
    inside, outside = Counter(), Counter()
    for path, leaf in flatten(model(sizes).params).items():
        tensor = P(*(name if name == "tensor" else None for name in leaf.sharding.spec))
        shape = NamedSharding(leaf.sharding.mesh, tensor).shard_shape(leaf.shape)
        if "/layers/" not in path and len(shape) == 2:
            outside[shape] += 1
        elif path.endswith("kernel"):
            inside[shape[1:]] += 1
    return inside, outside


CASES = [(sizes, method) for sizes in ("fsdp=8", CUBE) for method in (("output", 2), ("input", 0))]


@pytest.mark.matrix
@pytest.mark.parametrize(("sizes", "method"), CASES)
def test_a_step_moves_what_loras_does_and_the_tweakers_small_arrays(sizes, method):
    """The model's collectives are LoRA's one for one, so that no W0 is gathered for the tweaker. The tweaker's are
    all-reduces with an r side: in bytes less than 0.02 of the step's."""
    peanut, lora = step(sizes, method), step(sizes, "lora")
    assert of(peanut, "model") == of(lora, "model")
    assert not of(lora, "tweaker")
    added = of(peanut, "tweaker")
    assert added
    assert all(move.kind == "all-reduce" and RANK in move.dims and move.times == 1 for move in added)
    assert peanut.traffic <= 1.02 * lora.traffic
    assert {move.owner for move in peanut.moves} <= {"model", "tweaker", "optimizer"}
    assert all(move.dims == () for move in of(peanut, "optimizer"))


@pytest.mark.parametrize("method", ["lora", ("output", 2)])
@pytest.mark.parametrize("sizes", ["fsdp=8", CUBE])
def test_fsdp_gathers_kernels_in_the_layer_scan_and_no_activations(sizes, method):
    """Each kernel of a layer twice, for the forward and for the backward pass; the embedding and the head once a step.
    What else runs over fsdp is of the adapters, or a scalar."""
    inside, outside = gathered(sizes)
    kernels: Counter = Counter()
    for move in step(sizes, method).moves:
        if "fsdp" in move.axes and move.dims and RANK not in move.dims:
            assert move.kind == "all-gather"
            kernels[move.dims, move.times] += 1
        elif "fsdp" in move.axes:
            assert SEQ not in move.dims
    want = {(shape, LAYERS): 2 * n for shape, n in inside.items()} | {(shape, 1): n for shape, n in outside.items()}
    assert kernels == want


def test_without_constraints_xla_moves_activations_over_fsdp():
    """So that the test above can fail, and `constrain` is needed."""
    free = step("fsdp=8", ("output", 2), constrained=False)
    assert any(SEQ in move.dims and "fsdp" in move.axes for move in free.moves)
    assert free.traffic > 2 * step("fsdp=8", ("output", 2)).traffic


def test_axes_of_groups():
    mesh = make_mesh(CUBE)
    assert axes_of([(0, 1), (2, 3), (4, 5), (6, 7)], mesh) == ("tensor",)
    assert axes_of([(0, 2, 4, 6), (1, 3, 5, 7)], mesh) == ("data", "fsdp")
    assert axes_of([tuple(range(8))], mesh) == ("data", "fsdp", "tensor")
    assert axes_of([(1, 2), (5, 6)], mesh) == ("fsdp", "tensor")  # pairs of a collective-permute
    assert axes_of([(0,)], mesh) == ()


def test_names_of_merged_operations():
    assert op_names("jit(f)/add") == ["jit(f)/add"]
    assert op_names("jit(f)/(jvp()/dot:jvp(g)/h/sum:sum)") == ["jit(f)/jvp()/dot", "jit(f)/jvp(g)/h/sum", "jit(f)/sum"]
    assert owner("jit(f)/jvp(the_model)/dot") == owner("jit(f)/jvp()/sharding_constraint") == "model"
    assert (owner("jit(f)/transpose(jvp())/dot"), owner("jit(f)/reduce_sum")) == ("tweaker", "optimizer")
