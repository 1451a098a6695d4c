"""What a TPU's compiler makes of the tweaker, and how the schedules of its kernels are read."""

import jax
import jax.numpy as jnp
import pytest

import peanut_jax as pj
from benchmarks.kernel_cycles import cycles_of
from peanut_jax.adapters import compute_updates
from peanut_jax.sharding import make_mesh
from peanut_jax.topologies import slice_devices


@pytest.mark.large
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("orientation", ["output", "input"])
def test_the_tweaker_reads_a_kernel_twice(depth, orientation):
    """Bytes of the factors and their pullback: two reads, and arrays with r columns."""
    pytest.importorskip("libtpu")
    mesh = make_mesh("data=1", slice_devices("v5p-8")[:1])
    place = jax.NamedSharding(mesh, jax.P())
    config = pj.PeanutConfig(r=8, depth=depth, orientation=orientation, target_modules="all-linear")
    params = {"up": {"kernel": jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)}}
    adapters = jax.eval_shape(lambda: pj.init(jax.random.key(0), params, config))

    def step(adapters, params):
        updates, pullback = jax.vjp(lambda adapters: compute_updates(adapters, params, config), adapters)
        return updates, pullback(jax.lax.optimization_barrier(updates))

    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), (adapters, params))
    moved = jax.jit(step).lower(*placed).compile().cost_analysis()["bytes accessed"]
    assert 2 <= moved / (4096 * 8192 * 2) < 2.25


SCHEDULE = """
LB: loop body
 0x1   :  { vnop }
 0x2 LB: > { vnop }
 0x3   : > { 0;  ;;  %1 = sbr.rel (%p1) target = $region4 }
 0x4   : > { vnop }
 0x5 PF: > { vnop } /* Start region 5 */
 0x6   : > { 0;  ;;  %2 = sbr.rel (%p2) target = $region8 }
 0x7   : > { vnop }
 0x8   : > { vnop }
 0x9   : > { vnop }
second_minor_factor: 1 */ }
 0xa PF: > { vnop }
 0xb   : > { %p = scmp.ge.s32.totalorder %s60_s13, 66 /* loop exit test */ }
"""


def test_cycles_of_a_schedule():
    """64 rounds, 16 for each of 4 heads: 4 x 4 blocks, 10 of them under the diagonal."""
    assert cycles_of(SCHEDULE, 4) == 64 * (8 + 3 * 10 / 16)
    with pytest.raises(SystemExit, match="64 rounds are not a square of blocks"):
        cycles_of(SCHEDULE, 5)
