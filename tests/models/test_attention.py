"""The roads of attention against one another, which of them a program takes, and what each costs in memory."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from peanut_jax.models.attention import roads, splash
from peanut_jax.models.attention.chunked import chunked
from peanut_jax.models.attention.roads import Call, attend_rows, choose
from peanut_jax.models.attention.sight import RESIDUALS, Window, make_sight, seen
from peanut_jax.models.decoder import Decoder, language_loss, variable_shapes
from peanut_jax.models.decoder_config import from_hf
from peanut_jax.models.layers import remat_policy
from peanut_jax.sharding import batch_sharding, constrain, make_mesh, rules_for, shard, traced_mesh, tracing_for

BATCH, SEQ = 2, 70
PACKED = np.stack([np.repeat([1, 2, 3, 0], [20, 30, 10, 10]), np.repeat([4, 1, 0], [5, 60, 5])])
LEFT, RIGHT = np.arange(SEQ) >= np.array([[5], [33]]), np.arange(SEQ) < np.array([[70], [41]])
SIGHTS = {
    "plain": {},
    "packed": {"real": PACKED != 0, "segments": PACKED},
    "left": {"real": LEFT},
    "right": {"real": RIGHT},
    "holes": {"real": LEFT & (np.arange(SEQ) % 9 != 4)},
    "positions": {"positions": np.tile(np.arange(35), 2)[None].repeat(BATCH, 0)},
}
# One layer's, and those of layers that differ in one scan, of which this is the second.
WINDOWS = {"all": Window(None, (None,)), "window": Window(None, (17,)), "mixed": Window(np.int32(1), (None, 9))}
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels of a TPU run here, slowly."""
    monkeypatch.setattr(splash, "INTERPRET", True)


def arrays(heads=4, kv_heads=2, head_dim=64, dtype="float32", batch=BATCH):
    """q, k, v and the slope of the output."""
    rng = np.random.default_rng(0)
    counts = heads, kv_heads, kv_heads, heads
    return [jnp.asarray(rng.normal(size=(batch, SEQ, count, head_dim)), dtype) for count in counts]


def sight_of(name):
    return make_sight((BATCH, SEQ), **{key: jnp.asarray(value) for key, value in SIGHTS[name].items()})


def computed(attend, sight, q, k, v, slope):
    """The output where somebody reads it, and the gradients of q, k and v, in float32."""
    real = np.ones((BATCH, SEQ), bool) if sight.segments is None else np.asarray(sight.segments) != 0

    def read(q, k, v):
        return jnp.where(real[..., None, None], attend(q, k, v), 0)

    def run(q, k, v, slope):
        out, pull = jax.vjp(read, q, k, v)
        return [array.astype(jnp.float32) for array in (out, *pull(slope))]

    return jax.jit(run)(q, k, v, slope)


def check(road, sight_name, window_name, dtype="float32", **sizes):
    """`road` beside the dense mask in float32, relative to the largest element."""
    sight, window = sight_of(sight_name), WINDOWS[window_name]
    exact = arrays(**sizes)
    mask = seen(sight, window.limit())[:, None]
    want = computed(lambda *x: jax.nn.dot_product_attention(*x, mask=mask, implementation="xla"), sight, *exact)
    got = computed(road(sight, window), sight, *(array.astype(dtype) for array in exact))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE[dtype] * np.abs(other).max())


def by_name(name):
    return lambda sight, window: functools.partial(attend_rows, sight=sight, window=window, attention=name)


def in_blocks(sight, window):
    return functools.partial(chunked, sight=sight, window=window, block=16)


@pytest.mark.parametrize(
    ("sight", "window", "dtype"),
    [
        ("packed", "mixed", "float32"),
        ("holes", "all", "bfloat16"),
        *(
            pytest.param(sight, window, dtype, marks=pytest.mark.large)
            for sight in SIGHTS
            for window in WINDOWS
            for dtype in TOLERANCE
            if sight != "holes" or window == "all"  # a window counts places: padding is on either side
        ),
    ],
)
def test_blocks(sight, window, dtype):
    check(in_blocks, sight, window, dtype)


@pytest.mark.parametrize(
    ("sight", "window", "dtype", "sizes"),
    [
        ("packed", "mixed", "float32", {}),
        *(
            pytest.param(sight, window, dtype, {"head_dim": head_dim, "kv_heads": kv_heads}, marks=pytest.mark.large)
            for sight in ("plain", "packed", "left", "right")
            for window in WINDOWS
            for dtype, head_dim, kv_heads in (("float32", 128, 4), ("bfloat16", 128, 2), ("bfloat16", 80, 1))
        ),
    ],
)
def test_splash(interpreted, sight, window, dtype, sizes):
    """Rows of 70 are filled up to 128; heads of 64 and 80 are narrower than the chip's lanes."""
    check(by_name("splash"), sight, window, dtype, **sizes)


@pytest.mark.large
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("fused", [0, 8])
def test_splash_in_several_blocks(interpreted, monkeypatch, window, fused):
    """Both backward passes; 700 tokens are three blocks of 256."""
    monkeypatch.setattr(splash, "_BLOCK", 256)
    monkeypatch.setattr(splash, "_FUSED", fused)
    rng = np.random.default_rng(0)
    q, k, v, slope = (jnp.asarray(rng.normal(size=(1, 700, n, 64)), jnp.float32) for n in (2, 1, 1, 2))
    segments = jnp.asarray(np.repeat([1, 2, 0], [400, 290, 10]))[None]
    mask = seen(make_sight((1, 700), segments != 0, segments), window)[:, None]
    exact = functools.partial(jax.nn.dot_product_attention, mask=mask, implementation="xla")
    split = functools.partial(splash.splash, segments=segments, window=window, mesh=None)
    for one, other in zip(*(jax.jit(jax.vjp(f, q, k, v)[1])(slope) for f in (split, exact)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


# ---- cuDNN: what it is asked


@pytest.mark.parametrize(("window", "sides"), [("all", [None]), ("window", [(16, 0)]), ("mixed", [None, (8, 0)])])
def test_cudnn_is_given_no_mask_for_whole_rows(monkeypatch, window, sides):
    asked, attend = [], jax.nn.dot_product_attention

    def record(q, k, v, **options):
        asked.append(options)
        return attend(q, k, v, **{**options, "implementation": "xla"})

    gpu = Call("nvidia", True, jnp.bfloat16, SEQ, 64, False, True)
    monkeypatch.setattr(roads, "_call", lambda q, sight: gpu)
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    jax.eval_shape(lambda q, k, v, _: attend_rows(q, k, v, sight_of("plain"), WINDOWS[window]), *arrays())
    assert [one["local_window_size"] for one in asked] == sides
    assert all(one["is_causal"] and one["implementation"] == "cudnn" and "mask" not in one for one in asked)


# ---- the choice


def call(platform="cpu", **changed):
    fields = {"alone": True, "dtype": jnp.bfloat16, "seq": 2048, "head_dim": 128, "packed": True, "counted": True}
    return Call(platform=platform, **{**fields, **changed})


@pytest.mark.parametrize(
    ("asked", "road", "told"),
    [
        (call(seq=256), "xla", None),
        (call(), "chunked", None),
        (call("tpu"), "splash", None),
        (call("tpu", seq=256, dtype=jnp.float32), "splash", None),
        (call("tpu", seq=64), "xla", None),
        (call("tpu", alone=False), "chunked", "the mesh is not known"),
        (call("tpu", counted=False), "chunked", "passes positions"),
        (call("tpu", dtype=jnp.float16), "chunked", "not float16"),
        (call("nvidia"), "cudnn", None),
        (call("nvidia", seq=8192), "chunked", r"a mask of \[8192, 8192\]"),
        (call("nvidia", seq=8192, packed=False), "cudnn", None),
        (call("nvidia", head_dim=160, seq=256), "xla", "heads of 160"),
        (call("nvidia", dtype=jnp.float32), "chunked", "float32 heads"),
        (call("rocm"), "chunked", None),
    ],
)
def test_choice(asked, road, told, caplog):
    """A kernel that cannot be taken is replaced, and the log says so once."""
    roads._tell.cache_clear()
    with caplog.at_level(logging.WARNING, "peanut_jax"):
        assert [choose("auto", asked) for _ in range(3)] == [road] * 3
    assert len(caplog.messages) == (told is not None)
    assert told is None or re.search(told, caplog.messages[0])


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("splash", call(), r"'splash' cannot run here: splash is a kernel for TPUs, and this is traced for cpu"),
        ("splash", call("tpu", counted=False), r"the call passes positions"),
        ("splash", call("tpu", dtype=jnp.float16), r"takes bfloat16 and float32, not float16"),
        ("cudnn", call(), r"'cudnn' cannot run here: cuDNN runs on NVIDIA GPUs"),
        ("cudnn", call("nvidia", head_dim=160), r"heads of at most 128.*heads of 160"),
        ("cudnn", call("nvidia", seq=255), r"rows of even length.*rows of 255"),
    ],
)
def test_a_kernel_asked_for_by_name(name, asked, message):
    with pytest.raises(ValueError, match=message):
        choose(name, asked)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("splash", call("tpu", alone=False)),
        ("cudnn", call("nvidia", seq=8192)),
        ("xla", call()),
        ("chunked", call(seq=16)),
    ],
)
def test_a_name_insists(name, asked):
    assert choose(name, asked) == name


# ---- in the model


def small(**fields):
    """A model of two layers, and its parameters."""
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    model = Decoder(from_hf({"model_type": "llama", **sizes}, **fields), jnp.float32)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)  # noqa: E731
    return model, jax.tree.map(draw, variable_shapes(model))


def rows(seq=24):
    """Whole rows, the second padded on the right."""
    rng = np.random.default_rng(1)
    tokens, labels = rng.integers(1, 48, (2, 8, seq))
    segments = np.ones((8, seq), int)
    segments[1::2, seq - 7 :] = 0
    return {"tokens": np.where(segments, tokens, 0), "labels": labels, "weights": segments, "segments": segments}


def test_a_name_that_cannot_run_is_an_error_before_any_compile():
    model, params = small(attention="splash")
    with pytest.raises(ValueError, match=r"attention='splash' cannot run here: .*tracing_for\(mesh\)"):
        jax.eval_shape(model.apply, params, rows()["tokens"])


def test_whole_rows_need_no_segments():
    """Padding on the right has weights of 0, and no token sees it."""
    model, params = small(windows=(None, 5))
    batch = rows()
    loss_fn = jax.jit(lambda params, batch: language_loss(model)(params, batch, None))
    want, counted = loss_fn(params, batch)
    got, others = loss_fn(params, {name: value for name, value in batch.items() if name != "segments"})
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert counted == others


@pytest.mark.parametrize("road", ["splash", "chunked"])
def test_dots_keep_what_the_backward_pass_reads(interpreted, capsys, road):
    """The output and the logsumexp, under the name that remat policies keep: the forward pass is not run again."""
    q, k, v, _ = arrays()
    attend = jax.checkpoint(by_name(road)(sight_of("plain"), WINDOWS["all"]), policy=remat_policy("dots"))
    print_saved_residuals(attend, q, k, v)
    kept = [line for line in capsys.readouterr().out.splitlines() if "output of" in line or RESIDUALS in line]
    filled = {"splash": 128, "chunked": SEQ}[road]
    assert sorted(line.split()[0] for line in kept) == [f"f32[2,2,2,{filled},64]", f"f32[2,2,2,{filled}]"]


@pytest.mark.parametrize("mesh", ["data=2,tensor=4", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.large)])
def test_a_kernel_on_a_mesh(interpreted, mesh):
    """Each device takes its rows and heads; with tensor=4 the two heads of keys are repeated."""
    q, k, v, slope = arrays(batch=4)
    sight = make_sight((4, SEQ), *(jnp.asarray(np.tile(array, (2, 1))) for array in (PACKED != 0, PACKED)))
    devices = make_mesh(mesh)

    def run(q, k, v, slope, road):
        out, pull = jax.vjp(lambda q, k, v: attend_rows(q, k, v, sight, WINDOWS["window"], road), q, k, v)
        return out[:, :30], *pull(slope.at[:, 60:].set(0))

    with tracing_for(devices):
        placed = [jax.device_put(array, batch_sharding(devices)) for array in (q, k, v, slope)]
        got = jax.jit(functools.partial(run, road="splash"))(*placed)
    want = jax.jit(functools.partial(run, road="xla"))(q, k, v, slope)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-6 * np.abs(other).max())


def test_a_step_on_a_mesh_knows_it(monkeypatch):
    """Through `constrain`, as in `sharded_train_step`: where the mesh is a TPU's, so is the road."""
    model, params = small()
    mesh = make_mesh("data=2,tensor=4")
    seen_by = []
    monkeypatch.setattr(roads, "choose", lambda attention, call: seen_by.append(traced_mesh()) or "xla")
    loss_fn = constrain(
        lambda params: language_loss(model)(params, rows(), None)[0], shard(params, mesh, rules_for("llama"))
    )
    jax.eval_shape(loss_fn, params)
    assert seen_by
    assert all(one.shape == mesh.shape and (one.devices == mesh.devices).all() for one in seen_by)
    assert traced_mesh() is None


# ---- memory


def test_memory_is_linear_in_the_length():
    """Four times the tokens take four times the temporary bytes, forward and backward; the dense mask takes 16."""

    def temporary(seq):
        one = jax.ShapeDtypeStruct((1, seq, 2, 16), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, seq), jnp.int32)

        def run(q, k, v, slope, segments):
            sight = make_sight((1, seq), segments != 0, segments)
            return jax.vjp(lambda q, k, v: attend_rows(q, k, v, sight, WINDOWS["all"]), q, k, v)[1](slope)

        return jax.jit(run).lower(one, one, one, one, segments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16384) < 4.2 * temporary(4096)
