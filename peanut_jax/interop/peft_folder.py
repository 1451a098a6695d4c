"""HF PEFT's adapter directory (`adapter_config.json`, `adapter_model.safetensors`), read and written without torch."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peanut_jax.files.atomic import refuse_filled, replacing_entries, write_text
from peanut_jax.files.hub import local_folder, read_json
from peanut_jax.files.safetensors import finite, read_tensors, write_tensors
from peanut_jax.interop.peft_types import PeftType, type_named, type_of
from peanut_jax.methods.base import TASK_HEADS, Method

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT_KEY = "peanut_jax.base_fingerprint"
DTYPE_KEY = "peanut_jax.base_dtype"

# Fields of PEFT 0.21.2's configs that say how a base is found or training starts, and nothing about the function.
_BOOKKEEPING = {
    "auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "runtime_config",
}  # fmt: skip
_LORA_BOOKKEEPING = {
    "megatron_config", "megatron_core", "qalora_group_size", "fan_in_fan_out", "ensure_weight_tying", "eva_config",
    # Read by _lora_scaling, _own_fields and config_of.
    "init_lora_weights", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
}  # fmt: skip
# Fields of ours that say how a Flax tree is read, which the shapes of an adapter's tensors tell too.
_NOT_IN_FILES = {"kernel_axes"}
# The tensors of HF's heads that have a row a label.
_LOGITS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
# LoRA initialisations that leave the base's weights as they are; the others train on another base than the one on disk.
_PLAIN_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


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
    text = json.dumps(_fields(adapter.config, row), indent=2, sort_keys=True) + "\n"
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
    fields = read_json(path)
    try:
        config = config_of(fields)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    try:
        if broken := [name for name, tensor in tensors.items() if not finite(tensor)]:
            raise ValueError(f"tensor {broken[0]!r} holds a NaN or an infinity")
        thetas, kept = _thetas(tensors, type_named(fields), config)
        own_fields = _check_shapes(thetas, config, fields)
        prints = _fingerprint(metadata)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}") from error
    dtype = metadata.get(DTYPE_KEY)
    if dtype not in (None, "float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"{folder / WEIGHTS_FILE}: {DTYPE_KEY} is {dtype!r}, no floating dtype")
    return ModuleAdapters(config, thetas, kept, prints, dtype, own_fields)


def config_of(fields: Mapping[str, Any]) -> Method:
    """The config that the fields of an `adapter_config.json` mean.

    Raises:
        ValueError: another peft_type, an unknown field that is set, a bad value.
    """
    row = type_named(fields)
    own = {field.name for field in dataclasses.fields(row.method)} - _NOT_IN_FILES
    given = {name: value for name, value in fields.items() if name in own}
    _check_known(fields, own | _BOOKKEEPING | row.marks.keys() | (_LORA_BOOKKEEPING if row.is_lora else set()))
    if row.is_lora:
        if fields.get("init_lora_weights") not in _PLAIN_LORA_INITS:
            raise ValueError(
                f"init_lora_weights={fields['init_lora_weights']!r} trains on a changed base; convert the adapter in "
                "PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        given["dropout"] = fields.get("lora_dropout", given.get("dropout", 0.0))
        given["scaling"] = _lora_scaling(fields, fields.get("r"), fields.get("lora_alpha", 8))
    nullable = {field.name for field in dataclasses.fields(row.method) if field.default is None}
    given = {name: value for name, value in given.items() if value not in (None, []) or name not in nullable}
    config = row.method(**{**given, **row.fixed})
    heads = TASK_HEADS.get(config.task_type or "", ())  # which PEFT writes among the saved modules
    named = tuple(name for name in config.modules_to_save or () if name not in heads)
    return dataclasses.replace(config, modules_to_save=named or None)


def _check_known(fields: Mapping[str, Any], known: set[str]) -> None:
    for name, value in fields.items():
        if name not in known and value not in (None, False, [], {}, "none"):
            raise ValueError(f"{name}={value!r} is not supported: the adapter would be another function without it")


def _fields(config: Method, row: PeftType) -> dict[str, Any]:
    """The fields of `adapter_config.json`."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    fields |= {"peft_type": row.name, "inference_mode": True, "auto_mapping": None, "revision": None}
    for name in (*row.fixed, *_NOT_IN_FILES):
        del fields[name]
    dropout = fields.pop("dropout")
    if row.is_lora:
        alpha = fields["r"] * fields.pop("scaling")
        fields |= {
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            **row.marks,
        }
    elif dropout:
        fields["dropout"] = dropout
    return fields


def _lora_scaling(fields: Mapping[str, Any], r: Any, alpha: Any) -> float:
    for name, value in (("r", r), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return alpha / r**0.5 if fields.get("use_rslora") else alpha / r


def _thetas(
    tensors: Mapping[str, np.ndarray], row: PeftType, config: Method
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Thetas by module, and the tensors of saved modules."""
    patterns, leaves = row.patterns(), config.leaves()
    parts: dict[str, dict[str, dict[int | None, np.ndarray]]] = {}
    kept = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise ValueError(f"tensor {name!r} does not begin with {PREFIX!r}, as every tensor of an adapter does")
        short = name.removeprefix(PREFIX)
        found = next(((leaf, match) for leaf, one in patterns.items() if (match := one.fullmatch(short))), None)
        if found is None:
            if re.search(r"(^|\.)(peanut|lora|nonlinear_lora)_", short):
                names = ", ".join(row.tensors.values()) or "none"
                raise ValueError(f"tensor {name!r} is not one of a {row.name} adapter: {names}")
            kept[short] = tensor
            continue
        leaf, match = found
        number = int(match["i"]) if "i" in match.groupdict() else None
        if leaf in leaves and tensor.ndim != len(leaves[leaf].axes) - (number is not None):
            raise ValueError(f"tensor {name!r} of shape {tensor.shape} is not one of a {row.name} adapter")
        module = parts.setdefault(match["module"], {}).setdefault(leaf, {})
        if number in module:
            raise ValueError(f"tensor {name!r} is there twice, under two spellings of its number")
        module[number] = tensor.T
    return {module: _theta(module, theta) for module, theta in parts.items()}, kept


def _theta(module: str, parts: Mapping[str, Mapping[int | None, np.ndarray]]) -> dict[str, np.ndarray]:
    theta = {}
    for leaf, arrays in parts.items():
        if None in arrays:
            theta[leaf] = np.asarray(arrays[None], np.float32)
            continue
        numbers = sorted(number for number in arrays if number is not None)
        if numbers != list(range(len(arrays))):
            raise ValueError(f"module {module!r} has the {leaf} {numbers}, one of them is missing")
        if len({array.shape for array in arrays.values()}) > 1:
            raise ValueError(f"module {module!r} has {leaf} of different shapes")
        theta[leaf] = np.stack([np.asarray(arrays[i], np.float32) for i in numbers])
    return theta


def _check_shapes(
    thetas: Mapping[str, Mapping[str, np.ndarray]], config: Method, fields: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Refuses thetas that are not the config's; the own fields of modules that LoRA's patterns single out."""
    if not thetas and config.ADAPTS_KERNELS:
        raise ValueError("no adapter tensors in it")
    own_fields = {}
    for module, theta in thetas.items():
        own = _own_fields(module, config, fields)
        if own:
            own_fields[module] = own
        one = dataclasses.replace(config, **own)
        leaves = one.leaves()
        if theta.keys() != leaves.keys():
            odd = sorted(theta.keys() ^ leaves.keys())
            raise ValueError(f"module {module!r}: {odd[0]} is {'missing' if odd[0] in leaves else 'not expected'}")
        for leaf, shape in one.shapes(*sides(one, theta)).items():
            if theta[leaf].shape != shape:
                words = dict.fromkeys(word for part in leaves.values() for word in part.axes if hasattr(one, word))
                raise ValueError(
                    f"module {module!r}: {leaf} is {theta[leaf].shape[::-1]} as stored, expected {shape[::-1]} "
                    f"for {', '.join(f'{word}={getattr(one, word)}' for word in words)}"
                )
    return own_fields


def sides(config: Method, theta: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """(d_in, d_out) of the kernel that a theta is for, as the axes of its arrays say; 0 for a side that none has."""
    found: dict[str, int] = {}
    for name, leaf in config.leaves().items():
        if name in theta and theta[name].ndim == len(leaf.axes):
            for word, size in zip(leaf.axes, theta[name].shape, strict=True):
                found.setdefault(word, size)
    return found.get("in", 0), found.get("out", 0)


def _own_fields(module: str, config: Method, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rank and scaling of a module, where LoRA's patterns make them other than the config's."""
    if "lora_alpha" not in fields:
        return {}
    default = {"r": getattr(config, "r", None), "scaling": getattr(config, "scaling", None)}
    r = _pattern(fields.get("rank_pattern"), module, default["r"])
    alpha = _pattern(fields.get("alpha_pattern"), module, fields["lora_alpha"])
    own = {"r": r, "scaling": _lora_scaling(fields, r, alpha)}
    return own if own != default else {}


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT reads rank_pattern."""
    try:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    except (AttributeError, re.error) as error:
        raise ValueError(f"rank_pattern and alpha_pattern must map regular expressions, got {patterns!r}") from error
    return default


def _fingerprint(metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        found = json.loads(metadata.get(FINGERPRINT_KEY, "{}"))
    except ValueError as error:
        raise ValueError(f"the base fingerprint in its metadata is not JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("the base fingerprint in its metadata must map module names to digests")
    return found


def label_count(tensors: Mapping[str, np.ndarray]) -> int | None:
    """How many labels a saved classification head (torch tensor name -> array) has; None where there is no head."""
    rows = [array.shape[0] for name, array in tensors.items() if name.endswith(_LOGITS)]
    return rows[0] if rows else None
