"""HF PEFT's adapter directory (`adapter_config.json`, `adapter_model.safetensors`), read and written without torch."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peanut_jax.files.atomic import refuse_filled, replacing_entries, write_text
from peanut_jax.files.hub import local_folder
from peanut_jax.files.safetensors import finite, read_tensors, write_tensors
from peanut_jax.files.untrusted import TEXT_TO_TEXT, parse_json, read_json
from peanut_jax.interop.peft_fields import config_of, fields_of, own_fields
from peanut_jax.interop.peft_types import PeftType, type_named, type_of
from peanut_jax.messages import reading, short
from peanut_jax.methods.base import Method

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT_KEY = "peanut_jax.base_fingerprint"
DTYPE_KEY = "peanut_jax.base_dtype"
# Of the config: a list of 20,000 modules has 2 MB.
_MAX_BYTES = 1 << 22
# Of the number in a tensor's name.
_MAX_DIGITS = 6

# The tensors of HF's heads that have a row a label.
_LOGITS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")


@dataclasses.dataclass(frozen=True)
class ModuleAdapters:
    """An adapter as its files hold it.

    Attributes:
        config: Its fields; target_modules and its kin select among torch's module names.
        thetas: Torch module name -> theta of that one kernel.
        saved: Torch tensor name -> array, for the saved modules.
        fingerprint: Digest of each of the base's kernels; empty where the writer made none.
        base_dtype: Dtype of the kernels in training, in which updates are computed; None for HF PEFT's adapters.
        own_fields: Module -> the fields in which it differs from `config`: rank and scaling, by LoRA's patterns.
    """

    config: Method
    thetas: dict[str, dict[str, np.ndarray]]
    saved: dict[str, np.ndarray]
    fingerprint: dict[str, str] = dataclasses.field(default_factory=dict)
    base_dtype: str | None = None
    own_fields: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def update_dtype(self) -> str:
        """HF PEFT computes in theta's dtype, whatever the kernel's (peft 0.21.2, `tuners/peanut/layer.py`)."""
        return self.base_dtype or "float32"

    def module_config(self, module: str) -> Method:
        """The config of one module, with its own rank and scaling."""
        return dataclasses.replace(self.config, **self.own_fields.get(module, {}))


def write(folder: str | Path, adapter: ModuleAdapters, *, overwrite: bool = False) -> None:
    """Writes the two files; each appears under its name once it is whole, and other files in the folder stay.

    Args:
        overwrite: Replace the adapter that the folder holds.

    Raises:
        FileExistsError: as `files.atomic.refuse_filled`.
        NotImplementedError: a method that has no such form.
    """
    row = type_of(adapter.config)
    tensors: dict[str, np.ndarray] = {}
    for module, theta in adapter.thetas.items():
        for leaf, name in row.tensors.items():
            if "{i}" in name:
                parts = {name.format(i=i): matrix for i, matrix in enumerate(theta.get(leaf, ()))}
            else:
                parts = {name: theta[leaf]}
            tensors |= {f"{PREFIX}{module}.{key}": array.T for key, array in parts.items()}
    tensors |= {PREFIX + name: array for name, array in adapter.saved.items()}
    metadata = {FINGERPRINT_KEY: json.dumps(adapter.fingerprint)} if adapter.fingerprint else {}
    metadata |= {DTYPE_KEY: adapter.base_dtype} if adapter.base_dtype else {}
    text = json.dumps(fields_of(adapter.config, row), indent=2, sort_keys=True) + "\n"
    folder = Path(folder)
    refuse_filled(folder, overwrite, CONFIG_FILE)
    with replacing_entries(folder) as temporary:
        write_tensors(temporary / WEIGHTS_FILE, tensors, metadata)
        write_text(temporary / CONFIG_FILE, text)
        (folder / CONFIG_FILE).unlink(missing_ok=True)  # so that a crash leaves no old config beside new weights


def read(folder: str | Path) -> ModuleAdapters:
    """Reads the two files of a folder or a hub repository.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: what is in them cannot be read, or is not one whole adapter of a type in `TYPES`.
    """
    folder = local_folder(str(folder))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            pickles = sorted(file.name for file in folder.glob("adapter_model.*") if file.suffix in (".bin", ".pt"))
            pickle = f" {pickles[0]} is a pickle file, which can run code and is not read:" if pickles else ""
            raise FileNotFoundError(
                f"{folder} has no {name}.{pickle} save the adapter in PEFT with save_pretrained(folder)"
            )
    path = folder / CONFIG_FILE
    with reading(path):
        fields = read_json(path, _MAX_BYTES)
        config, row = config_of(fields), type_named(fields)
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    with reading(folder / WEIGHTS_FILE):
        _check_finite(tensors)
        thetas, kept = _thetas(tensors, row, config)
        singled = _check_shapes(thetas, config, fields)
        for module, theta in thetas.items():
            _check_scaled(module, theta, dataclasses.replace(config, **singled.get(module, {})))
        prints = _fingerprint(metadata)
        dtype = metadata.get(DTYPE_KEY)
        if dtype not in (None, "float64", "float32", "float16", "bfloat16"):
            raise ValueError(f"{DTYPE_KEY} must be a floating dtype, got {short(dtype)}")
    return ModuleAdapters(config, thetas, kept, prints, dtype, singled)


def _check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses tensors that are not finite in float32, in which they are computed with."""
    for name, tensor in tensors.items():
        with np.errstate(over="ignore"):
            if not finite(tensor if tensor.itemsize <= 4 else tensor.astype(np.float32)):
                raise ValueError(f"tensor {short(name)} holds a NaN or an infinity")


def _check_scaled(module: str, theta: Mapping[str, np.ndarray], config: Method) -> None:
    """Refuses values that are beyond float32 once they are scaled."""
    scaling = getattr(config, "scaling", 1.0)
    limit = float(np.finfo(np.float32).max) / max(scaling, 1.0)
    for leaf, array in theta.items():
        if array.size and float(np.abs(array).max()) > limit:
            raise ValueError(f"{leaf} of module {short(module)} is an infinity once scaling={scaling:g} multiplies it")


def _thetas(
    tensors: Mapping[str, np.ndarray], row: PeftType, config: Method
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Thetas by module, and the tensors of saved modules."""
    patterns, leaves = row.patterns(), config.leaves()
    parts: dict[str, dict[str, dict[int | None, np.ndarray]]] = {}
    kept = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise ValueError(f"tensor {short(name)} does not begin with {PREFIX!r}, as every tensor of an adapter does")
        own = name.removeprefix(PREFIX)
        found = next(((leaf, match) for leaf, one in patterns.items() if (match := one.fullmatch(own))), None)
        if found is None:
            if re.search(r"(^|\.)(peanut|lora|nonlinear_lora)_", own):
                names = ", ".join(row.tensors.values()) or "none"
                raise ValueError(f"tensor {short(name)} is not one of a {row.name} adapter: {names}")
            kept[own] = tensor
            continue
        leaf, match = found
        number = _number(match["i"]) if "i" in match.groupdict() else None
        if leaf in leaves and tensor.ndim != len(leaves[leaf].axes) - (number is not None):
            raise ValueError(f"tensor {short(name)} of shape {short(tensor.shape)} is not one of a {row.name} adapter")
        module = parts.setdefault(match["module"], {}).setdefault(leaf, {})
        if number in module:
            raise ValueError(f"tensor {short(name)} is there twice, under two spellings of its number")
        module[number] = tensor.T
    return {module: _theta(module, theta) for module, theta in parts.items()}, kept


def _theta(module: str, parts: Mapping[str, Mapping[int | None, np.ndarray]]) -> dict[str, np.ndarray]:
    """One module's leaves in float32, the numbered ones stacked."""
    theta = {}
    for leaf, arrays in parts.items():
        numbers = sorted(number for number in arrays if number is not None)
        if None not in arrays and numbers != list(range(len(arrays))):
            raise ValueError(f"module {short(module)} has the {leaf} {short(numbers)}, one of them is missing")
        if len({array.shape for array in arrays.values()}) > 1:
            raise ValueError(f"module {short(module)} has {leaf} of different shapes")
        single = {number: np.asarray(array, np.float32) for number, array in arrays.items()}
        theta[leaf] = single[None] if None in single else np.stack([single[i] for i in numbers])
    return theta


def _number(digits: str) -> int:
    """The number of an encoder or decoder."""
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an adapter has no {short(digits)} encoders")
    return int(digits)


def _check_shapes(
    thetas: Mapping[str, Mapping[str, np.ndarray]], config: Method, fields: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Refuses thetas that are not the config's; the own fields of modules that LoRA's patterns single out."""
    if not thetas and config.ADAPTS_KERNELS:
        raise ValueError("no adapter tensors in it")
    singled = own_fields(list(thetas), config, fields)
    for module, theta in thetas.items():
        one = dataclasses.replace(config, **singled.get(module, {}))
        leaves = one.leaves()
        if theta.keys() != leaves.keys():
            odd = sorted(theta.keys() ^ leaves.keys())
            raise ValueError(f"module {short(module)}: {odd[0]} is {'missing' if odd[0] in leaves else 'not expected'}")
        for leaf, shape in one.shapes(*sides(one, theta)).items():
            if theta[leaf].shape != shape:
                words = dict.fromkeys(word for part in leaves.values() for word in part.axes if hasattr(one, word))
                raise ValueError(
                    f"module {short(module)}: {leaf} is {theta[leaf].shape[::-1]} as stored, expected {shape[::-1]} "
                    f"for {', '.join(f'{word}={getattr(one, word)}' for word in words)}"
                )
    return singled


def sides(config: Method, theta: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """(d_in, d_out) of the kernel that a theta is for, as the axes of its arrays say; 0 for a side that none has."""
    found: dict[str, int] = {}
    for name, leaf in config.leaves().items():
        if name in theta and theta[name].ndim == len(leaf.axes):
            for word, size in zip(leaf.axes, theta[name].shape, strict=True):
                found.setdefault(word, size)
    return found.get("in", 0), found.get("out", 0)


def _fingerprint(metadata: Mapping[str, str]) -> dict[str, str]:
    what = "the base fingerprint in its metadata"
    found = parse_json(metadata.get(FINGERPRINT_KEY, "{}"), what)
    if not TEXT_TO_TEXT.fits(found):
        raise ValueError(f"{what} must map module names to digests, got {short(found)}")
    return found


def label_count(tensors: Mapping[str, np.ndarray]) -> int | None:
    """How many labels a saved classification head (torch tensor name -> array) has; None where there is no head."""
    rows = [array.shape[0] for name, array in tensors.items() if array.ndim and name.endswith(_LOGITS)]
    return rows[0] if rows else None
