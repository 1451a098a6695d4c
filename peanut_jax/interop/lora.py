"""PEANuT as LoRA and LoRA as PEANuT.

The update is low-rank and its left factor is a function of the frozen kernel alone, so a trained PEANuT *is* a LoRA:
`lora_A = left^T`, `lora_B = right^T`. Whatever serves LoRA serves it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from peanut_jax.adapters import Adapters, FactorTree, check, factors, pair, saved
from peanut_jax.base.kernels import Axes, find, flatten
from peanut_jax.base.select import saved_paths, select
from peanut_jax.files.atomic import check_apart
from peanut_jax.files.hub import local_folder
from peanut_jax.files.torch_checkpoint import open_base
from peanut_jax.interop import fingerprint
from peanut_jax.interop.peft import from_tree, module_slots
from peanut_jax.interop.peft_folder import CONFIG_FILE, ModuleAdapters, read, type_of, write
from peanut_jax.interop.peft_selection import check_modules
from peanut_jax.interop.places import locate
from peanut_jax.methods.activations import ACTIVATIONS
from peanut_jax.methods.base import AdapterConfig, Config, LoraConfig, PeanutConfig
from peanut_jax.methods.tweaker import Theta, delta

Track = Callable[[list[str]], Iterable[str]]


def to_lora(
    adapters: Adapters, params: PyTree, config: Config, folder: str | Path | None = None
) -> tuple[Adapters, LoraConfig]:
    """The LoRA that an adapter is on its base: both orientations, any depth and activation, scanned or not.

    Nothing is approximated: the product of the factors is the same. They are computed in the dtype of `params`, as in
    training, and kept in float32.

    Args:
        adapters: From `init` or training.
        params: The frozen base that it was trained on.
        config: The adapter's.
        folder: Where to write it, as HF PEFT's LoRA directory (r, lora_alpha = r * scaling).

    Returns:
        The LoRA as adapters of the same params (saved modules included), and its config.

    Raises:
        ValueError: an adapter that does not belong to config and params; a NaN in the result, by kernel.
        NotImplementedError: `folder` is given, and a stack of layers has no name in torch.
    """
    targets, flat = check(adapters, params, config), flatten(params)
    lora: Adapters = {}
    for path, target in targets.items():
        theta = adapters[path]
        assert isinstance(theta, dict)
        lora[path] = _lora(theta, target.matrix(flat[path]), config, path)
    lora |= saved(adapters)
    lora_config = _lora_config(config)
    if folder is not None:
        write(folder, from_tree(lora, lora_config, params, targets))
    return lora, lora_config


def to_lora_folder(
    adapter: str | Path,
    source: str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    check_base: bool = True,
    track: Track = iter,
) -> None:
    """As `to_lora`, from an adapter directory and a PyTorch checkpoint. No model is built: the adapted kernels alone
    are read, one at a time.

    Args:
        adapter: What `save_adapter` or HF PEFT wrote.
        source: The base, a Hugging Face checkpoint in safetensors (folder or hub name).
        folder: Where the LoRA directory goes.
        overwrite: Replace an adapter that is there.
        check_base: As for `load_adapter`.
        track: Wraps the list of modules, to show progress.

    Raises:
        FileExistsError: the folder holds an adapter.
        FileNotFoundError, ValueError: an adapter or checkpoint that cannot be read, or that does not fit the other; an
            adapter that is a LoRA already.
    """
    loaded = read(adapter)
    if type_of(loaded.config) == "LORA":
        raise ValueError(f"{adapter} is a LoRA already")
    checkpoint = open_base(source, fingerprinted=bool(loaded.fingerprint) or not check_base)
    check_apart(Path(folder), checkpoint.folder, local_folder(str(adapter)))
    if (Path(folder) / CONFIG_FILE).exists() and not overwrite:
        raise FileExistsError(f"{folder} holds an adapter; give another folder, or overwrite=True (--overwrite)")
    places = locate(checkpoint, loaded)
    checked = check_base and isinstance(loaded.config, PeanutConfig)
    if checked:
        fingerprint.note_absence(loaded.fingerprint, str(adapter))
    thetas = {}
    for module in track(list(loaded.thetas)):
        kernel, config = places.kernels[module], dataclasses.replace(loaded.config, scaling=1.0)
        tensor, theta = checkpoint.read(places.tensors[module]), loaded.thetas[module]
        left, right, found = tensor_factors(tensor, theta, config, loaded.factor_dtype, kernel.transposed)
        if checked and loaded.fingerprint:
            fingerprint.check({module: found}, loaded.fingerprint, str(adapter), str(source))
        thetas[module] = {"a": np.asarray(left), "b": np.asarray(right)}
        _check_finite(thetas[module], module)
    lora_config = _lora_config(loaded.config)
    write(folder, ModuleAdapters(lora_config, thetas, loaded.saved, base_dtype=loaded.base_dtype))


def from_lora(folder: str | Path, params: PyTree, *, axes: Axes | None = None) -> FactorTree:
    """A LoRA directory of HF PEFT as factors, for `intercept`, `combine` and `init_from_factors`.

    Ranks and alphas of single modules (`rank_pattern`, `alpha_pattern`) and `use_rslora` are read; smaller ranks are
    filled up with zeros within a scanned stack. `load_adapter` reads a LoRA too, to go on training it.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`; or a hub name.
        params: The base, in any layout.
        axes: As for `init`.

    Returns:
        Kernel path -> (left [*stack, d_in, r], right [*stack, r, d_out]), scaling folded in.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: another peft_type, DoRA and other variants, files that cannot be read or do not fit `params`; saved
            modules, which factors have no place for.
    """
    loaded = read(folder)
    if not isinstance(loaded.config, LoraConfig):
        raise ValueError(f"{folder} holds a PEANuT, not a LoRA; load_adapter reads it")
    if loaded.saved:
        raise ValueError(
            f"{folder} holds saved modules ({next(iter(loaded.saved))!r}), which factors have no place for; "
            "load_adapter keeps them"
        )
    kernels = find(flatten(params), axes)
    slots = module_slots(kernels)
    check_modules(loaded, slots)
    found: dict[str, dict[int, tuple[Array, Array]]] = {}
    for module, theta in loaded.thetas.items():
        path, row = slots[module]
        kernel = kernels[path]
        if (theta["a"].shape[0], theta["b"].shape[1]) != (kernel.d_in, kernel.d_out):
            raise ValueError(
                f"module {module!r}: the LoRA is [{theta['a'].shape[0]}, {theta['b'].shape[1]}] and the kernel "
                f"[{kernel.d_in}, {kernel.d_out}]; it was trained on another base"
            )
        device = {name: jnp.asarray(leaf) for name, leaf in theta.items()}
        found.setdefault(path, {})[row or 0] = pair(device, jnp.zeros((0, 0)), loaded.module_config(module))
    return {path: _stacked(rows, kernels[path].stack) for path, rows in found.items()}


def init_from_factors(
    pairs: FactorTree, params: PyTree, config: PeanutConfig, axes: Axes | None = None
) -> tuple[Adapters, dict[str, np.ndarray]]:
    """A PEANuT that begins as a given low-rank update (paper, Prop. 3.2): 2r hidden units for a rank of r.

    With the update `left @ right`: A = [W0^+ left, -W0^+ left] and B = [right; -right] / (c * scaling), where
    act(x) - act(-x) = c x. What comes out is the update projected on the left singular space of W0: exact where W0 has
    full row rank (d_in <= d_out). The input orientation does the same on W0^T, and is exact where d_out <= d_in.

    Args:
        pairs: From `from_lora`, or from `factors` of another adapter.
        params: The frozen base.
        config: Of depth 0, with r twice the rank of `pairs`, selecting their kernels; act_fn relu, leaky_relu, gelu,
            gelu_new, silu, softplus or linear, which have such a c.
        axes: As for `init`.

    Returns:
        The adapters; and kernel path -> ||dW - left @ right|| / ||left @ right||, one number for each row of the stack,
        of the dW that the adapters give.

    Raises:
        ValueError: a config that cannot hold the update.

    References:
        arXiv:2410.01870v3, Proposition 3.2 and its proof.
    """
    slope = _odd_slope(config)
    targets, flat = select(params, config, axes), flatten(params)
    if odd := sorted(targets.keys() ^ pairs.keys()):
        raise ValueError(
            f"the config adapts {len(targets)} kernels and the update has {len(pairs)}; {odd[0]!r} differs"
        )
    adapters: Adapters = {}
    for path, (left, right) in pairs.items():
        rank = left.shape[-1]
        if config.r != 2 * rank:
            raise ValueError(f"config.r must be {2 * rank}, twice the rank of the update of {path!r}, got {config.r}")
        rows = targets[path].rows
        if rows is not None:
            left, right = left[jnp.array(rows)], right[jnp.array(rows)]
        kernel = np.asarray(targets[path].matrix(flat[path]), np.float64)
        outer, inner = np.asarray(left, np.float64), np.asarray(right, np.float64)
        if config.orientation == "input":
            kernel, outer, inner = _t(kernel), _t(inner), _t(outer)
        cutoff = max(kernel.shape[-2:]) * float(jnp.finfo(jnp.float32).eps)
        a, b = np.linalg.pinv(kernel, rcond=cutoff) @ outer, inner / (slope * config.scaling)
        adapters[path] = {
            "a": jnp.asarray(np.concatenate([a, -a], -1), jnp.float32),
            "b": jnp.asarray(np.concatenate([b, -b], -2), jnp.float32),
        }
    adapters |= {path: jnp.array(flat[path]) for path in saved_paths(flat, config)}
    with jax.default_matmul_precision("highest"):
        got = factors(adapters, params, config)
    return adapters, {path: _relative_error(got[path], pairs[path]) for path in pairs}


def tensor_factors(
    tensor: Float[np.ndarray, "rows columns"],
    theta: Mapping[str, np.ndarray],
    config: Config,
    dtype: str,
    conv1d: bool,
) -> tuple[Float[Array, "d_in r"], Float[Array, "r d_out"], str]:
    """left, right and the fingerprint of a kernel that torch keeps as `tensor`, read in `dtype`.

    Args:
        conv1d: The tensor is [d_in, d_out], as GPT-2's; a Linear's is [d_out, d_in].
    """
    with jax.default_matmul_precision("highest"):
        left, right, digest = _tensor_factors(tensor, theta, config, dtype, conv1d)
    return left, right, fingerprint.hexadecimal(jax.device_get(digest))


@partial(jax.jit, static_argnums=(2, 3, 4))
def _tensor_factors(tensor: Array, theta: Theta, config: Config, dtype: str, conv1d: bool) -> tuple[Array, ...]:
    kernel = (tensor if conv1d else tensor.T).astype(dtype)
    return *pair(theta, kernel, config), fingerprint.digest(kernel)


def _lora(theta: Theta, kernel: Float[Array, "*layers d_in d_out"], config: Config, name: str) -> Theta:
    """left and right as LoRA's A [d_in, r] and B [r, d_out], without the scaling."""
    with jax.default_matmul_precision("highest"):
        left, right = _pair(theta, kernel, dataclasses.replace(config, scaling=1.0))
    _check_finite({"a": left, "b": right}, name)
    return {"a": left, "b": right}


_pair = jax.jit(pair, static_argnums=2)


def _check_finite(theta: Mapping[str, Array | np.ndarray], name: str) -> None:
    if not all(bool(jnp.isfinite(side).all()) for side in theta.values()):
        raise ValueError(f"NaNs detected in the factors of {name!r}: the adapter or the base is broken there")


def _lora_config(config: Config) -> LoraConfig:
    return LoraConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(AdapterConfig)})


def _stacked(rows: Mapping[int, tuple[Array, Array]], stack: tuple[int, ...]) -> tuple[Array, Array]:
    """One kernel's pairs as its stack has them, zeros where a layer has none."""
    if not stack:
        return rows[0]
    rank = max(left.shape[-1] for left, _ in rows.values())
    some_left, some_right = next(iter(rows.values()))
    left = jnp.zeros((*stack, some_left.shape[0], rank), jnp.float32)
    right = jnp.zeros((*stack, rank, some_right.shape[1]), jnp.float32)
    for row, (one_left, one_right) in rows.items():
        left = left.at[row, :, : one_left.shape[-1]].set(one_left)
        right = right.at[row, : one_right.shape[0]].set(one_right)
    return left, right


def _odd_slope(config: PeanutConfig) -> float:
    """c in act(x) - act(-x) = c x."""
    x = np.array([0.1, 0.7, 1.0, 3.0, 20.0], np.float32)
    act = ACTIVATIONS[config.act_fn]
    slopes = np.asarray((act(jnp.asarray(x)) - act(jnp.asarray(-x))) / x)
    if config.depth or not np.allclose(slopes, slopes[0], rtol=1e-5):
        raise ValueError(
            "a LoRA becomes a PEANuT of depth 0 with an activation for which act(x) - act(-x) is c x (relu, "
            f"leaky_relu, gelu, gelu_new, silu, softplus, linear); got depth={config.depth}, act_fn={config.act_fn!r}"
        )
    return float(slopes[0])


def _relative_error(got: tuple[Array, Array], want: tuple[Array, Array]) -> np.ndarray:
    update = np.asarray(delta(*want), np.float64)
    size = np.linalg.norm(update, axis=(-2, -1))
    error = np.linalg.norm(np.asarray(delta(*got), np.float64) - update, axis=(-2, -1))
    return np.divide(error, size, out=np.zeros_like(error), where=size > 0)


def _t(m: np.ndarray) -> np.ndarray:
    return np.swapaxes(m, -1, -2)
