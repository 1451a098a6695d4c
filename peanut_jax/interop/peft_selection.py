"""Which modules a config means, in HF PEFT's words and in ours.

The two differ in corners (layers of a regular expression, saved modules by the end of their name) and a scanned model
has one module where torch has one a layer. A config that goes out must make PEFT choose exactly the modules of the
adapter, and one that comes in must choose here those that PEFT meant.
"""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import PyTree

from peanut_jax.base import torch_names as names
from peanut_jax.base.kernels import Leaf, find, flatten, module_of
from peanut_jax.base.select import saved_modules, select
from peanut_jax.interop.peft_folder import CONFIG_FILE, WEIGHTS_FILE, ModuleAdapters
from peanut_jax.messages import short
from peanut_jax.methods.base import ALL_LINEAR, LAYERS_FORM, TASK_HEADS, Method
from peanut_jax.patterns import matching

# Characters of a name for which the closest is looked up.
_COMPARED = 200


def _selected(config: Method, modules: Iterable[str], saved_modules: Collection[str]) -> set[str]:
    """The modules that HF PEFT would adapt (peft 0.21.2, `check_target_module_exists` in `tuners/tuners_utils.py`)."""
    assert config.target_modules is not None
    everywhere = list(modules)
    found = _listed("target_modules", config.target_modules, everywhere)
    if config.exclude_modules is not None:
        found -= _listed("exclude_modules", config.exclude_modules, everywhere)
    found = {module for module in found if not any(f".{name}." in f".{module}." for name in saved_modules)}
    if config.layers_to_transform is None or isinstance(config.target_modules, str):
        return found
    layers = config.layers_to_transform
    wanted = (layers,) if isinstance(layers, int) else layers
    patterns = config.layers_pattern or r"[^.]*"
    # Without a pattern PEFT asks for a dot before the module that holds the layers.
    form = r".*?\.(?:{})\.(?P<layer>\d+)\..*" if config.layers_pattern is None else LAYERS_FORM
    numbers = matching("layers_pattern", (patterns,) if isinstance(patterns, str) else patterns, sorted(found), form)
    return {module for module, (_, groups) in numbers.items() if int(groups["layer"]) in wanted}


def _listed(field: str, names: str | Sequence[str], modules: Sequence[str]) -> set[str]:
    """The modules that a list or a regular expression of PEFT's selects."""
    if isinstance(names, str):
        return set(matching(field, [names], modules))
    ends = tuple(f".{name}" for name in names)
    return {module for module in modules if f".{module}".endswith(ends)}


def _heads(config: Method) -> tuple[str, ...]:
    return (*(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type or "", ()))


def torch_selection(config: Method, thetas: Mapping[str, Any], everywhere: Collection[str]) -> Method:
    """`config` with fields by which PEFT selects exactly the modules of `thetas`: its own where they do."""
    if not config.ADAPTS_KERNELS:
        return config
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


def flax_selection(config: Method, rows: Mapping[str, list[int] | None], params: PyTree) -> Method:
    """`config` with fields that select exactly `rows` (kernel path -> rows of its stack) in `params`."""
    try:
        targets = select(params, config)
    except (ValueError, NotImplementedError):  # names that hold in torch's numbering alone
        targets = {}
    if {path: names.rows_of(target) for path, target in targets.items()} == dict(rows):
        return config
    kernels = find(flatten(params), dict(config.kernel_axes or ()))
    stacks = {path: layers for path, layers in rows.items() if layers is not None}
    partial = {tuple(layers) for path, layers in stacks.items() if layers != list(range(kernels[path].stack[0]))}
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


def _saved_by_peft(config: Method, modules: Iterable[str]) -> set[str]:
    """The modules that HF PEFT would save: by the end of the name, so that "norm" is "input_layernorm" too.

    References:
        peft 0.21.2, `_set_trainable` in `utils/other.py`.
    """
    return {module for module in modules if module.endswith(_heads(config))}


def torch_saving(config: Method, flat: Mapping[str, Leaf], modules: Mapping[str, str]) -> Method:
    """`config` with modules_to_save by which PEFT saves the same modules; `modules` are torch's -> Flax's."""
    saved_here = saved_modules(flat, config)
    wanted = {module for module, here in modules.items() if here in saved_here}
    if _saved_by_peft(config, modules) == wanted:
        return config
    by_name = dataclasses.replace(config, modules_to_save=tuple(sorted(wanted)))
    if more := sorted(_saved_by_peft(by_name, modules) - wanted):
        raise ValueError(
            f"modules_to_save={short(config.modules_to_save)} cannot be written for HF PEFT, which goes by the end of "
            f"a name and would save {more[0]!r} too; give these modules other names, or save {more[0]!r} as well"
        )
    return by_name


def flax_saving(config: Method, flat: Mapping[str, Leaf], modules: Mapping[str, str]) -> Method:
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
        near = difflib.get_close_matches(extra[0][:_COMPARED], list(everywhere), n=1, cutoff=0.0)
        raise ValueError(
            f"the adapter holds {len(extra)} modules that are no dense kernel of this model, first {short(extra[0])}"
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
