"""PEANuT as LoRA and LoRA as PEANuT.

The update is low-rank and its left factor is a function of the frozen kernel alone, so a trained PEANuT *is* a LoRA:
`lora_A = left^T`, `lora_B = right^T`. Whatever serves LoRA serves it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from peanut_jax.adapters import Adapters, check
from peanut_jax.adapters import factors as factors_of
from peanut_jax.base.kernels import find, flatten
from peanut_jax.base.select import saved_paths, select
from peanut_jax.files.atomic import check_apart, refuse_filled
from peanut_jax.files.hub import local_folder
from peanut_jax.files.torch_checkpoint import open_base
from peanut_jax.files.untrusted import read_json
from peanut_jax.interop import engines, fingerprint
from peanut_jax.interop.lora_factors import as_lora, is_plain, kernel_update, listed, lora_config, tensor_update
from peanut_jax.interop.peft import axes_of, from_tree, module_slots
from peanut_jax.interop.peft_folder import CONFIG_FILE, ModuleAdapters, read, write
from peanut_jax.interop.peft_selection import check_modules
from peanut_jax.interop.peft_types import type_of
from peanut_jax.interop.places import locate, read_dense
from peanut_jax.matrices import Plain
from peanut_jax.methods.base import Method, Theta
from peanut_jax.methods.lora import LoraConfig
from peanut_jax.methods.peanut import PeanutConfig
from peanut_jax.methods.peanut_start import odd_slope, start_from
from peanut_jax.updates import LowRank, checked

Track = Callable[[list[str]], Iterable[str]]


def to_lora(
    adapters: Adapters,
    params: PyTree,
    config: Method,
    folder: str | Path | None = None,
    *,
    overwrite: bool = False,
    engine: str | None = None,
) -> tuple[Adapters, LoraConfig]:
    """The LoRA that an adapter is on its base: both orientations, any depth and activation, scanned or not.

    Nothing is approximated: the factors are those of `compute_updates`, bit for bit, with the scaling folded in (into
    B; in the input orientation into A), so that lora_alpha = r and a reader has nothing left to multiply by. They are
    computed in the dtype of `params`, as in training, and kept in float32.

    Args:
        adapters: From `init` or training.
        params: The frozen base that it was trained on.
        config: The adapter's.
        folder: Where to write it, as HF PEFT's LoRA directory.
        overwrite: Replace the adapter that the folder holds.
        engine: A key of `interop.engines.ENGINES` ("vllm", ...), whose rules are checked. Those that go by the base's
            architecture, which `params` do not tell, are left to `peanut-jax to-lora --for`.

    Returns:
        The LoRA as adapters of the same params (saved modules included), and its config.

    Raises:
        FileExistsError: as `save_adapter`.
        ValueError: an adapter that does not belong to config and params; an update that is not low-rank; a NaN in the
            result, by kernel; an adapter that `engine` would not serve as it is meant.
        NotImplementedError: `folder` or `engine` is given, and a stack of layers has no name in torch.
    """
    row = None if engine is None else engines.engine_named(engine)
    targets, flat = check(adapters, params, config), flatten(params)
    lora_like = lora_config(config, getattr(config, "r", 0))
    thetas = {}
    for path, target in targets.items():
        update = kernel_update(adapters.theta[path], target.matrix(flat[path]), target.bias(flat), config)
        thetas[path] = as_lora(update, path, lora_like.r)
    lora = Adapters(thetas, adapters.saved)
    if folder is None and row is None:
        return lora, lora_like
    found = from_tree(lora, lora_like, params, targets)
    if row is not None:
        exported = engines.Exported(tuple(found.thetas), lora_like.r, tuple(found.saved))
        engines.check(row, exported, "peanut_jax.export_merged, or peanut-jax merge")
    if folder is not None:
        assert isinstance(found.config, LoraConfig)
        write(folder, dataclasses.replace(found, config=listed(found.config, found.thetas)), overwrite=overwrite)
    return lora, lora_like


def to_lora_folder(
    adapter: str | Path,
    source: str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    check_base: bool = True,
    track: Track = iter,
    engine: str | None = None,
) -> None:
    """As `to_lora`, from an adapter directory and a PyTorch checkpoint. No model is built: the adapted kernels alone
    are read, one at a time.

    A LoRA that engines would read in different ways (rank_pattern, alpha_pattern, use_rslora, a lora_alpha that is not
    an integer, a regular expression of target modules) is written as one of one rank that they read alike.

    Args:
        adapter: What `save_adapter` or HF PEFT wrote.
        source: The base, a Hugging Face checkpoint in safetensors (folder or hub name).
        folder: Where the LoRA directory goes.
        overwrite: Replace an adapter that is there.
        check_base: As for `load_adapter`.
        track: Wraps the list of modules, to show progress.
        engine: As for `to_lora`, the rules of the base's architecture included.

    Raises:
        FileExistsError: the folder is not empty, and `overwrite` is false or it holds no adapter.
        FileNotFoundError, ValueError: an adapter or checkpoint that cannot be read, or that does not fit the other; a
            LoRA that every engine reads alike already; an adapter that `engine` would not serve as it is meant.
    """
    row = None if engine is None else engines.engine_named(engine)
    loaded = read(adapter)
    ranks = {module: getattr(loaded.module_config(module), "r", 0) for module in loaded.thetas}
    lora_like = lora_config(loaded.config, max(ranks.values(), default=0))
    checkpoint = open_base(source, fingerprinted=bool(loaded.fingerprint) or not check_base)
    if row is not None:
        exported = engines.Exported(
            tuple(loaded.thetas), lora_like.r, tuple(loaded.saved), engines.model_type_of(checkpoint.folder)
        )
        engines.check(row, exported, f"peanut-jax merge {source} --adapter {adapter} --out DIR")
    if type_of(loaded.config) is type_of(lora_like):
        _refuse_plain(adapter)
    check_apart(Path(folder), checkpoint.folder, local_folder(str(adapter)))
    refuse_filled(Path(folder), overwrite, CONFIG_FILE)
    places = locate(checkpoint, loaded)
    base_checked = check_base and loaded.config.READS_BASE
    if base_checked:
        fingerprint.note_absence(loaded.fingerprint, str(adapter))
    thetas = {}
    for module in track(list(loaded.thetas)):
        (tensor, bias), transposed = read_dense(checkpoint, places.tensors[module]), places.kernels[module].transposed
        own = loaded.module_config(module)
        update, found = tensor_update(tensor, bias, loaded.thetas[module], own, loaded.update_dtype, transposed)
        if base_checked and loaded.fingerprint:
            fingerprint.check({module: found}, loaded.fingerprint, str(adapter), str(source))
        thetas[module] = {name: np.asarray(side) for name, side in as_lora(update, module, lora_like.r).items()}
    named = dataclasses.replace(
        listed(lora_like, thetas), base_model_name_or_path=lora_like.base_model_name_or_path or str(source)
    )
    write(folder, ModuleAdapters(named, thetas, loaded.saved, base_dtype=loaded.base_dtype), overwrite=overwrite)


def _refuse_plain(adapter: str | Path) -> None:
    """Refuses a LoRA that would be written as it is."""
    if is_plain(read_json(local_folder(str(adapter)) / CONFIG_FILE)):
        raise ValueError(
            f"{adapter} is a LoRA already, with one rank and an integer lora_alpha, as every engine reads it: serve it "
            "as it is"
        )


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


def _stacked(rows: Mapping[int, LowRank], stack: tuple[int, ...]) -> LowRank:
    """One kernel's factors as its stack has them, zeros where a layer has none."""
    if not stack:
        return rows[0]
    rank = max(left.shape[-1] for left, _ in rows.values())
    some_left, some_right = next(iter(rows.values()))
    left = np.zeros((*stack, some_left.shape[0], rank), np.float32)
    right = np.zeros((*stack, rank, some_right.shape[1]), np.float32)
    for row, (one_left, one_right) in rows.items():
        left[row, :, : one_left.shape[-1]] = one_left
        right[row, : one_right.shape[0]] = one_right
    return LowRank(jnp.asarray(left), jnp.asarray(right))


def _relative_error(got: LowRank, want: LowRank) -> np.ndarray:
    update = np.asarray(want.delta(), np.float64)
    size = np.linalg.norm(update, axis=(-2, -1))
    error = np.linalg.norm(np.asarray(got.delta(), np.float64) - update, axis=(-2, -1))
    return np.divide(error, size, out=np.zeros_like(error), where=size > 0)
