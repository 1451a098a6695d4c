"""Reading compiled programs: real ones over eight host devices, and forms that a CPU never prints."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from peanut_jax.hlo import collectives, computations, dims, dot_flops, executions

LINE = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
CUBE = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
GRID = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
ALL = (tuple(range(8)),)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def compiled(fn, *args, mesh=LINE, ins=None, out=None):
    """`fn` compiled for `args`, with NamedShardings where `ins` is given."""
    if ins is None:
        return jax.jit(fn).lower(*args).compile()
    shardings = tuple(NamedSharding(mesh, spec) for spec in ins)
    return jax.jit(fn, in_shardings=shardings, out_shardings=NamedSharding(mesh, out)).lower(*args).compile()


def mapped(fn, mesh, ins, out, *args):
    """The HLO of `fn` under shard_map."""
    return compiled(jax.shard_map(fn, mesh=mesh, in_specs=ins, out_specs=out, check_vma=False), *args).as_text()


def module(*lines, extra="", header="HloModule m, num_partitions=8"):
    """A one-computation module around `lines`."""
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"{header}\n\n{extra}\nENTRY %main (p: f32[4,8]) -> f32[] {{\n  %p = f32[4,8]{{1,0}} parameter(0)\n{body}\n}}\n"
    )


@pytest.mark.parametrize(
    ("fn", "ins", "out", "kind", "result", "size"),
    [
        (lambda x: jax.lax.psum(x, "d"), P("d"), P(), "all-reduce", "f32[2,32]", 2 * 32),
        (lambda x: jax.lax.all_gather(x, "d", tiled=True), P("d"), P(), "all-gather", "f32[16,32]", 16 * 32),
        (lambda x: jax.lax.psum_scatter(x, "d", tiled=True), P(), P("d"), "reduce-scatter", "f32[2,32]", 16 * 32),
        (
            lambda x: jax.lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)]),
            P("d"), P("d"), "collective-permute", "f32[2,32]", 2 * 32,
        ),
    ],
)  # fmt: skip
def test_each_kind_of_collective(fn, ins, out, kind, result, size):
    (found,) = collectives(mapped(fn, LINE, ins, out, shape(16, 32)))
    assert (found.kind, found.shapes, found.bytes, found.times) == (kind, (result,), 4 * size, 1)
    ring = tuple((i, (i + 1) % 8) for i in range(8))
    assert (found.group_size, found.groups) == ((2, ring) if kind == "collective-permute" else (8, ALL))
    assert found.op_name.startswith("jit(")


def test_variadic_collectives_are_summed():
    """A psum of two arrays, and an all-to-all, which a CPU writes as a tuple of eight with index comments."""
    both = mapped(lambda x, y: jax.lax.psum((x, y), "d"), LINE, (P("d"), P("d")), P(), shape(16, 32), shape(8))
    assert [(c.shapes, c.bytes) for c in collectives(both)] == [(("f32[2,32]", "f32[1]"), 4 * 65)]
    swap = mapped(lambda x: jax.lax.all_to_all(x, "d", 1, 0, tiled=True), LINE, P("d"), P("d"), shape(16, 32))
    assert [(c.kind, len(c.shapes), c.bytes) for c in collectives(swap)] == [("all-to-all", 8, 4 * 2 * 32)]


def test_partitioned_program():
    """jit with NamedShardings: a gathered weight; on a CPU a scattered sum stays an all-reduce."""

    def gather(x, w):
        return jnp.tanh(x) @ jax.lax.with_sharding_constraint(w, NamedSharding(LINE, P()))

    args = shape(16, 64), shape(64, 32)
    hlo = compiled(gather, *args, ins=(P("d"), P("d")), out=P("d")).as_text()
    assert [(c.kind, c.shapes, c.bytes) for c in collectives(hlo)] == [("all-gather", ("f32[64,32]",), 4 * 64 * 32)]
    assert dot_flops(hlo) == 2 * 16 * 64 * 32 // 8
    hlo = compiled(jnp.matmul, *args, ins=(P(None, "d"), P("d")), out=P("d")).as_text()
    assert [(c.kind, c.bytes, c.groups) for c in collectives(hlo)] == [("all-reduce", 4 * 16 * 32, ALL)]
    assert dot_flops(hlo) == 2 * 16 * 64 * 32 // 8


def test_loops_multiply():
    """5 layers x 3 steps: a sum inside both loops runs 15 times, a gather in the outer one 5 times."""

    def layers(x, stack):
        def layer(x, w):
            w = jax.lax.all_gather(w, "d", tiled=True)
            return jax.lax.scan(lambda x, _: (jnp.tanh(jax.lax.psum(x @ w, "d")), None), x, length=3)[0], None

        return jax.lax.scan(layer, x, stack)[0]

    hlo = mapped(layers, LINE, (P("d"), P(None, "d")), P("d"), shape(16, 64), shape(5, 64, 64))
    assert {(c.kind, c.times) for c in collectives(hlo)} == {("all-gather", 5), ("all-reduce", 15)}
    assert dot_flops(hlo) == 15 * 2 * 2 * 64 * 64
    dots = [run for run in executions(hlo) if run.instruction.opcode == "dot"]
    assert [[loop.trips for loop in run.loops] for run in dots] == [[5, 3]]
    assert sorted(dims(made.shapes[0]) for made in dots[0].operands) == [(2, 64), (64, 64)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_scanned_flops_are_those_of_the_unrolled_program(dtype):
    x, stack = shape(24, 32, dtype=dtype), shape(5, 32, 32, dtype=dtype)

    def scan(x, stack, unroll):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack, unroll=unroll)[0]

    looped, unrolled = (compiled(partial(scan, unroll=n), x, stack).as_text() for n in (1, 5))
    assert "while(" in looped
    assert "while(" not in unrolled
    assert dot_flops(looped) == dot_flops(unrolled) == 5 * 2 * 24 * 32 * 32


def test_dots_only_program_agrees_with_cost_analysis():
    def chain(x, a, b):
        return jnp.einsum("bqk,bkd->bqd", jnp.einsum("bqd,bkd->bqk", x, a), b)

    args = shape(16, 6, 8), shape(16, 10, 8), shape(16, 10, 8)
    program = compiled(chain, *args)
    assert dot_flops(program.as_text()) == program.cost_analysis()["flops"] == 2 * 2 * 16 * 6 * 10 * 8
    program = compiled(chain, *args, ins=(P("d"),) * 3, out=P("d"))
    assert dot_flops(program.as_text()) == program.cost_analysis()["flops"] == 2 * 2 * 2 * 6 * 10 * 8


def test_small_loops_are_called():
    """XLA:CPU puts a small loop behind a `call`; the loop's condition is asked once more than its body runs."""

    def rows(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: x.at[i].set(x[0] @ x), x)

    hlo = compiled(rows, shape(8, 8)).as_text()
    assert " call(" in hlo
    assert dot_flops(hlo) == 7 * 2 * 8 * 8
    assert {run.times for run in executions(hlo) if run.instruction.opcode == "compare"} == {7, 8}


def test_dots_in_fusions_and_branches():
    """A dot between elementwise functions sits in a fusion; of a conditional every branch counts."""
    fused = compiled(lambda x, y: jnp.sum(jnp.tanh(x[2:]) @ jnp.exp(y).T * 2, axis=0), shape(34, 16), shape(16, 16))
    assert dot_flops(fused.as_text()) == 2 * 32 * 16 * 16
    branches = compiled(
        lambda p, x: jax.lax.cond(p, lambda: x @ x, lambda: (x @ x) @ x), shape(dtype=bool), shape(16, 16)
    )
    assert dot_flops(branches.as_text()) == 3 * 2 * 16**3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("n", [1, 8, 256, 2048])
def test_products_of_every_size_are_seen(dtype, n):
    """XLA:CPU hands dots to libraries by size and dtype; each must stay readable."""
    hlo = compiled(lambda x, y: jax.nn.gelu(x @ y), shape(n, 2048, dtype=dtype), shape(2048, 2048, dtype=dtype))
    assert dot_flops(hlo.as_text()) == 2 * n * 2048 * 2048


def test_patch_embedding_is_a_product():
    patches = partial(jax.lax.conv, window_strides=(4, 4), padding="VALID")
    hlo = compiled(patches, shape(2, 3, 16, 16), shape(8, 3, 4, 4)).as_text()
    assert dot_flops(hlo) == 2 * (2 * 16) * (3 * 4 * 4) * 8
    padded = compiled(
        partial(jax.lax.conv, window_strides=(1, 1), padding="SAME"), shape(2, 3, 8, 8), shape(8, 3, 3, 3)
    )
    with pytest.raises(ValueError, match="cannot count the FLOPs of 'convolution'"):
        dot_flops(padded.as_text())


@pytest.mark.parametrize(("dtype", "moved"), [(jnp.bfloat16, "f32"), (jnp.float16, "f16"), (jnp.int8, "s8")])
def test_bfloat16_collectives_move_float32_on_a_cpu(dtype, moved):
    gather = mapped(lambda x: jax.lax.all_gather(x, "d", tiled=True), LINE, P("d"), P(), shape(16, 32, dtype=dtype))
    size = int(moved[1:]) // 8
    assert [(c.shapes, c.bytes) for c in collectives(gather)] == [((f"{moved}[16,32]",), size * 16 * 32)]


def mesh_groups(mesh, *axes):
    """The groups that a reduction over `axes` of `mesh` has, from the mesh itself."""
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    last = np.moveaxis(places, [mesh.axis_names.index(axis) for axis in axes], range(-len(axes), 0))
    return {frozenset(row) for row in last.reshape(-1, np.prod([mesh.shape[axis] for axis in axes])).tolist()}


@pytest.mark.parametrize("axes", [("a",), ("b",), ("c",), ("a", "c"), ("c", "a"), ("a", "b", "c")])
@pytest.mark.parametrize("loop", [False, True])
def test_groups_are_the_mesh_axes(axes, loop):
    """Inside a loop and outside XLA prints lists, iotas and named meshes with permuted devices."""

    def product(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0] if loop else x @ w

    w = shape(3, 64, 64) if loop else shape(64, 64)
    w_spec = P(None, axes, None) if loop else P(axes, None)
    hlo = compiled(product, shape(16, 64), w, mesh=CUBE, ins=(P(None, axes), w_spec), out=P()).as_text()
    sums = [c for c in collectives(hlo) if c.kind == "all-reduce"]
    assert sums
    for found in sums:
        assert {frozenset(group) for group in found.groups} == mesh_groups(CUBE, *axes)
        assert found.group_size == 2 ** len(axes)


def test_iota_groups_with_transposition():
    hlo = compiled(
        jnp.matmul, shape(16, 64), shape(64, 32), mesh=GRID, ins=(P(None, "x"), P("x", "y")), out=P(None, "y")
    )
    assert "<=[4,2]T(1,0)" in hlo.as_text()
    (found,) = collectives(hlo.as_text())
    assert found.groups == ((0, 2, 4, 6), (1, 3, 5, 7))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", ALL),
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['x'=2,'y'=4] {'x'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=2,'y'=2,'z'=2] {'z','x'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['x'=1,'y'=2,'z'=4], device_ids=([2,2,2]T(1,0,2)) {'y'}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", ((0, 2), (1, 3))),
        ("mesh['x'=8] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_every_form_of_groups(text, groups):
    line = f"ROOT %sum = f32[4,8]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={text}, to_apply=%add"
    add = "%add (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n"
    (found,) = collectives(module(line, extra=add))
    assert (found.groups, found.group_size) == (groups, len(groups[0]))
    assert found.op_name == ""


@pytest.mark.parametrize(
    ("returned", "kind", "result"),
    [
        ("(f32[4,8]{1,0}, f32[16,8]{1,0:T(8,128)S(1)})", "all-gather", "f32[16,8]"),
        ("f32[4,8]{1,0}", "all-reduce", "f32[4,8]"),
        ("((f32[4,8]{1,0}), f32[1,8]{1,0})", "reduce-scatter", "f32[1,8]"),
        ("(f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[])", "collective-permute", "f32[4,8]"),
    ],
)
def test_an_asynchronous_pair_is_one_collective(returned, kind, result):
    start = f"%s = {returned} {kind}-start(f32[4,8]{{1,0:T(8,128)}} %p), replica_groups={{{{0,1,2,3}}}}"
    (found,) = collectives(module(start, f"ROOT %d = {result}{{1,0}} {kind}-done(%s)"))
    assert (found.kind, found.shapes) == (kind, (result,))
    assert found.bytes == 4 * max(32, int(np.prod(dims(result))))


def test_an_async_wrapper_runs_its_computation_once():
    wrapped = (
        "%wrapped (q: f32[4,8]) -> f32[4,8] {\n  %q = f32[4,8]{1,0} parameter(0)\n"
        "  ROOT %swap = f32[4,8]{1,0} all-to-all(%q), replica_groups={{0,1}}, dimensions={0}\n}\n"
    )
    start = "%s = ((f32[4,8]{1,0}), f32[4,8]{1,0}, u32[]) async-start(%p), calls=%wrapped"
    done = "ROOT %d = f32[4,8]{1,0} async-done(%s), calls=%wrapped"
    assert [(c.kind, c.times) for c in collectives(module(start, done, extra=wrapped))] == [("all-to-all", 1)]


def test_library_products():
    """cuBLAS calls tell their dimension numbers; another library's product is an error, not zero."""
    gemm = (
        'ROOT %g = (f32[8,8]{1,0}, s8[4194304]{0}) custom-call(%p, %p), custom_call_target="__cublas$lt$matmul", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],'
        '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}'
    )
    assert dot_flops(module(gemm)) == 2 * 8 * 8 * 4
    for target in ("__onednn$matmul", "__cudnn$fmhaSoftmax", "tpu_custom_call"):
        with pytest.raises(ValueError, match="cannot count the FLOPs of"):
            dot_flops(module(f'ROOT %g = f32[4,4]{{1,0}} custom-call(%p, %p), custom_call_target="{target}"'))
    assert dot_flops(compiled(jnp.linalg.cholesky, shape(16, 16)).as_text()) == 0


def test_a_loop_of_unknown_length():
    """An error that names the loop where it holds something that is counted, and only there."""

    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: jax.lax.psum(jnp.tanh(x), "d"), x)

    hlo = mapped(until, LINE, P("d"), P("d"), shape(16, 32))
    with pytest.raises(ValueError, match=r"loop 'while[\w.]*' has no known trip count, so .*\(all-reduce\)"):
        collectives(hlo)
    assert dot_flops(hlo) == 0
    turning = compiled(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x), shape(dtype=jnp.int32), shape(8, 8))
    assert collectives(turning.as_text()) == []
    with pytest.raises(ValueError, match="no known trip count"):
        dot_flops(turning.as_text())
    assert dot_flops(turning.as_text(), 2.5) == 2.5 * 2 * 8**3


def test_what_is_no_compiled_program_is_an_error():
    lowered = jax.jit(jnp.tanh).lower(shape(8)).as_text()
    with pytest.raises(ValueError, match="one ENTRY computation, got 0"):
        dot_flops(lowered)
    with pytest.raises(ValueError, match="not an HLO instruction: 'garbage'"):
        computations(module("garbage"))


def test_records_are_values():
    (found,) = collectives(mapped(lambda x: jax.lax.psum(x, "d"), LINE, P("d"), P(), shape(16, 32)))
    assert len({found, dataclasses.replace(found, times=2), dataclasses.replace(found)}) == 2
