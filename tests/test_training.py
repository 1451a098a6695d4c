"""The train step: accumulation, clipping, two learning rates, and the one-tree road with the same updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peanut_jax as pj
from benchmarks.step_cost import tweaker_dots_in_loops
from peanut_jax.base.kernels import flatten

CONFIG = pj.PeanutConfig(r=3, depth=1, target_modules=["query", "value"], task_type="SEQ_CLS", init_weights=False)
LABELS = jnp.array([0, 2, 1, 1])


@pytest.fixture(scope="module")
def loss_fn(bert):
    def loss(params, batch, key):
        logits = bert(batch["ids"], params=params).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        weight = batch["weight"].sum()
        return (losses * batch["weight"]).sum() / weight, {"weight": weight, "largest": logits.max()}

    return loss


@pytest.fixture(scope="module")
def batch(tokens):
    return {"ids": tokens, "labels": LABELS, "weight": jnp.ones(4)}


@pytest.fixture(scope="module")
def adapters(bert):
    return pj.init(jax.random.key(3), bert.params, CONFIG)


# Its state is the gradient it was given, which a difference of parameters would show to fewer digits.
RECORD = optax.GradientTransformation(lambda params: params, lambda grads, _, params: (grads, grads))


def one_step(bert, adapters, loss_fn, batch, tx=RECORD, **options):
    step = pj.make_train_step(loss_fn, tx, CONFIG, **options)
    state, metrics = step(pj.TrainState.create(adapters, tx, jax.random.key(0)), bert.params, batch)
    return state, jax.device_get(metrics)


def close(a, b, rtol=1e-5):
    def leaf(x, y):
        np.testing.assert_allclose(x, y, atol=rtol * float(jnp.abs(y).max()) + 1e-9)

    jax.tree.map(leaf, a, b)


@pytest.fixture(scope="module")
def reference(bert, adapters, loss_fn, batch):
    """(gradient, loss) of the plain definition: jax.grad through adapt."""
    forward = pj.adapt(loss_fn, CONFIG)
    (loss, _), grads = jax.jit(jax.value_and_grad(lambda a: forward(a, bert.params, batch, None), has_aux=True))(
        adapters
    )
    return grads, loss


def test_the_step_is_the_gradient_of_the_loss(bert, adapters, loss_fn, batch, reference):
    grads, loss = reference
    state, metrics = one_step(bert, adapters, loss_fn, batch)
    close(state.opt_state, grads)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert int(state.step) == 1
    assert set(metrics) == {"loss", "grad_norm", "largest"}


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [3, 0, 1, 2]])
def test_microbatches_add_up_to_the_batch_by_weight(bert, adapters, loss_fn, batch, weights):
    batch = {**batch, "weight": jnp.array(weights, jnp.float32)}
    whole, metrics = one_step(bert, adapters, loss_fn, batch)
    parts, summed = one_step(bert, adapters, loss_fn, batch, accumulate_steps=2)
    close(parts.opt_state, whole.opt_state)
    np.testing.assert_allclose(summed["loss"], metrics["loss"], rtol=1e-6)


def test_a_step_in_which_nothing_counts_changes_nothing(bert, adapters, batch):
    def loss_fn(params, batch, key):
        losses = bert(batch["ids"], params=params).logits.sum(-1)
        weight = batch["weight"].sum()
        return (losses * batch["weight"]).sum() / weight, {"weight": weight}

    state, metrics = one_step(bert, adapters, loss_fn, {**batch, "weight": jnp.zeros(4)}, accumulate_steps=2)
    assert all(not leaf.any() for leaf in jax.tree.leaves(state.opt_state))
    assert metrics == {"loss": 0.0, "grad_norm": 0.0}


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_metrics_may_be_plain_numbers(bert, adapters, batch, accumulate_steps):
    def loss_fn(params, batch, key):
        logits = bert(batch["ids"], params=params).logits
        return jnp.mean(logits**2), {"temperature": 0.5, "layers": 2, "flag": True, "rows": np.float32(3)}

    _, metrics = one_step(bert, adapters, loss_fn, batch, accumulate_steps=accumulate_steps)
    assert {name: float(metrics[name]) for name in ("temperature", "layers", "flag", "rows")} == {
        "temperature": 0.5,
        "layers": 2.0,
        "flag": 1.0,
        "rows": 3.0,
    }


def test_a_subset_trains_its_modules_alone(bert, loss_fn, batch):
    """A linear probe, and every module: the saved leaves' gradients are those of the parameters themselves."""
    whole = jax.jit(jax.grad(lambda params: loss_fn(params, batch, None)[0]))(bert.params)
    for names in (["classifier"], ["bert", "classifier"]):
        config = pj.SubsetConfig(modules_to_save=names)
        start = pj.init(jax.random.key(0), bert.params, config)
        step = pj.make_train_step(loss_fn, RECORD, config)
        state, _ = step(pj.TrainState.create(start, RECORD, jax.random.key(0)), bert.params, batch)
        want = flatten({name: whole[name] for name in names})
        assert state.opt_state.saved.keys() == want.keys()
        close(state.opt_state.saved, want)


def test_microbatches_keep_a_sharded_batch_axis_in_place():
    from peanut_jax.training import _split

    rows = np.asarray(_split(jnp.arange(8), 2))
    assert rows.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_the_tweaker_is_outside_the_accumulation_loop(bert, adapters, loss_fn, batch):
    """In the compiled program, no product of the loop's body reads a kernel with r columns; with the factors computed
    inside the loop the same search finds them."""
    sides = {16}
    tx = optax.sgd(1.0)
    state = pj.TrainState.create(adapters, tx, jax.random.key(0))
    step = pj.make_train_step(loss_fn, tx, CONFIG, accumulate_steps=2)
    assert tweaker_dots_in_loops(step.lower(state, bert.params, batch).compile().as_text(), CONFIG.r, sides) == 0

    def inside(adapters, params, batches):
        grads = jax.grad(lambda a, b: pj.adapt(loss_fn, CONFIG)(a, params, b, None)[0])
        body = lambda total, b: (jax.tree.map(jnp.add, total, grads(adapters, b)), None)  # noqa: E731
        return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, adapters), batches)[0]

    batches = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), batch)
    program = jax.jit(inside).lower(adapters, bert.params, batches).compile().as_text()
    assert tweaker_dots_in_loops(program, CONFIG.r, sides) > 0


def test_clipping_scales_the_whole_gradient(bert, adapters, loss_fn, batch, reference):
    grads, _ = reference
    norm = float(optax.tree.norm(grads))
    state, metrics = one_step(bert, adapters, loss_fn, batch, max_grad_norm=norm / 4)
    close(state.opt_state, jax.tree.map(lambda g: g / 4, grads))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    loose, _ = one_step(bert, adapters, loss_fn, batch, max_grad_norm=norm * 4)
    close(loose.opt_state, grads)


def test_adapters_and_saved_modules_have_their_own_optimizer(bert, adapters, loss_fn, batch, reference):
    grads, _ = reference
    tx = pj.partition(adapters=optax.sgd(50.0), saved=optax.sgd(200.0))
    state, _ = one_step(bert, adapters, loss_fn, batch, tx=tx)
    for part, rate in (("theta", 50.0), ("saved", 200.0)):
        before, grad = getattr(adapters, part), getattr(grads, part)
        expected = jax.tree.map(lambda p, g, rate=rate: p - rate * g, before, grad)
        close(getattr(state.adapters, part), expected, 1e-4)


def test_one_tree_with_a_frozen_base_gets_the_same_updates(bert, adapters, loss_fn, batch):
    tx = optax.adamw(1e-2)
    state, _ = one_step(bert, adapters, loss_fn, batch, tx=tx)
    tree = {"params": bert.params, "adapters": adapters}
    frozen = pj.freeze(tx)
    opt_state = frozen.init(tree)

    @jax.jit
    def step(tree, opt_state):
        loss = lambda tree: pj.adapt(loss_fn, CONFIG)(tree["adapters"], tree["params"], batch, None)[0]  # noqa: E731
        updates, opt_state = frozen.update(jax.grad(loss)(tree), opt_state, tree)
        return optax.apply_updates(tree, updates), opt_state

    after, _ = step(tree, opt_state)
    close(after["adapters"], state.adapters, 1e-5)
    jax.tree.map(np.testing.assert_array_equal, after["params"], bert.params)
    held = sum(leaf.size for leaf in jax.tree.leaves(opt_state))
    assert held == sum(leaf.size for leaf in jax.tree.leaves(tx.init(adapters)))


def test_the_mask_marks_the_adapters():
    mask = pj.trainable_mask({"params": {"kernel": 1}, "adapters": {"kernel": {"a": 1}, "bias": 1}})
    assert mask == {"params": {"kernel": False}, "adapters": {"kernel": {"a": True}, "bias": True}}
    with pytest.raises(ValueError, match=r"under 'adapters', got the keys \['params'\]"):
        pj.trainable_mask({"params": {}})


def test_each_step_has_its_own_key(bert, adapters, batch):
    def draws(params, batch, key):
        bert(batch["ids"], params=params)
        return jnp.zeros(()), {"draw": jax.random.uniform(key)}

    tx = optax.sgd(1.0)
    step = pj.make_train_step(draws, tx, CONFIG)
    state = pj.TrainState.create(adapters, tx, jax.random.key(0))
    seen = []
    for _ in range(3):
        state, metrics = step(state, bert.params, batch)
        seen.append(float(metrics["draw"]))
    assert len(set(seen)) == 3
    resumed = pj.TrainState.create(adapters, tx, jax.random.key(0)).replace(step=jnp.array(2))
    assert float(step(resumed, bert.params, batch)[1]["draw"]) == seen[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_steps": 2.0}, r"accumulate_steps must be an integer of at least 1, got 2\.0"),
        ({"accumulate_steps": 0}, "accumulate_steps must be an integer of at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0 or None, got 0.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pj.make_train_step(lambda *_: 0.0, optax.sgd(1.0), CONFIG, **options)


def test_a_batch_that_does_not_divide_is_refused(bert, adapters, loss_fn, batch):
    with pytest.raises(ValueError, match="a batch of 4 does not divide into accumulate_steps=3 microbatches"):
        one_step(bert, adapters, loss_fn, batch, accumulate_steps=3)
