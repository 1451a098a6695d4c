"""What holds for every front end: forward == merged == NumPy, dW never formed, dtype kept, the base untouched."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peanut_jax as pj
from peanut_jax.base.kernels import flatten
from tests.contract.models import BUILD, case_of, compiled
from tests.oracle.numpy_peanut import delta_weight

# Largest difference of outputs over their largest value. float32: rounding through a few layers. bfloat16: the merged
# kernel is rounded to 8 bits once more than the factored path.
TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-2}


@pytest.fixture(params=BUILD)
def case(request):
    return case_of(request.param)


def setting(case, **fields):
    config = case.config(**fields)
    return config, jax.jit(lambda params: pj.init(jax.random.key(5), params, config))(case.params)


merge = jax.jit(pj.merge, static_argnums=2)


def difference(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


VARIANTS = [
    {"depth": 0, "orientation": "output", "act_fn": "relu"},
    {"depth": 1, "orientation": "input", "act_fn": "gelu"},
    {"depth": 2, "orientation": "output", "act_fn": "tanh", "scaling": 0.5},
]


@pytest.mark.matrix
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: f"{f['orientation']}{f['depth']}{f['act_fn']}")
def test_forward_equals_merged_equals_numpy(case, fields):
    config, adapters = setting(case, **fields)
    run = compiled(case.fn)
    adapted = jax.jit(pj.adapt(case.fn, config))(adapters, case.params, case.x)
    merged = merge(case.params, adapters, config)
    assert difference(adapted, run(merged, case.x)) < TOLERANCE["float32"]
    assert difference(adapted, run(case.params, case.x)) > 1e-3
    base, flat = flatten(case.params), flatten(merged)
    for path, target in pj.select(case.params, config).items():
        kernel = target.kernel
        w0 = np.asarray(kernel.matrix(base[path]), np.float64).reshape(-1, kernel.d_in, kernel.d_out)
        update = np.asarray(kernel.matrix(flat[path]), np.float64).reshape(w0.shape) - w0
        theta = {
            k: np.asarray(v, np.float64).reshape(len(w0), *v.shape[len(kernel.stack) :])
            for k, v in adapters.theta[path].items()
        }
        for i in range(len(w0)):
            layer = {name: value[i] for name, value in theta.items()}
            names = {"act_fn": config.act_fn, "scaling": config.scaling, "orientation": config.orientation}
            expected = delta_weight(w0[i], layer, **names)
            np.testing.assert_allclose(update[i], expected, atol=1e-5 * np.abs(expected).max() + 1e-7)


@pytest.mark.matrix
@pytest.mark.parametrize("orientation", ["output", "input"])
def test_a_fresh_adapter_is_an_exact_no_op(case, orientation):
    config, adapters = setting(case, init_weights=True, depth=1, orientation=orientation)
    base = compiled(case.fn)(case.params, case.x)
    np.testing.assert_array_equal(jax.jit(pj.adapt(case.fn, config))(adapters, case.params, case.x), base)
    jax.tree.map(np.testing.assert_array_equal, merge(case.params, adapters, config), case.params)


@pytest.mark.large
def test_a_bfloat16_base_gives_bfloat16_outputs_and_float32_gradients(case):
    config, adapters = setting(case, depth=1)
    params = case.cast(jnp.bfloat16)
    x = case.x if jnp.issubdtype(case.x.dtype, jnp.integer) else case.x.astype(jnp.bfloat16)
    forward = pj.adapt(case.fn, config)
    merged = merge(params, adapters, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    # HF's Flax models compute in the dtype they were made with (float32 here); Linen ones in that of the parameters.
    run, adapted = compiled(case.fn), jax.jit(forward)
    base, out = run(params, x), adapted(adapters, params, x)
    assert out.dtype == base.dtype
    assert difference(out.astype(jnp.float32), run(merged, x).astype(jnp.float32)) < TOLERANCE["bfloat16"]
    grads = jax.eval_shape(jax.grad(lambda a: forward(a, params, x).astype(jnp.float32).sum()), adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@pytest.mark.large
def test_transforms_compose(case):
    """grad under jit, vmap over adapters, pmap over the batch, remat: all of the same function."""
    config, adapters = setting(case)
    forward = pj.adapt(case.fn, config)

    def loss(adapters, x, fn=forward):
        return jnp.mean(fn(adapters, case.params, x).astype(jnp.float32) ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss))(adapters, case.x)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    remat = jax.jit(jax.grad(partial(loss, fn=jax.checkpoint(forward))))(adapters, case.x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())), remat, grads)
    two = jax.tree.map(lambda a: jnp.stack([a, jnp.zeros_like(a)]), adapters)
    both = jax.jit(jax.vmap(loss, in_axes=(0, None)))(two, case.x)
    np.testing.assert_allclose(both, [value, jnp.mean(compiled(case.fn)(case.params, case.x) ** 2)], rtol=1e-5)
    per_device = jax.pmap(forward, in_axes=(None, None, 0))(adapters, case.params, case.x[:, None])
    assert difference(per_device[:, 0], jax.jit(forward)(adapters, case.params, case.x)) < TOLERANCE["float32"]


def test_dw_is_never_formed(case):
    """No equation of the forward and backward program makes an array of a kernel's size but by touching the kernel."""
    config, adapters = setting(case, depth=1)
    forward = pj.adapt(case.fn, config)
    program = jax.make_jaxpr(jax.grad(lambda a: forward(a, case.params, case.x).sum()))(adapters)
    kernels = {t.kernel.path: t.kernel for t in pj.select(case.params, config).values()}
    sizes = {(k.d_in, k.d_out) for k in kernels.values()} | {(k.d_out, k.d_in) for k in kernels.values()}
    outputs = [
        var.aval for eqn in _equations(program.jaxpr) if eqn.primitive.name == "dot_general" for var in eqn.outvars
    ]
    assert len(outputs) > 3 * len(kernels) / max(1, max(len(k.stack) for k in kernels.values()))
    assert not [aval for aval in outputs if aval.shape[-2:] in sizes and not _is_activation(aval, case)]
    # The same look at a merged forward finds what it should.
    formed = jax.make_jaxpr(lambda a: case.fn(pj.merge(case.params, a, config), case.x))(adapters)
    shapes = [
        v.aval.shape[-2:] for e in _equations(formed.jaxpr) if e.primitive.name == "dot_general" for v in e.outvars
    ]
    assert [shape for shape in shapes if shape in sizes]


def _is_activation(aval, case):
    return case.x.shape[1] in aval.shape[-2:]


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
                elif hasattr(inner, "jaxpr") and hasattr(inner.jaxpr, "eqns"):
                    yield from _equations(inner.jaxpr)


def test_training_learns_leaves_the_base_alone_and_compiles_once(case):
    config, adapters = setting(case, init_weights=True)
    before = jax.tree.map(np.array, case.params)
    target = compiled(case.fn)(case.params, case.x) * 0.9

    def loss_fn(params, batch, key):
        return jnp.mean((case.fn(params, batch["x"]) - batch["y"]) ** 2)

    tx = optax.adam(1e-2)
    step = pj.make_train_step(loss_fn, tx, config)
    state = pj.TrainState.create(adapters, tx, jax.random.key(0))
    losses = []
    for _ in range(8):
        state, metrics = step(state, case.params, {"x": case.x, "y": target})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, case.params, before)
