"""What runs is what was bound: a module is changed if and only if its own params hold an update, and then once."""

import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peanut_jax as pj
from peanut_jax.models.decoder import Decoder, variable_shapes
from peanut_jax.models.decoder_config import from_hf

X = jax.random.normal(jax.random.key(0), (3, 4))
TX = optax.GradientTransformation(lambda p: p, lambda g, _, p: (g, g))  # its state is the gradient


class Net(nn.Module):
    """An encoder with a part of its own, and a head."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(Encoder(name="enc")(x))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(5, name="up")(x))


NET = Net()
PARAMS = NET.init(jax.random.key(1), X)


def config(targets="all-linear", **fields):
    return pj.PeanutConfig(**{"r": 2, "target_modules": targets, "init_weights": False, **fields})


CONFIG = config()
ADAPTERS = pj.init(jax.random.key(2), PARAMS, CONFIG)


def merged(adapters=ADAPTERS, config=CONFIG, params=PARAMS):
    return pj.merge(params, adapters, config)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


# ---- 1. another model


def test_a_second_model_in_one_loss_is_the_plain_one():
    """A penalty for leaving the base, as in DPO or distillation, with the params of both at hand."""

    def apart(params, x):
        return jnp.sum((NET.apply(params, x) - NET.apply(PARAMS, x)) ** 2)

    expected = jnp.sum((NET.apply(merged(), X) - NET.apply(PARAMS, X)) ** 2)
    assert float(expected) > 1e-3
    close(pj.adapt(apart, CONFIG)(ADAPTERS, PARAMS, X), expected)
    step = pj.make_train_step(lambda p, x, key: apart(p, x), TX, CONFIG)
    _, metrics = step(pj.TrainState.create(ADAPTERS, TX, jax.random.key(0)), PARAMS, X)
    close(metrics["loss"], expected)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_second_decoder_in_one_loss_is_the_plain_one(scan_layers):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    shape = from_hf({"model_type": "llama", **sizes, "num_attention_heads": 2}, scan_layers=scan_layers)
    model, tokens = Decoder(shape, jnp.float32), jnp.arange(6).reshape(1, 6)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), variable_shapes(model))
    adapters = pj.init(jax.random.key(0), params, config())

    def difference(trained, tokens):
        return jnp.abs(model.apply(trained, tokens) - model.apply(params, tokens)).max()

    found = jax.jit(pj.adapt(difference, config()))(adapters, params, tokens)
    close(found, difference(merged(adapters, config(), params), tokens))
    assert float(found) > 1e-3


# ---- 2. subclasses


class Cast(nn.Dense):
    """Works around its base class's call, on both sides."""

    @nn.compact
    def __call__(self, inputs):
        return nn.relu(super().__call__(2 * inputs)) - 1


class Twice(Cast):
    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs + 1)


@pytest.mark.parametrize("kind", [Cast, Twice, nn.remat(Cast), nn.remat(nn.Dense), nn.jit(Twice)])
def test_a_subclass_is_changed_at_its_base_class_own_call(kind):
    model = kind(3)
    params = model.init(jax.random.key(0), X)
    adapters = pj.init(jax.random.key(1), params, CONFIG)
    close(pj.adapt(model.apply, CONFIG)(adapters, params, X), model.apply(merged(adapters, CONFIG, params), X))


def test_a_subclass_with_a_product_of_its_own_is_named():
    class Own(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return inputs @ self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))

    model = Own(3)
    params = model.init(jax.random.key(0), X)
    adapters = pj.init(jax.random.key(1), params, CONFIG)
    with pytest.raises(ValueError, match=r"1 adapted kernels were never called.*: kernel\. "):
        pj.adapt(model.apply, CONFIG)(adapters, params, X)


# ---- 3. nested


@pytest.mark.parametrize(("outer", "inner"), [(["up"], ["head"]), (["up", "head"], ["head"]), ("all-linear",) * 2])
def test_nested_adapters_add_up_each_once(outer, inner):
    """From W0 each: the inner one does not see the outer one's change."""
    one, two = config(outer), config(inner, depth=1)
    first, second = pj.init(jax.random.key(3), PARAMS, one), pj.init(jax.random.key(4), PARAMS, two)
    inside = pj.adapt(NET.apply, two)
    both = pj.adapt(lambda params, x: inside(second, params, x), one)
    sums = pj.combine(pj.factors(first, PARAMS, one), pj.factors(second, PARAMS, two))
    close(both(first, PARAMS, X), pj.bind(NET.apply, sums)(PARAMS, X))
    close(jax.jit(both)(first, PARAMS, X), pj.bind(NET.apply, sums)(PARAMS, X))
    alone = pj.adapt(lambda params, x: inside(second, PARAMS, x) + NET.apply(params, x), config(outer))
    expected = NET.apply(merged(second, two), X) + NET.apply(merged(first, one), X)
    close(alone(first, PARAMS, X), expected)


# ---- 4. inner caches


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_functions_that_were_traced_before(wrap):
    """One inner function outside, inside, with other values, with dropout, and outside again."""
    inner = wrap(lambda params, x, key: NET.apply(params, x, rngs={"dropout": key}))
    key, dropped = jax.random.key(5), config(dropout=0.5)
    plain, changed = NET.apply(PARAMS, X), NET.apply(merged(), X)
    for _ in range(2):
        close(inner(PARAMS, X, key), plain)
        close(pj.adapt(inner, CONFIG)(ADAPTERS, PARAMS, X, key), changed)
        other = pj.init(jax.random.key(9), PARAMS, CONFIG)
        close(pj.adapt(inner, CONFIG)(other, PARAMS, X, key), NET.apply(merged(other), X))
        noisy = pj.adapt(inner, dropped, train=True)(ADAPTERS, PARAMS, X, key)
        assert float(jnp.abs(noisy - changed).max()) > 1e-3
        close(pj.adapt(inner, dropped)(ADAPTERS, PARAMS, X, key), changed)


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_one_jitted_loss_in_two_train_steps_and_in_evaluation(accumulate_steps):
    batch = jnp.concatenate([X, X + 1])

    @jax.jit
    def loss_fn(params, x, key):
        return jnp.mean(NET.apply(params, x) ** 2)

    expected, grads = jax.value_and_grad(lambda a: loss_fn(merged(a), batch, None))(ADAPTERS)
    evaluate = pj.adapt(loss_fn, CONFIG)
    for _ in range(2):
        step = pj.make_train_step(loss_fn, TX, CONFIG, accumulate_steps=accumulate_steps)
        state, metrics = step(pj.TrainState.create(ADAPTERS, TX, jax.random.key(0)), PARAMS, batch)
        close((metrics["loss"], state.opt_state), (expected, grads))
        close(evaluate(ADAPTERS, PARAMS, batch, None), expected)
        close(loss_fn(PARAMS, batch, None), jnp.mean(NET.apply(PARAMS, batch) ** 2))


def test_a_part_of_the_tree():
    """`enc.apply` on its own params: its modules have other paths, plain and jitted."""
    encoder = Encoder()
    inner = jax.jit(encoder.apply)
    only = config(["up"])
    adapters = pj.init(jax.random.key(3), PARAMS, only)
    expected = encoder.apply({"params": merged(adapters, only)["params"]["enc"]}, X)
    for fn in (encoder.apply, inner, inner):
        part = pj.adapt(lambda params, x, fn=fn: fn({"params": params["params"]["enc"]}, x), only)
        close(part(adapters, PARAMS, X), expected)
        close(jax.jit(part)(adapters, PARAMS, X), expected)


def test_what_was_traced_before_and_leaves_a_kernel_out_is_still_named():
    inner = jax.jit(lambda params, x: Encoder().apply({"params": params["params"]["enc"]}, x))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 adapted kernels were never called.*: head/kernel\. "):
            pj.adapt(inner, CONFIG)(ADAPTERS, PARAMS, X)


def test_a_function_that_looks_at_values_is_not_blamed():
    inner = jax.jit(NET.apply)

    def by_value(params, x):
        return "large" if float(jnp.abs(inner(params, x)).max()) > 0 else "small"

    for _ in range(2):
        assert pj.adapt(by_value, CONFIG)(ADAPTERS, PARAMS, X) == "large"


def test_an_adapter_that_hides_another_is_named():
    """The inner one is given the plain params: the outer one's update is nowhere, though its modules run."""
    inside = pj.adapt(NET.apply, CONFIG)
    outer = pj.adapt(lambda params, x: inside(ADAPTERS, PARAMS, x), CONFIG)
    with pytest.raises(ValueError, match="2 adapted kernels were never called"):
        outer(pj.init(jax.random.key(7), PARAMS, CONFIG), PARAMS, X)


def test_forgotten_params_are_named_where_values_are_looked_at():
    with pytest.raises(ValueError, match="2 adapted kernels were never called"):
        pj.adapt(lambda params, x: np.asarray(NET.apply(PARAMS, x)), CONFIG)(ADAPTERS, PARAMS, X)


@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_a_backward_rule_of_the_losses_own_sees_the_updates(accumulate_steps):
    """It is traced after the forward pass has ended."""

    @jax.custom_vjp
    def recomputed(params, x):
        return NET.apply(params, x)

    recomputed.defvjp(lambda p, x: (NET.apply(p, x), (p, x)), lambda saved, g: jax.vjp(NET.apply, *saved)[1](g))
    found = []
    for run in (NET.apply, recomputed):
        step = pj.make_train_step(
            lambda p, x, key, run=run: jnp.mean(run(p, x) ** 2), TX, CONFIG, accumulate_steps=accumulate_steps
        )
        found.append(step(pj.TrainState.create(ADAPTERS, TX, jax.random.key(0)), PARAMS, X)[0].opt_state)
    close(*found)


def test_a_kernel_that_is_changed_before_its_module_runs_is_named():
    model = nn.WeightNorm(nn.Dense(3))
    params = model.init(jax.random.key(0), X)
    adapters = pj.init(jax.random.key(1), params, CONFIG)
    with pytest.raises(NotImplementedError, match="is not the one that params hold when its module runs"):
        pj.adapt(model.apply, CONFIG)(adapters, params, X)


def test_one_update_at_two_paths():
    update = pj.factors(ADAPTERS, PARAMS, CONFIG)["head/kernel"]
    params = {"params": {"a": PARAMS["params"]["head"], "b": PARAMS["params"]["head"]}}
    with pytest.raises(ValueError, match=r"1 adapted kernels were never called.*: b/kernel\. "):
        pj.bind(
            lambda p, x: nn.Dense(2).apply({"params": p["params"]["a"]}, x), {"a/kernel": update, "b/kernel": update}
        )(params, jnp.ones((1, 5)))


def test_a_module_that_is_adapted_and_saved_is_named():
    saved = pj.SubsetConfig(modules_to_save=["head"])
    inside = pj.adapt(NET.apply, saved)
    start = pj.init(jax.random.key(0), PARAMS, saved)
    with pytest.raises(ValueError, match="'head' is adapted by one adapter and saved in full by another"):
        pj.adapt(lambda params, x: inside(start, params, x), CONFIG)(ADAPTERS, PARAMS, X)


# ---- 5. threads


def test_six_threads_at_once():
    adapters = [pj.init(jax.random.key(i), PARAMS, CONFIG) for i in range(6)]
    expected = [NET.apply(merged(one), X) for one in adapters]
    forward, together, wrong = pj.adapt(NET.apply, CONFIG), threading.Barrier(6), []

    def work(i):
        together.wait()
        for _ in range(5):
            if not np.allclose(forward(adapters[i], PARAMS, X), expected[i], rtol=1e-5, atol=1e-6):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_old_context_says_what_took_its_place():
    with pytest.raises(AttributeError, match=r"intercept is gone.*bind\(fn, updates\)"):
        pj.intercept  # noqa: B018


# ---- 6. other methods


class Tied(nn.Dense):
    """A head that is also read the other way round."""

    def attend(self, x):
        return x @ self.get_variable("params", "kernel").T

    def loudly(self, x):
        return 2 * self(x)


def test_a_method_that_reads_the_kernel_by_itself_is_named():
    class Outer(nn.Module):
        def setup(self):
            self.tied = Tied(4)

        def __call__(self, x, method):
            return getattr(self.tied, method)(self.tied(x)) if method == "attend" else getattr(self.tied, method)(x)

    model = Outer()
    params = model.init(jax.random.key(0), X, "loudly")
    adapters = pj.init(jax.random.key(1), params, CONFIG)
    loud = pj.adapt(model.apply, CONFIG)(adapters, params, X, "loudly")
    close(loud, model.apply(merged(adapters, CONFIG, params), X, "loudly"))
    with pytest.raises(NotImplementedError, match="method 'attend' of the adapted module 'tied' ran"):
        pj.adapt(model.apply, CONFIG)(adapters, params, X, "attend")


# ---- 7. losses that walk the parameters


def test_a_penalty_on_all_parameters_leaves_the_updates_out():
    def penalty(params, x):
        NET.apply(params, x)
        return optax.tree.norm(pj.unbind(params), squared=True) + 0 * NET.apply(params, x).sum()

    found = pj.adapt(penalty, CONFIG)(ADAPTERS, PARAMS, X)
    close(found, optax.tree.norm(PARAMS, squared=True))
    assert jax.tree.structure(pj.unbind(PARAMS)) == jax.tree.structure(PARAMS)


# ---- 8. forward mode, scans over another axis, products of the module's own


def test_forward_mode_is_refused():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda a: pj.adapt(NET.apply, CONFIG)(a, PARAMS, X), (ADAPTERS,), (ADAPTERS,))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_scan_over_another_axis_is_refused(axis, use_bias):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, name="dense", use_bias=use_bias)(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": axis if not use_bias else 1}
            stack = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=2)
            return stack(name="layers")(x, None)[0]

    model = Stack()
    variables = model.init(jax.random.key(0), X)
    with pytest.raises((ValueError, NotImplementedError)):
        pj.adapt(model.apply, CONFIG)(pj.init(jax.random.key(1), variables, CONFIG), variables, X)


def test_a_product_of_the_modules_own_is_refused_and_plain_ones_are_not():
    def doubled(*args, **kwargs):
        return 2 * jax.lax.dot_general(*args, **kwargs)

    for product, fits in ((doubled, False), (jax.lax.dot_general, True)):
        model = nn.Dense(3, dot_general=product)
        params = model.init(jax.random.key(0), X)
        adapters = pj.init(jax.random.key(1), params, CONFIG)
        forward = pj.adapt(model.apply, CONFIG)
        if fits:
            close(forward(adapters, params, X), model.apply(merged(adapters, CONFIG, params), X))
        else:
            with pytest.raises(NotImplementedError, match="'kernel' belongs to a Dense with dot_general=doubled"):
                forward(adapters, params, X)


# ---- a bare layer, swapped and foreign arguments


@pytest.mark.parametrize("targets", ["all-linear", "", [""], ".*"])
def test_a_bare_layer(targets):
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), X)
    chosen = config(targets)
    adapters = pj.init(jax.random.key(1), params, chosen)
    close(pj.adapt(model.apply, chosen)(adapters, params, X), model.apply(merged(adapters, chosen, params), X))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pj.adapt(NET.apply, CONFIG)(PARAMS, ADAPTERS, X), "got dict: are adapters and params swapped"),
        (lambda: pj.merge(ADAPTERS, PARAMS, CONFIG), "are adapters and params swapped"),
        (lambda: pj.init(PARAMS, jax.random.key(0), CONFIG), r"key must be a PRNG key .*, got dict"),
        (lambda: pj.with_saved(ADAPTERS, PARAMS), "are adapters and params swapped"),
        (lambda: pj.unbind(ADAPTERS), "unbind takes the params that a function is given, got Adapters"),
        (lambda: pj.adapt(NET, CONFIG), "got the module Net: pass its apply"),
        (lambda: pj.TrainState.create(ADAPTERS, 1e-3, jax.random.key(0)), "tx must be an optax transformation"),
        (lambda: pj.make_train_step(lambda p, b, k: 0.0, TX, CONFIG)(PARAMS, ADAPTERS, X), "got a dict first"),
        (
            lambda: pj.make_train_step(lambda p, b, k: (NET.apply(p, b).sum(), NET.apply(p, b)), TX, CONFIG)(
                pj.TrainState.create(ADAPTERS, TX, jax.random.key(0)), PARAMS, X
            ),
            r"loss_fn must return loss or \(loss, dict of metrics\), got array as metrics",
        ),
        (lambda: pj.adapt(NET.apply, ADAPTERS), r"config must be a method such as PeanutConfig\(r=8\).*got Adapters"),
        (lambda: pj.adapt(NET.apply, pj.PeanutConfig), "got PeanutConfig itself, not an instance"),
        (lambda: pj.bind(NET.apply, ADAPTERS), r"bind takes the mapping that .*compute_updates.*got Adapters"),
        (lambda: pj.bind(NET.apply, ADAPTERS.theta), "is a dict: pass adapters through"),
        (lambda: pj.init(0, PARAMS, CONFIG), r"key must be a PRNG key such as jax.random.key\(0\), got 0"),
        (lambda: pj.TrainState.create(ADAPTERS, TX, 0), "key must be a PRNG key"),
        (lambda: pj.init(jax.random.key(0), NET, CONFIG), "got Net; pass the variables that its init returned"),
        (
            lambda: pj.make_train_step(lambda params, batch: 0.0, TX, CONFIG),
            r"loss_fn must take \(params, batch, key\)",
        ),
        (lambda: pj.make_train_step(0.0, TX, CONFIG), "loss_fn must be a function"),
    ],
)
def test_foreign_arguments_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value)) < 500


def test_an_nnx_model_is_one_sentence():
    from flax import nnx

    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    for given in (model, nnx.state(model)):
        with pytest.raises(ValueError, match="NNX"):
            pj.init(jax.random.key(0), given, CONFIG)
