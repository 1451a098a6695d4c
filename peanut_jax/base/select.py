"""Which kernels an adapter reads and which modules it trains in full: HF PEFT's selection rules on Flax trees.

Names are matched against dotted module paths (`encoder.layer.0.attention.self.query`), which HF Flax models share with
their torch counterparts, so that target lists and regular expressions carry over.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from peanut_jax.architectures import default_targets, is_output_head
from peanut_jax.base.kernels import Kernel, Leaf, find, flatten, module_of
from peanut_jax.messages import short
from peanut_jax.methods.base import ALL_LINEAR, LAYERS_FORM, TASK_HEADS, AdapterConfig
from peanut_jax.patterns import matching

_KINDS = {"embedding": "Embed", "scale": "LayerNorm", "kernel": "Conv"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A kernel that is adapted, and on a layer stack the rows that are (None: all of them)."""

    kernel: Kernel
    rows: tuple[int, ...] | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of this target's theta."""
        return self.kernel.stack if self.rows is None else (len(self.rows), *self.kernel.stack[1:])

    def shape_of(self, stored: Leaf) -> jax.ShapeDtypeStruct:
        """What `matrix` would have: [*stack, d_in, d_out]."""
        return jax.ShapeDtypeStruct((*self.stack, self.kernel.d_in, self.kernel.d_out), stored.dtype)

    def matrix(self, stored: Leaf) -> Array:
        """The adapted rows of the stored kernel, as [*stack, d_in, d_out]."""
        return self._chosen(self.kernel.matrix(stored))

    def bias(self, flat: Mapping[str, Leaf]) -> Array | None:
        """The adapted rows of the module's bias, as [*stack, d_out]; None where it has none."""
        stored = flat.get(self.kernel.path.removesuffix("kernel") + "bias")
        return None if stored is None else self._chosen(stored.reshape(*self.kernel.stack, self.kernel.d_out))

    def _chosen(self, array: Array) -> Array:
        return array if self.rows is None else array[jnp.array(self.rows)]


def select(params: PyTree, config: AdapterConfig) -> dict[str, Target]:
    """The kernels that `config` adapts in `params`, by path, in the tree's order.

    Args:
        params: Frozen base parameters (arrays or `jax.ShapeDtypeStruct`s).
        config: See `AdapterConfig`.

    Raises:
        ValueError: a target, exclusion, layer or saved module that matches nothing; everything excluded; no default.
        NotImplementedError: a target that is not a dense kernel.

    References:
        `check_target_module_exists` in `peft/tuners/tuners_utils.py` of huggingface/peft 0.21.2. Ours differs in that
        an entry without a match is an error, and `layers_to_transform` also applies to regular expressions.
    """
    flat = flatten(params)
    if not config.ADAPTS_KERNELS:
        saved_modules(flat, config)
        return {}
    kernels = {kernel.module: kernel for kernel in find(flat, dict(config.kernel_axes or ())).values()}
    modules = _modules(flat)
    names = default_targets(kernels) if config.target_modules is None else config.target_modules
    if isinstance(names, str) and names.lower() == ALL_LINEAR:
        chosen = [module for module in kernels if not is_output_head(module)]
    else:
        chosen = _matching("target_modules", names, modules, kernels)
        for module in chosen:
            if module not in kernels:
                raise NotImplementedError(
                    f"target {module!r} is {_kind(module, flat)}; PEANuT adapts dense kernels "
                    "(nn.Dense, nn.DenseGeneral, FlaxConv1D)"
                )
    saved = saved_modules(flat, config)
    chosen = [module for module in chosen if not any(_within(module, name) for name in saved)]
    if config.exclude_modules is not None:
        excluded = set(_matching("exclude_modules", config.exclude_modules, chosen))
        chosen = [module for module in chosen if module not in excluded]
    if not chosen:
        raise ValueError(
            f"target_modules={short(names)} leaves no kernel once exclude_modules={short(config.exclude_modules)} and "
            f"modules_to_save={short(list(saved))} are taken out"
        )
    for module in chosen:
        dtype = flat[kernels[module].path].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise NotImplementedError(f"target {module!r} has dtype {dtype}; PEANuT adapts floating-point kernels")
    targets = _layers([kernels[module] for module in chosen], config)
    return {target.kernel.path: target for target in targets}


def saved_modules(flat: Mapping[str, Leaf], config: AdapterConfig) -> tuple[str, ...]:
    """The dotted paths of the modules that are trained in full: `modules_to_save` and the head of `task_type`.

    Raises:
        ValueError: a name that is no module, or a task whose head is not in the tree.
    """
    modules = _modules(flat)
    named = _matching("modules_to_save", config.modules_to_save, modules) if config.modules_to_save else []
    heads = TASK_HEADS.get(config.task_type or "", ())
    own = [module for module in modules if module in heads]
    if heads and not own:
        raise ValueError(
            f"task_type={config.task_type!r} trains the head {' or '.join(heads)}, but the model has none; "
            f"its top-level modules are {sorted({module.partition('.')[0] for module in modules})}"
        )
    return tuple(dict.fromkeys([*named, *own]))


def saved_paths(flat: Mapping[str, Leaf], config: AdapterConfig) -> tuple[str, ...]:
    """The leaves of the saved modules."""
    saved = saved_modules(flat, config)
    return tuple(path for path in flat if any(_within(module_of(path), name) for name in saved))


def _modules(flat: Mapping[str, Leaf]) -> list[str]:
    """Every module path, containers included."""
    modules: dict[str, None] = {}
    for path in flat:
        parts = path.split("/")[:-1]
        if not parts:
            modules[""] = None  # a bare module: its leaves stand at the top
        modules.update({".".join(parts[: i + 1]): None for i in range(len(parts))})
    return list(modules)


def _matching(
    field: str, names: str | Sequence[str], modules: Sequence[str], kernels: Iterable[str] | None = None
) -> list[str]:
    """The modules that `names` selects, each entry of a list at least one. `kernels` narrows what an error suggests."""
    if isinstance(names, str):
        matched = matching(field, [names], modules)
        if not matched:
            raise ValueError(f"{field}={short(names)} (a regular expression) matched none of {len(modules)} modules")
        return list(matched)
    chosen: set[str] = set()
    for name in names:
        found = [module for module in modules if module == name or module.endswith(f".{name}")]
        if not found:
            known, noun = (modules, "modules") if kernels is None else (list(kernels), "kernels")
            raise ValueError(f"{field} entry {short(name)} matched none of {len(known)} {noun}{_closest(name, known)}")
        chosen.update(found)
    return [module for module in modules if module in chosen]


def _within(module: str, container: str) -> bool:
    return module == container or module.startswith(f"{container}.")


def _closest(name: str, candidates: Sequence[str]) -> str:
    """`; closest: ...`, compared with as many trailing parts as the name itself has."""
    depth = name.count(".") + 1
    tails = {".".join(module.split(".")[-depth:]): module for module in reversed(candidates)}
    best = difflib.get_close_matches(name, tails, n=1, cutoff=0.0)
    return f"; closest: {tails[best[0]]!r}" if best else ""


def _kind(module: str, flat: Mapping[str, Leaf]) -> str:
    prefix = module.replace(".", "/") + "/"
    for leaf, kind in _KINDS.items():
        if prefix + leaf in flat:
            return f"of type {kind}, with {leaf} {tuple(flat[prefix + leaf].shape)}"
    return "a container of modules"


def _layers(kernels: Sequence[Kernel], config: AdapterConfig) -> list[Target]:
    """Keeps the kernels of `layers_to_transform`: whole ones by the index in their path, rows of a layer stack."""
    if config.layers_to_transform is None:
        return [Target(kernel) for kernel in kernels]
    wanted = config.layers_to_transform
    wanted = (wanted,) if isinstance(wanted, int) else tuple(sorted(set(wanted)))
    patterns = config.layers_pattern or r"[^.]*"
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    numbered = matching("layers_pattern", patterns, [kernel.module for kernel in kernels], LAYERS_FORM)
    kept, available = [], set()
    for kernel in kernels:
        if kernel.module in numbered:
            index = int(numbered[kernel.module][1]["layer"])
            available.add(index)
            if index in wanted:
                kept.append(Target(kernel))
        elif kernel.stack:
            available.update(range(kernel.stack[0]))
            kept.append(Target(kernel, tuple(i for i in wanted if i < kernel.stack[0])))
    missing = sorted(set(wanted) - available)
    if missing:
        have = f"layers 0 to {max(available)}" if available else "no numbered layer"
        raise ValueError(
            f"layers_to_transform={short(list(wanted))}: layers {short(missing)} match no target; the targets have "
            f"{have} (layers_pattern={short(config.layers_pattern)})"
        )
    return [target for target in kept if target.rows != ()]
