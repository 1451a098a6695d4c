"""DoRA against HF PEFT, both ways, and where it meets the rest: scans, biases, merging, microbatches, a mesh."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

import peanut_jax as pj
from peanut_jax.base.kernels import flatten
from peanut_jax.sharding import batch_sharding, init_state, make_mesh, rules_for, shard, sharded_train_step
from tests.contract.models import case_of
from tests.interop.test_merged import contents
from tests.oracle import bridge

FIELDS = {"r": 4, "target_modules": ["query", "value"]}
CONFIG = pj.DoraConfig(scaling=0.5, **FIELDS)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return bridge.build("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def theirs(twin):
    """PEFT's model with a DoRA that has trained: no part of it is at its start."""
    torch.manual_seed(0)
    config = peft.LoraConfig(lora_alpha=2, use_dora=True, init_lora_weights=False, **FIELDS)
    model = peft.get_peft_model(copy.deepcopy(twin.torch), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("dora") / "theirs"
    theirs.save_pretrained(path)
    return path


@functools.cache
def logits_fn(twin):
    return lambda params: twin.flax(**twin.batch, params=params)[0]


def torch_logits(model, twin):
    return model(**twin.torch_batch())[0]


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=atol * np.abs(want).max())


def test_peft_to_here_and_back(twin, theirs, folder, tmp_path):
    adapters, config = pj.load_adapter(folder, twin.params)
    assert (type(config), config.r, config.scaling) == (pj.DoraConfig, 4, 0.5)
    want = torch_logits(theirs, twin).detach().numpy()
    assert np.abs(want - torch_logits(twin.torch, twin).detach().numpy()).max() > 1e-2
    close(pj.adapt(logits_fn(twin), config)(adapters, twin.params), want)
    pj.save_adapter(tmp_path / "ours", adapters, config, twin.params)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(twin.torch), tmp_path / "ours").eval()
    close(torch_logits(again, twin).detach().numpy(), want)
    back, _ = pj.load_adapter(tmp_path / "ours", twin.params)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


def test_merge_is_pefts(twin, theirs, folder):
    adapters, config = pj.load_adapter(folder, twin.params)
    merged = flatten(pj.merge(twin.params, adapters, config))
    copied = copy.deepcopy(theirs)
    copied.merge_adapter()
    for name, module in copied.get_base_model().named_modules():
        if hasattr(module, "lora_magnitude_vector"):
            weight = module.get_base_layer().weight.detach().numpy().T
            close(merged[name.replace(".", "/") + "/kernel"], weight, 1e-6)


def test_gradients_are_pefts(twin, theirs, folder):
    """The norm is a constant in the backward pass."""
    adapters, config = pj.load_adapter(folder, twin.params)
    weights = np.random.default_rng(0).normal(size=torch_logits(twin.torch, twin).shape).astype(np.float32)
    theirs.zero_grad()
    (torch_logits(theirs, twin) * torch.from_numpy(weights)).mean().backward()
    forward = pj.adapt(logits_fn(twin), config)
    grads = jax.grad(lambda a: (forward(a, twin.params) * weights).mean())(adapters)
    found = {name: p.grad.numpy().T for name, p in theirs.named_parameters() if p.grad is not None}
    for path, theta in grads.theta.items():
        module = "base_model.model." + path.removesuffix("/kernel").replace("/", ".")
        close(theta["a"], found[f"{module}.lora_A.default.weight"], 1e-4)
        close(theta["b"], found[f"{module}.lora_B.default.weight"], 1e-4)
        close(theta["magnitude"], found[f"{module}.lora_magnitude_vector.default.weight"], 1e-4)


def test_a_merged_checkpoint_is_the_adapted_model(twin, tmp_path):
    """Beside a LoRA, from memory and from folders."""
    twin.torch.save_pretrained(tmp_path / "base")
    configs = [CONFIG, pj.LoraConfig(r=2, target_modules=["query"])]
    both = [perturbed(pj.init(jax.random.key(i), twin.params, one)) for i, one in enumerate(configs)]
    pj.export_merged(tmp_path / "base", tmp_path / "api", both, configs, twin.params)
    for name, adapters, config in zip("ab", both, configs, strict=True):
        pj.save_adapter(tmp_path / name, adapters, config, twin.params)
    from peanut_jax.interop.merged import merge_folders

    merge_folders(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "folders")
    assert contents(tmp_path / "api") == contents(tmp_path / "folders")
    updates = pj.combine(*(pj.compute_updates(a, twin.params, c) for a, c in zip(both, configs, strict=True)))
    merged = type(twin.torch).from_pretrained(tmp_path / "api").eval()
    close(torch_logits(merged, twin).detach().numpy(), pj.bind(logits_fn(twin), updates)(twin.params))


def test_it_is_not_a_lora(twin, tmp_path):
    adapters = pj.init(jax.random.key(0), twin.params, CONFIG)
    with pytest.raises(ValueError, match="is a Rescaled, not low-rank"):
        pj.to_lora(adapters, twin.params, CONFIG, tmp_path / "lora")
    with pytest.raises(ValueError, match="is a Rescaled, which has no factors"):
        pj.factors(adapters, twin.params, CONFIG)


def perturbed(adapters):
    return jax.tree.map(lambda leaf: leaf * 1.2 + 0.01, adapters)


@pytest.mark.parametrize("name", ["dense", "dense_general", "scan_remat", "vmap", "gpt2", "albert"])
def test_forward_equals_merged_for_every_front_end(name):
    case = case_of(name)
    config = pj.DoraConfig(r=3, target_modules=case.targets, kernel_axes=case.axes)
    fresh = pj.init(jax.random.key(0), case.params, config)
    base = case.fn(case.params, case.x)
    # The norm of W0 is summed once eagerly, by init, and once in the step: they may differ in the last bit.
    close(jax.jit(pj.adapt(case.fn, config))(fresh, case.params, case.x), base, 2e-6)
    adapters = perturbed(fresh)
    adapted = jax.jit(pj.adapt(case.fn, config))(adapters, case.params, case.x)
    close(adapted, case.fn(pj.merge(case.params, adapters, config), case.x), 3e-6)
    assert float(jnp.abs(adapted - base).max()) > 1e-3


def test_layers_that_are_not_chosen_stay(twin):
    case = case_of("scan_remat")
    config = pj.DoraConfig(r=2, target_modules=case.targets, layers_to_transform=[1])
    adapters = perturbed(pj.init(jax.random.key(0), case.params, config))
    merged, base = flatten(pj.merge(case.params, adapters, config)), flatten(case.params)
    kernel = "layers/up/kernel"
    np.testing.assert_array_equal(np.abs(merged[kernel] - base[kernel]).max((1, 2)) > 0, [False, True, False])
    close(
        pj.adapt(case.fn, config)(adapters, case.params, case.x),
        case.fn(pj.merge(case.params, adapters, config), case.x),
    )


@pytest.mark.large
def test_a_mesh_trains_what_one_device_does(twin):
    """Magnitudes follow their kernels' columns."""
    config = pj.DoraConfig(r=2, target_modules=["query", "output.dense"])
    ids = jax.random.randint(jax.random.key(3), (8, 6), 0, bridge.SIZES["vocab_size"])

    def loss_fn(params, batch, key):
        return jnp.square(twin.flax(batch["ids"], params=params)[0]).mean()

    tx, found = optax.adam(1e-2), []
    for sizes in ("data=1", "data=2,fsdp=2,tensor=2"):
        mesh = make_mesh(sizes, jax.devices()[: 1 if sizes == "data=1" else 8])
        params = shard(twin.params, mesh, rules_for("bert"))
        state = init_state(jax.random.key(0), params, config, tx)
        step = sharded_train_step(loss_fn, tx, config, state, params, accumulate_steps=2)
        batch = {"ids": jax.device_put(ids, batch_sharding(mesh))}
        for _ in range(3):
            state, metrics = step(state, params, batch)
        found.append((jax.device_get(state.adapters), float(metrics["loss"])))
    (one, loss), (many, same) = found
    assert loss == pytest.approx(same, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, many)
    query = next(path for path in state.adapters.theta if path.endswith("query/kernel"))
    assert state.adapters.theta[query]["magnitude"].sharding.spec == jax.sharding.PartitionSpec("tensor")
