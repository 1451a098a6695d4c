"""PEANuT as LoRA and LoRA as PEANuT.

The update is low-rank and its left factor is a function of the frozen kernel alone, so a trained PEANuT *is* a LoRA:
`lora_A = left^T`, `lora_B = right^T`. Whatever serves LoRA serves it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from peanut_jax.adapters import Adapters, check
from peanut_jax.adapters import factors as factors_of
from peanut_jax.base.digest import digest, hexadecimal
from peanut_jax.base.kernels import find, flatten
from peanut_jax.base.select import saved_paths, select
from peanut_jax.files.atomic import check_apart, refuse_filled
from peanut_jax.files.hub import local_folder
from peanut_jax.files.torch_checkpoint import open_base
from peanut_jax.interop import fingerprint
from peanut_jax.interop.peft import axes_of, from_tree, module_slots
from peanut_jax.interop.peft_folder import CONFIG_FILE, ModuleAdapters, read, write
from peanut_jax.interop.peft_selection import check_modules
from peanut_jax.interop.peft_types import type_of
from peanut_jax.interop.places import locate, read_dense
from peanut_jax.matrices import Plain
from peanut_jax.methods.base import AdapterConfig, Method, Theta
from peanut_jax.methods.lora import LoraConfig
from peanut_jax.methods.peanut import PeanutConfig
from peanut_jax.methods.peanut_start import odd_slope, start_from
from peanut_jax.updates import KernelUpdate, LowRank, checked

Track = Callable[[list[str]], Iterable[str]]


def to_lora(
    adapters: Adapters, params: PyTree, config: Method, folder: str | Path | None = None, *, overwrite: bool = False
) -> tuple[Adapters, LoraConfig]:
    """The LoRA that an adapter is on its base: both orientations, any depth and activation, scanned or not.

    Nothing is approximated: the product of the factors is the same. They are computed in the dtype of `params`, as in
    training, and kept in float32.

    Args:
        adapters: From `init` or training.
        params: The frozen base that it was trained on.
        config: The adapter's.
        folder: Where to write it, as HF PEFT's LoRA directory (r, lora_alpha = r * scaling).
        overwrite: Replace the adapter that the folder holds.

    Returns:
        The LoRA as adapters of the same params (saved modules included), and its config.

    Raises:
        FileExistsError: as `save_adapter`.
        ValueError: an adapter that does not belong to config and params; an update that is not low-rank; a NaN in the
            result, by kernel.
        NotImplementedError: `folder` is given, and a stack of layers has no name in torch.
    """
    targets, flat = check(adapters, params, config), flatten(params)
    lora_config, unscaled = _lora_config(config), _unscaled(config)
    thetas = {}
    for path, target in targets.items():
        with jax.default_matmul_precision("highest"):
            update = _update(adapters.theta[path], Plain(target.matrix(flat[path])), target.bias(flat), unscaled)
        thetas[path] = _as_lora(update, path)
    lora = Adapters(thetas, adapters.saved)
    if folder is not None:
        write(folder, from_tree(lora, lora_config, params, targets), overwrite=overwrite)
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
        FileExistsError: the folder is not empty, and `overwrite` is false or it holds no adapter.
        FileNotFoundError, ValueError: an adapter or checkpoint that cannot be read, or that does not fit the other; an
            adapter that is a LoRA already.
    """
    loaded = read(adapter)
    lora_config = _lora_config(loaded.config)
    if type_of(loaded.config) is type_of(lora_config):
        raise ValueError(f"{adapter} is a LoRA already")
    checkpoint = open_base(source, fingerprinted=bool(loaded.fingerprint) or not check_base)
    check_apart(Path(folder), checkpoint.folder, local_folder(str(adapter)))
    refuse_filled(Path(folder), overwrite, CONFIG_FILE)
    places = locate(checkpoint, loaded)
    base_checked = check_base and loaded.config.READS_BASE
    if base_checked:
        fingerprint.note_absence(loaded.fingerprint, str(adapter))
    unscaled = _unscaled(loaded.config)
    thetas = {}
    for module in track(list(loaded.thetas)):
        (tensor, bias), transposed = read_dense(checkpoint, places.tensors[module]), places.kernels[module].transposed
        update, found = tensor_update(tensor, bias, loaded.thetas[module], unscaled, loaded.update_dtype, transposed)
        if base_checked and loaded.fingerprint:
            fingerprint.check({module: found}, loaded.fingerprint, str(adapter), str(source))
        thetas[module] = {name: np.asarray(side) for name, side in _as_lora(update, module).items()}
    named = dataclasses.replace(lora_config, base_model_name_or_path=lora_config.base_model_name_or_path or str(source))
    write(folder, ModuleAdapters(named, thetas, loaded.saved, base_dtype=loaded.base_dtype), overwrite=overwrite)


def from_lora(folder: str | Path, params: PyTree) -> dict[str, LowRank]:
    """A LoRA directory of HF PEFT as factors, for `bind`, `combine` and `init_from_factors`.

    Ranks and alphas of single modules (`rank_pattern`, `alpha_pattern`) and `use_rslora` are read; smaller ranks are
    filled up with zeros within a scanned stack. `load_adapter` reads a LoRA too, to go on training it.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`; or a hub name.
        params: The base, in any layout.

    Returns:
        Kernel path -> (left [*stack, d_in, r], right [*stack, r, d_out]), scaling folded in.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: another peft_type, DoRA and other variants, files that cannot be read or do not fit `params`; saved
            modules, which factors have no place for.
    """
    loaded = read(folder)
    if loaded.config.READS_BASE or not loaded.config.ADAPTS_KERNELS:
        raise ValueError(f"{folder} holds a {loaded.config.NAME}, not a LoRA; load_adapter reads it")
    if loaded.saved:
        raise ValueError(
            f"{folder} holds saved modules ({next(iter(loaded.saved))!r}), which factors have no place for; "
            "load_adapter keeps them"
        )
    flat = flatten(params)
    kernels = find(flat, axes_of(loaded, flat))
    slots = module_slots(kernels)
    check_modules(loaded, slots)
    found: dict[str, dict[int, LowRank]] = {}
    for module, theta in loaded.thetas.items():
        path, row = slots[module]
        update = loaded.module_config(module).update(
            {name: jnp.asarray(leaf) for name, leaf in theta.items()}, Plain(jnp.zeros((0, 0)))
        )
        assert isinstance(update, LowRank)  # a LoRA, as read above
        own, kernel = (update.left.shape[0], update.right.shape[1]), kernels[path]
        if own != (kernel.d_in, kernel.d_out):
            raise ValueError(
                f"module {module!r}: the LoRA is {list(own)} and the kernel [{kernel.d_in}, {kernel.d_out}]; it was "
                "trained on another base"
            )
        found.setdefault(path, {})[row or 0] = update
    return {path: _stacked(rows, kernels[path].stack) for path, rows in found.items()}


def init_from_factors(
    factors: Mapping[str, LowRank], params: PyTree, config: PeanutConfig
) -> tuple[Adapters, dict[str, np.ndarray]]:
    """A PEANuT that begins as a given low-rank update (paper, Prop. 3.2): 2r hidden units for a rank of r.

    With the update `left @ right`: A = [W0^+ left, -W0^+ left] and B = [right; -right] / (c * scaling), where
    act(x) - act(-x) = c x. What comes out is the update projected on the left singular space of W0: exact where W0 has
    full row rank (d_in <= d_out). The input orientation does the same on W0^T, and is exact where d_out <= d_in.

    Args:
        factors: From `from_lora`, or from `peanut_jax.factors` of another adapter.
        params: The frozen base.
        config: Of depth 0, with r twice the rank of `factors`, selecting their kernels; act_fn relu, leaky_relu, gelu,
            gelu_new, silu, softplus or linear, which have such a c.

    Returns:
        The adapters; and kernel path -> ||dW - left @ right|| / ||left @ right||, one number for each row of the stack,
        of the dW that the adapters give.

    Raises:
        ValueError: a config that cannot hold the update.

    References:
        arXiv:2410.01870v3, Proposition 3.2 and its proof.
    """
    slope = odd_slope(config)  # refuses a config that cannot hold an update, before anything is read
    given = checked(factors, "init_from_factors")
    targets, flat = select(params, config), flatten(params)
    if odd := sorted(targets.keys() ^ given.keys()):
        raise ValueError(
            f"the config adapts {len(targets)} kernels and the update has {len(given)}; {odd[0]!r} differs"
        )
    theta: dict[str, Theta] = {}
    for path, update in given.items():
        if not isinstance(update, LowRank):
            raise ValueError(f"the update of {path!r} is a {type(update).__name__}, which has no factors")
        if (rows := targets[path].rows) is not None:
            update = jax.tree.map(lambda side, rows=rows: side[jnp.array(rows)], update)
        theta[path] = start_from(update, np.asarray(targets[path].matrix(flat[path])), config, slope, path)
    adapters = Adapters(theta, {path: jnp.array(flat[path]) for path in saved_paths(flat, config)})
    with jax.default_matmul_precision("highest"):
        got = factors_of(adapters, params, config)
    return adapters, {path: _relative_error(got[path], LowRank(*factors[path])) for path in given}


def tensor_update(
    tensor: Float[np.ndarray, "rows columns"],
    bias: Float[np.ndarray, " d_out"] | None,
    theta: Mapping[str, np.ndarray],
    config: Method,
    dtype: str,
    conv1d: bool,
) -> tuple[KernelUpdate, str]:
    """The update, and the fingerprint, of a kernel that torch keeps as `tensor`, read in `dtype`.

    Args:
        conv1d: The tensor is [d_in, d_out], as GPT-2's; a Linear's is [d_out, d_in].
    """
    with jax.default_matmul_precision("highest"):
        update, found = _tensor_update(tensor, bias, theta, config, dtype, conv1d)
    return update, hexadecimal(jax.device_get(found))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _tensor_update(
    tensor: Array, bias: Array | None, theta: Theta, config: Method, dtype: str, conv1d: bool
) -> tuple[KernelUpdate, Array]:
    kernel = (tensor if conv1d else tensor.T).astype(dtype)
    return config.update(theta, Plain(kernel), bias), digest(kernel)


@partial(jax.jit, static_argnums=3)
def _update(theta: Theta, kernel: Plain, bias: Array | None, config: Method) -> KernelUpdate:
    return config.update(theta, kernel, bias)


def _as_lora(update: KernelUpdate, name: str) -> Theta:
    """left and right as LoRA's A [d_in, r] and B [r, d_out].

    Raises:
        ValueError: an update that is not low-rank; one that is not finite.
    """
    if not isinstance(update, LowRank):
        raise ValueError(
            f"the update of {name!r} is a {type(update).__name__}, not low-rank: it is not a LoRA; merge it"
        )
    if not all(bool(jnp.isfinite(side).all()) for side in update):
        raise ValueError(f"NaNs detected in the factors of {name!r}: the adapter or the base is broken there")
    return {"a": update.left, "b": update.right}


def _unscaled(config: Method) -> Method:
    """The method with its scaling left for lora_alpha to say."""
    fields: dict[str, Any] = {"scaling": 1.0}
    return dataclasses.replace(config, **fields)


def _lora_config(config: Method) -> LoraConfig:
    """The LoRA of the same modules, rank and scaling.

    Raises:
        ValueError: a method without a rank.
    """
    if not {"r", "scaling"} <= vars(config).keys():
        raise ValueError(f"{type(config).__name__} has no rank, so it is not a LoRA; merge it, or keep it as it is")
    shared = [field.name for field in dataclasses.fields(AdapterConfig)]
    return LoraConfig(**{name: getattr(config, name) for name in (*shared, "r", "scaling")})


def _stacked(rows: Mapping[int, LowRank], stack: tuple[int, ...]) -> LowRank:
    """One kernel's factors as its stack has them, zeros where a layer has none."""
    if not stack:
        return rows[0]
    rank = max(left.shape[-1] for left, _ in rows.values())
    some_left, some_right = next(iter(rows.values()))
    left = jnp.zeros((*stack, some_left.shape[0], rank), jnp.float32)
    right = jnp.zeros((*stack, rank, some_right.shape[1]), jnp.float32)
    for row, (one_left, one_right) in rows.items():
        left = left.at[row, :, : one_left.shape[-1]].set(one_left)
        right = right.at[row, : one_right.shape[0]].set(one_right)
    return LowRank(left, right)


def _relative_error(got: LowRank, want: LowRank) -> np.ndarray:
    update = np.asarray(want.delta(), np.float64)
    size = np.linalg.norm(update, axis=(-2, -1))
    error = np.linalg.norm(np.asarray(got.delta(), np.float64) - update, axis=(-2, -1))
    return np.divide(error, size, out=np.zeros_like(error), where=size > 0)
