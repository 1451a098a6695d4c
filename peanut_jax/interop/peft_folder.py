"""HF PEFT's adapter directory (`adapter_config.json`, `adapter_model.safetensors`), read and written without torch."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peanut_jax.files.atomic import write_text
from peanut_jax.files.hub import local_folder, read_json
from peanut_jax.files.safetensors import finite, read_tensors, write_tensors
from peanut_jax.methods import tweaker
from peanut_jax.methods.base import TASK_HEADS, Config, LoraConfig, PeanutConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT_KEY = "peanut_jax.base_fingerprint"
DTYPE_KEY = "peanut_jax.base_dtype"

# peft_type -> the config class and the fields that the type itself fixes. HF PEFT knows the first two and refuses the
# others, which it would compute as another function.
TYPES: dict[str, tuple[type[Config], dict[str, str]]] = {
    "PEANUT": (PeanutConfig, {"orientation": "output"}),
    "LORA": (LoraConfig, {"act_fn": "linear"}),
    "PEANUT_INPUT": (PeanutConfig, {"orientation": "input"}),
    "NONLINEAR_LORA": (LoraConfig, {}),
}
# Leaf of theta -> the parameter's name; those of a list carry the index of their first axis.
_PEANUT_LEAVES = {"a": "peanut_A", "b": "peanut_B", "encoders": "peanut_encoders", "decoders": "peanut_decoders"}
LEAVES = {
    "PEANUT": _PEANUT_LEAVES,
    "PEANUT_INPUT": _PEANUT_LEAVES,
    "LORA": {"a": "lora_A", "b": "lora_B"},
    "NONLINEAR_LORA": {"a": "nonlinear_lora_A", "b": "nonlinear_lora_B"},
}
_LISTS = ("encoders", "decoders")

# Fields of PEFT 0.21.2's configs that say how a base is found or training starts, and nothing about the function.
_BOOKKEEPING = {
    "auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "runtime_config",
}  # fmt: skip
_LORA_BOOKKEEPING = {
    "megatron_config", "megatron_core", "qalora_group_size", "fan_in_fan_out", "ensure_weight_tying", "eva_config",
    # Read by _lora_scaling, _check_shapes and config_of.
    "init_lora_weights", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
}  # fmt: skip
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
        fingerprint: Of the base's kernels; empty where the writer made none.
        base_dtype: Of the kernels in training, in which the factors are computed; None for HF PEFT's adapters.
        scalings: Modules whose scaling is not `config.scaling`, and ranks other than `config.r` (LoRA's patterns).
    """

    config: Config
    thetas: dict[str, dict[str, np.ndarray]]
    saved: dict[str, np.ndarray]
    fingerprint: dict[str, str] = dataclasses.field(default_factory=dict)
    base_dtype: str | None = None
    scalings: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def factor_dtype(self) -> str:
        """HF PEFT computes in theta's dtype, whatever the kernel's (peft 0.21.2, `tuners/peanut/layer.py`)."""
        return self.base_dtype or "float32"

    def module_config(self, module: str) -> Config:
        """The config of one module, with its own rank and scaling."""
        r, scaling = self.thetas[module]["a"].shape[-1], self.scalings.get(module, self.config.scaling)
        return dataclasses.replace(self.config, r=r, scaling=scaling)


def write(folder: str | Path, adapter: ModuleAdapters) -> None:
    """Writes the two files; each appears under its name once it is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    peft_type = type_of(adapter.config)
    tensors: dict[str, np.ndarray] = {}
    for module, theta in adapter.thetas.items():
        for leaf, name in LEAVES[peft_type].items():
            if leaf in _LISTS:
                layers = {f"{name}.{i}": matrix for i, matrix in enumerate(theta.get(leaf, ()))}
            else:
                layers = {name: theta[leaf]}
            tensors |= {f"{PREFIX}{module}.{key}.weight": matrix.T for key, matrix in layers.items()}
    tensors |= {PREFIX + name: array for name, array in adapter.saved.items()}
    metadata = {FINGERPRINT_KEY: json.dumps(adapter.fingerprint)} if adapter.fingerprint else {}
    metadata |= {DTYPE_KEY: adapter.base_dtype} if adapter.base_dtype else {}
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # so that a crash leaves no old config beside new weights
    write_tensors(folder / WEIGHTS_FILE, tensors, metadata)
    write_text(folder / CONFIG_FILE, json.dumps(_fields(adapter.config, peft_type), indent=2, sort_keys=True) + "\n")


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
        thetas, kept = _thetas(tensors, fields["peft_type"])
        scalings = _check_shapes(thetas, config, fields)
        prints = _fingerprint(metadata)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}") from error
    dtype = metadata.get(DTYPE_KEY)
    if dtype not in (None, "float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"{folder / WEIGHTS_FILE}: {DTYPE_KEY} is {dtype!r}, no floating dtype")
    return ModuleAdapters(config, thetas, kept, prints, dtype, scalings)


def type_of(config: Config) -> str:
    """The peft_type of a config."""
    for peft_type, (kind, fixed) in TYPES.items():
        if isinstance(config, kind) and all(getattr(config, name) == value for name, value in fixed.items()):
            return peft_type
    raise AssertionError(f"no peft_type for {config}")


def config_of(fields: Mapping[str, Any]) -> Config:
    """The config that the fields of an `adapter_config.json` mean.

    Raises:
        ValueError: another peft_type, an unknown field that is set, a bad value.
    """
    peft_type = fields.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in TYPES:
        raise ValueError(f"peft_type must be one of {', '.join(TYPES)}, got {peft_type!r}")
    kind, fixed = TYPES[peft_type]
    own = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in fields.items() if name in own}
    known = own | _BOOKKEEPING | (_LORA_BOOKKEEPING if peft_type == "LORA" else set())
    unknown = {
        name: value
        for name, value in fields.items()
        if name not in known and value not in (None, False, [], {}, "none")
    }
    if unknown:
        name, value = next(iter(unknown.items()))
        raise ValueError(f"{name}={value!r} is not supported: the adapter would be another function without it")
    if kind is LoraConfig:
        if fields.get("init_lora_weights") not in _PLAIN_LORA_INITS:
            raise ValueError(
                f"init_lora_weights={fields['init_lora_weights']!r} trains on a changed base; convert the adapter in "
                "PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        given["dropout"] = fields.get("lora_dropout", given.get("dropout", 0.0))
        if peft_type == "LORA":
            given["scaling"] = _lora_scaling(fields, fields.get("r"), fields.get("lora_alpha", 8))
    nullable = {field.name for field in dataclasses.fields(kind) if field.default is None}
    given = {name: value for name, value in given.items() if value not in (None, []) or name not in nullable}
    config = kind(**{**given, **fixed})
    heads = TASK_HEADS.get(config.task_type or "", ())  # which PEFT writes among the saved modules
    named = tuple(name for name in config.modules_to_save or () if name not in heads)
    return dataclasses.replace(config, modules_to_save=named or None)


def _fields(config: Config, peft_type: str) -> dict[str, Any]:
    """The fields of `adapter_config.json`."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    fields |= {"peft_type": peft_type, "inference_mode": True, "auto_mapping": None, "revision": None}
    for name in TYPES[peft_type][1]:
        del fields[name]
    dropout = fields.pop("dropout")
    if peft_type == "LORA":
        alpha = fields["r"] * fields.pop("scaling")
        fields |= {
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
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
    tensors: Mapping[str, np.ndarray], peft_type: str
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Thetas by module, and the tensors of saved modules."""
    leaves = {name: leaf for leaf, name in LEAVES[peft_type].items()}
    key = re.compile(rf"(?P<module>.+)\.(?P<name>{'|'.join(leaves)})(?:\.(?P<index>\d+))?\.weight")
    parts: dict[str, dict[str, dict[int | None, np.ndarray]]] = {}
    kept = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise ValueError(f"tensor {name!r} does not begin with {PREFIX!r}, as every tensor of an adapter does")
        short = name.removeprefix(PREFIX)
        match = key.fullmatch(short)
        if match is None:
            if re.search(r"(^|\.)(peanut|lora|nonlinear_lora)_", short):
                raise ValueError(f"tensor {name!r} is not one of a {peft_type} adapter: {', '.join(leaves)}")
            kept[short] = tensor
            continue
        leaf, index = leaves[match["name"]], match["index"]
        if (index is not None) != (leaf in _LISTS) or tensor.ndim != 2:
            raise ValueError(f"tensor {name!r} of shape {tensor.shape} is not one of a {peft_type} adapter")
        module = parts.setdefault(match["module"], {}).setdefault(leaf, {})
        number = None if index is None else int(index)
        if number in module:
            raise ValueError(f"tensor {name!r} is there twice, under two spellings of its number")
        module[number] = tensor.T
    return {module: _theta(module, theta) for module, theta in parts.items()}, kept


def _theta(module: str, parts: Mapping[str, Mapping[int | None, np.ndarray]]) -> dict[str, np.ndarray]:
    theta = {}
    for leaf, matrices in parts.items():
        if leaf not in _LISTS:
            theta[leaf] = np.asarray(matrices[None], np.float32)
            continue
        if sorted(matrices, key=int) != list(range(len(matrices))):  # type: ignore[arg-type]
            raise ValueError(f"module {module!r} has the {leaf} {sorted(matrices, key=int)}, one of them is missing")  # type: ignore[arg-type]
        if len({matrix.shape for matrix in matrices.values()}) > 1:
            raise ValueError(f"module {module!r} has {leaf} of different shapes")
        theta[leaf] = np.stack([np.asarray(matrices[i], np.float32) for i in range(len(matrices))])
    return theta


def _check_shapes(
    thetas: Mapping[str, Mapping[str, np.ndarray]], config: Config, fields: Mapping[str, Any]
) -> dict[str, float]:
    """Refuses thetas that are not the config's; the scalings of modules that LoRA's patterns single out."""
    if not thetas:
        raise ValueError("no adapter tensors in it")
    depth = config.depth if isinstance(config, PeanutConfig) else 0
    scalings = {}
    for module, theta in thetas.items():
        r, alpha = config.r, None
        if isinstance(config, LoraConfig):
            r = _pattern(fields.get("rank_pattern"), module, config.r)
            alpha = _pattern(fields.get("alpha_pattern"), module, fields.get("lora_alpha", 8))
        wanted = {"a", "b"} | ({"encoders", "decoders"} if depth else set())
        if theta.keys() != wanted:
            odd = sorted(theta.keys() ^ wanted)
            raise ValueError(f"module {module!r}: {odd[0]} is {'missing' if odd[0] in wanted else 'not expected'}")
        side = theta["a"].shape[0]
        if isinstance(config, PeanutConfig):
            expected = tweaker.shapes(side, side, r, depth, config.orientation)
        else:
            expected = tweaker.lora_shapes(side, theta["b"].shape[1], r)
        for leaf, shape in expected.items():
            if theta[leaf].shape != shape:
                raise ValueError(
                    f"module {module!r}: {leaf} is {theta[leaf].shape[::-1]} as stored, expected {shape[::-1]} "
                    f"for r={r}, depth={depth}"
                )
        if isinstance(config, LoraConfig) and "lora_alpha" in fields:
            scaling = _lora_scaling(fields, r, alpha)
            if r != config.r or scaling != config.scaling:
                scalings[module] = scaling
    return scalings


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
