"""HF PEFT's adapter directories: `adapter_config.json` and `adapter_model.safetensors`, read and written without torch.

Between a directory and our adapters stands `ModuleAdapters`: one theta for each torch module, which is what the files
hold. `save_adapter` and `load_adapter` go all the way; conversions that need no Flax model (merging a checkpoint,
exporting to LoRA) stop there.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from peanut_jax.adapters import Adapters, check, saved
from peanut_jax.config import ALL_LINEAR, TASK_HEADS, Config, LoraConfig, PeanutConfig
from peanut_jax.interop import fingerprint, names
from peanut_jax.interop.files import read_tensors, write_tensors, write_text
from peanut_jax.kernels import Axes, Kernel, Leaf, find, flatten, module_of
from peanut_jax.models.hf_files import local_folder, read_json
from peanut_jax.targets import Target, saved_modules, saved_paths, select

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT_KEY = "peanut_jax.base_fingerprint"

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
    "lora_ga_config",
    # Read by _lora_scaling, _check_shapes and config_of.
    "init_lora_weights", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
}  # fmt: skip
# The tensors of HF's heads that have a row a label.
_LOGITS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
# LoRA initialisations that leave the base's weights as they are; the others train on another base than the one on disk.
_PLAIN_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")


@dataclasses.dataclass(frozen=True)
class ModuleAdapters:
    """An adapter as its files hold it.

    Attributes:
        config: Its fields; target_modules and its kin select among torch's module names.
        thetas: Torch module name -> theta of that one kernel.
        saved: Torch tensor name -> array, for the saved modules.
        fingerprint: Of the base's kernels; empty where the writer made none.
        scalings: Modules whose scaling is not `config.scaling`, and ranks other than `config.r` (LoRA's patterns).
    """

    config: Config
    thetas: dict[str, dict[str, np.ndarray]]
    saved: dict[str, np.ndarray]
    fingerprint: dict[str, str] = dataclasses.field(default_factory=dict)
    scalings: dict[str, float] = dataclasses.field(default_factory=dict)

    def module_config(self, module: str) -> Config:
        """The config of one module, with its own rank and scaling."""
        r, scaling = self.thetas[module]["a"].shape[-1], self.scalings.get(module, self.config.scaling)
        return dataclasses.replace(self.config, r=r, scaling=scaling)


def save_adapter(folder: str | Path, adapters: Adapters, config: Config, params: PyTree) -> None:
    """Writes an adapter as HF PEFT's directory: `adapter_config.json` and `adapter_model.safetensors`.

    `peft.PeftModel.from_pretrained` loads what PEFT has a function for: PEANuT of the output orientation with one of
    transformers' activations, and LoRA. It refuses the input orientation and nonlinear LoRA by their peft_type, `sin`
    by its act_fn; `to_lora` is the road to torch for those. `dropout` is kept for `load_adapter`, and PEFT ignores it.

    A fingerprint of the base's kernels is written with a PEANuT, since its update is a function of them.

    Args:
        folder: Made where it does not exist; an adapter in it is replaced.
        adapters: From `init` or training. Layers of an `nn.scan` stack become modules of their own.
        config: The adapter's.
        params: The frozen base that it was trained on.

    Raises:
        ValueError: an adapter that does not belong to config and params.
        NotImplementedError: a stack of layers that has no name in torch.
    """
    targets = check(adapters, params, config)
    write(folder, from_tree(adapters, config, params, targets))


def load_adapter(
    folder: str | Path, params: PyTree, *, axes: Axes | None = None, check_base: bool = True
) -> tuple[Adapters, Config]:
    """Reads the directory that `save_adapter` or HF PEFT wrote, for a base in any layout (scanned or not).

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`; or a hub name.
        params: The frozen base, with the head that the adapter saved where it saved one.
        axes: As for `init`.
        check_base: Compare the base with the fingerprint that was saved. False for a base that differs by design, such
            as one that was read as float16.

    Returns:
        The adapters, theta float32 and saved modules in their own dtype, and the config.

    Raises:
        FileNotFoundError: no such folder or file. Pickle files are not read.
        ValueError: a file, a config or tensors that cannot be read or do not fit `params`; another base.
    """
    loaded = read(folder)
    adapters, config = to_tree(loaded, params, axes)
    if check_base and isinstance(config, PeanutConfig):
        fingerprint.note_absence(loaded.fingerprint, str(folder))
        if loaded.fingerprint:
            found = fingerprint.of_targets(params, check(adapters, params, config))
            fingerprint.check(found, loaded.fingerprint, str(folder), "these params")
    return adapters, config


def label_count(tensors: Mapping[str, np.ndarray]) -> int | None:
    """How many labels a saved classification head (torch tensor name -> array) has; None where there is no head."""
    rows = [array.shape[0] for name, array in tensors.items() if name.endswith(_LOGITS)]
    return rows[0] if rows else None


# ---- between the adapters of a Flax model and those of torch modules


def from_tree(adapters: Adapters, config: Config, params: PyTree, targets: Mapping[str, Target]) -> ModuleAdapters:
    """Our adapters as torch's modules, with the base's fingerprint."""
    found = by_module(adapters, config, {path: names.rows_of(target) for path, target in targets.items()})
    flat = flatten(params)
    kernels = find(flat) | {path: target.kernel for path, target in targets.items()}
    config = _torch_selection(config, found.thetas, module_slots(kernels))
    config = _torch_saving(config, flat, names.every_module(flat, _stacks(kernels)))
    prints = fingerprint.of_targets(params, targets) if isinstance(config, PeanutConfig) else {}
    return dataclasses.replace(found, config=config, fingerprint=prints)


def by_module(adapters: Adapters, config: Config, rows: Mapping[str, Sequence[int] | None]) -> ModuleAdapters:
    """Thetas by torch module and saved tensors by torch name; `rows` are those of each kernel's stack."""
    thetas = {}
    for path, theta in adapters.items():
        if not isinstance(theta, Mapping):
            continue
        host = {name: np.asarray(jax.device_get(leaf)) for name, leaf in theta.items()}
        layers = names.modules(path, rows[path])
        for i, module in enumerate(layers):
            thetas[module] = {name: leaf if rows[path] is None else leaf[i] for name, leaf in host.items()}
    scanned = _containers(path for path, stacked in rows.items() if stacked is not None)
    return ModuleAdapters(config, thetas, names.to_torch(saved(adapters), scanned))


def to_tree(loaded: ModuleAdapters, params: PyTree, axes: Axes | None = None) -> tuple[Adapters, Config]:
    """Torch's modules as adapters of `params`, and the config that selects them there.

    Raises:
        ValueError: modules that the model does not have, or that the config adapts and the files lack.
    """
    if loaded.scalings:
        raise ValueError(
            f"this LoRA has ranks or scalings of its own for some modules, such as {next(iter(loaded.scalings))!r}; "
            "from_lora reads it, as factors"
        )
    flat = flatten(params)
    kernels = find(flat, axes)
    everywhere = module_slots(kernels)
    check_modules(loaded, everywhere)
    here = {module: place for module, place in everywhere.items() if module in loaded.thetas}
    layers: dict[str, list[str]] = {}
    for module, (path, _) in here.items():
        layers.setdefault(path, []).append(module)
    rows: dict[str, list[int] | None] = {
        path: None if here[of[0]][1] is None else [row for module in of if (row := here[module][1]) is not None]
        for path, of in layers.items()
    }
    config = _flax_saving(loaded.config, flat, names.every_module(flat, _stacks(kernels)))
    config = _flax_selection(config, rows, params, axes)
    targets = select(params, config, axes)
    adapters: Adapters = {}
    for path in targets:
        parts = [loaded.thetas[module] for module in layers[path]]
        _check_alike(layers[path], parts)
        stacked = rows[path] is not None
        adapters[path] = {
            name: jnp.asarray(np.stack([part[name] for part in parts]) if stacked else parts[0][name])
            for name in parts[0]
        }
    wanted = {path: flat[path] for path in saved_paths(flat, config)}
    kept = names.from_torch(loaded.saved, wanted, _stacks(kernels))
    adapters |= {path: jnp.asarray(leaf) for path, leaf in kept.items()}
    check(adapters, params, config)
    return adapters, config


def module_slots(kernels: Mapping[str, Kernel]) -> names.Slots:
    """The torch modules of `kernels`, as `names.slots`; a stack that has no name in torch cannot be meant by a file."""
    named = [
        kernel
        for kernel in kernels.values()
        if not kernel.stack or (len(kernel.stack) == 1 and names.container(kernel.path) is not None)
    ]
    return names.slots(Target(kernel) for kernel in named)


def _stacks(kernels: Mapping[str, Kernel]) -> set[str]:
    """The containers of scanned layers."""
    return _containers(path for path, kernel in kernels.items() if kernel.stack)


def _containers(paths: Iterable[str]) -> set[str]:
    return {prefix for path in paths if (prefix := names.container(path)) is not None}


def _check_alike(modules: Sequence[str], thetas: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Refuses layers of one stack whose thetas have different shapes."""
    for module, theta in zip(modules, thetas, strict=True):
        for name, leaf in theta.items():
            if leaf.shape != thetas[0][name].shape:
                raise ValueError(
                    f"{name} is {leaf.shape} for {module!r} and {thetas[0][name].shape} for {modules[0]!r}, two layers "
                    "of one kernel; the adapter was trained on another base"
                )


# ---- which modules a config means, in PEFT's words


def _selected(config: Config, modules: Iterable[str], saved_modules: Collection[str]) -> set[str]:
    """The modules that HF PEFT would adapt (peft 0.21.2, `check_target_module_exists` in `tuners/tuners_utils.py`)."""

    def listed(field: str | Sequence[str], module: str) -> bool:
        if isinstance(field, str):
            return re.fullmatch(field, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in field)

    def layer(module: str) -> int | None:
        patterns = config.layers_pattern or r"[^.]*"
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            prefix = r".*?\." if config.layers_pattern is None else r"(?:^|.*?\.)"
            if match := re.match(rf"{prefix}{pattern}\.(\d+)\.", module):
                return int(match[1])
        return None

    def adapted(module: str) -> bool:
        assert config.target_modules is not None
        if config.exclude_modules is not None and listed(config.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved_modules):
            return False
        if not listed(config.target_modules, module):
            return False
        if config.layers_to_transform is None or isinstance(config.target_modules, str):
            return True
        layers = config.layers_to_transform
        return layer(module) in ((layers,) if isinstance(layers, int) else layers)

    return {module for module in modules if adapted(module)}


def _heads(config: Config) -> tuple[str, ...]:
    return (*(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type or "", ()))


def _torch_selection(config: Config, thetas: Mapping[str, Any], everywhere: Collection[str]) -> Config:
    """`config` with fields by which PEFT selects exactly the modules of `thetas`: its own where they do."""
    named = config.target_modules is not None and config.target_modules != ALL_LINEAR
    if named and _selected(config, everywhere, _heads(config)) == thetas.keys():
        return config
    last = tuple(sorted({module.rpartition(".")[2] for module in thetas}))
    plain = dataclasses.replace(
        config, target_modules=last, exclude_modules=None, layers_pattern=None, layers_to_transform=None
    )
    if _selected(plain, everywhere, _heads(config)) == thetas.keys():
        return plain
    return dataclasses.replace(plain, target_modules=tuple(thetas))


def _flax_selection(config: Config, rows: Mapping[str, list[int] | None], params: PyTree, axes: Axes | None) -> Config:
    """`config` with fields that select exactly `rows` (kernel path -> rows of its stack) in `params`."""
    try:
        targets = select(params, config, axes)
    except (ValueError, NotImplementedError):  # names that hold in torch's numbering alone
        targets = {}
    if {path: names.rows_of(target) for path, target in targets.items()} == dict(rows):
        return config
    flat = find(flatten(params), axes)
    stacks = {path: layers for path, layers in rows.items() if layers is not None}
    partial = {tuple(layers) for path, layers in stacks.items() if layers != list(range(flat[path].stack[0]))}
    if len(partial) > 1 or (partial and len(stacks) < len(rows)):
        raise ValueError(
            f"the adapter has other layers for one kernel than for another ({sorted(partial)[:2]}), which one "
            "layers_to_transform on a scanned model cannot say; load it into a model without nn.scan"
        )
    return dataclasses.replace(
        config,
        target_modules=tuple(module_of(path) for path in rows),
        exclude_modules=None,
        layers_pattern=None,
        layers_to_transform=partial.pop() if partial else None,
    )


def _saved_by_peft(config: Config, modules: Iterable[str]) -> set[str]:
    """The modules that HF PEFT would save: by the end of the name, so that "norm" is "input_layernorm" too (peft
    0.21.2,
    `_set_trainable` in `utils/other.py`)."""
    return {module for module in modules if module.endswith(_heads(config))}


def _torch_saving(config: Config, flat: Mapping[str, Leaf], modules: Mapping[str, str]) -> Config:
    """`config` with modules_to_save by which PEFT saves the same modules; `modules` are torch's -> Flax's."""
    saved_here = saved_modules(flat, config)
    wanted = {module for module, here in modules.items() if here in saved_here}
    if _saved_by_peft(config, modules) == wanted:
        return config
    by_name = dataclasses.replace(config, modules_to_save=tuple(sorted(wanted)))
    if more := sorted(_saved_by_peft(by_name, modules) - wanted):
        raise ValueError(
            f"modules_to_save={config.modules_to_save} cannot be written for HF PEFT, which goes by the end of a name "
            f"and would save {more[0]!r} too; give these modules other names, or save {more[0]!r} as well"
        )
    return by_name


def _flax_saving(config: Config, flat: Mapping[str, Leaf], modules: Mapping[str, str]) -> Config:
    """`config` with modules_to_save that name in `flat` what PEFT saved."""
    heads = TASK_HEADS.get(config.task_type or "", ())
    found = {modules[module] for module in _saved_by_peft(config, modules)}
    named = [name for name in config.modules_to_save or () if any(module.endswith(name) for module in modules)]
    config = dataclasses.replace(config, modules_to_save=tuple(named) or None)
    explicit = dataclasses.replace(config, modules_to_save=tuple(sorted(found - {*heads})) or None)
    try:
        return config if set(saved_modules(flat, config)) == found else explicit
    except ValueError:  # a name that is only the end of one
        return explicit


def check_modules(loaded: ModuleAdapters, everywhere: Collection[str]) -> None:
    """Refuses modules that the model does not have, and files without some that their config adapts."""
    extra = [module for module in loaded.thetas if module not in everywhere]
    if extra:
        near = difflib.get_close_matches(extra[0], list(everywhere), n=1, cutoff=0.0)
        raise ValueError(
            f"the adapter holds {len(extra)} modules that are no dense kernel of this model, first {extra[0]!r}"
            f"{f'; closest: {near[0]!r}' if near else ''}. Load the model and task that it was trained on"
        )
    config = loaded.config
    if config.target_modules is None or config.target_modules == ALL_LINEAR:
        return  # the files say which
    missing = sorted(_selected(config, everywhere, _heads(config)) - loaded.thetas.keys())
    if missing:
        raise ValueError(
            f"{CONFIG_FILE} adapts {len(missing)} modules of this model that {WEIGHTS_FILE} lacks, first {missing[0]!r}"
        )


# ---- the directory


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
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    try:
        thetas, kept = _thetas(tensors, fields["peft_type"])
        scalings = _check_shapes(thetas, config, fields)
        prints = _fingerprint(metadata)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}") from error
    return ModuleAdapters(config, thetas, kept, prints, scalings)


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
        expected: dict[str, tuple[int, ...]] = {"a": (theta["a"].shape[0], r), "b": (r, theta["b"].shape[1])}
        if isinstance(config, PeanutConfig):
            expected["b"] = (r, theta["a"].shape[0])
        if depth:
            expected |= dict.fromkeys(_LISTS, (depth, r, r))
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
