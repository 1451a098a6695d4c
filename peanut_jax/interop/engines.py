"""What the engines that serve LoRA take of an adapter directory: one row of `ENGINES` each.

`to_lora` writes what all of them read alike: one rank, `lora_alpha` = r (an integer, by which nothing is scaled), no
patterns, and `target_modules` as a list. vLLM, SGLang and SGLang-JAX read one r and one lora_alpha and pass over
rank_pattern and alpha_pattern; llama.cpp goes by the ranks of the tensors and by one alpha; SGLang, SGLang-JAX and
llama.cpp pass over use_rslora; SGLang-JAX takes a string of target modules for a list of letters. The rows say what an
engine then still refuses, or passes over in silence.

References:
    Read at these commits of each repository:
    vllm-project/vllm: `vllm/config/lora.py` @01230b4 (MaxLoRARanks), `vllm/lora/peft_helper.py` @e745baf (r, alpha,
    DoRA, modules_to_save, bias), `vllm/lora/lora_model.py` @0306474 (unexpected modules, tensor names),
    `vllm/lora/utils.py` @001e63a (every linear layer), `docs/models/supported_models.md` @0046f77 and
    `docs/models/pooling_models/scoring.md` @063da22 (the LoRA column).
    sgl-project/sglang: `python/sglang/srt/lora/lora_config.py` @0ceb81f, `utils.py` @01235a1 beside it
    (get_normalized_target_modules), and `lora.py` there (normalize_qkv_proj, normalize_gate_up_proj, _process_weight).
    sgl-project/sglang-jax @cddbf6f: `python/sgl_jax/srt/lora/` (lora_config.py, lora_manager.py, lora_memory_pool.py).
    ggml-org/llama.cpp: `convert_lora_to_gguf.py` @0b03ada, `conversion/gpt2.py` @5535795, `src/llama-adapter.h`
    @215841f and `src/llama-adapter.cpp` @0650ea8.
    huggingface/peft 0.21.2: `src/peft/tuners/lora/config.py` and `layer.py`.
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from peanut_jax.files.untrusted import read_json

_LAYER = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_DECODERS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), rf"model\.{_LAYER}")
_OPT = r"model\.decoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|fc[12])"


@dataclasses.dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        title: What it calls itself.
        load: Lines that load the adapter, with {base}, {lora} and {rank} to fill in.
        modules: model_type -> regular expression of the modules on which the engine serves a LoRA.
        elsewhere: The same for every other model_type; None where that is not known here.
        refused: model_types on which it serves no LoRA.
        ranks: The values that its flag for the largest rank takes; none where every rank is served.
        saved: Whether it takes saved modules beside a LoRA.
        together: Module -> those without which it is not read, of the same layer.
    """

    title: str
    load: tuple[str, ...]
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    elsewhere: str | None = None
    refused: frozenset[str] = frozenset()
    ranks: tuple[int, ...] = ()
    saved: bool = False
    together: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def flag(self, rank: int) -> int:
        """The smallest value of its flag for the largest rank that holds `rank`."""
        return next((value for value in self.ranks if value >= rank), rank)

    def lines(self, base: str, lora: str, rank: int) -> list[str]:
        """The lines with which it loads the adapter, quoted for a shell (PEFT's for Python)."""
        names = {"base": shlex.quote(base), "lora": shlex.quote(lora), "python": repr(lora), "rank": self.flag(rank)}
        return [line.format(**names) for line in self.load]


ENGINES: Mapping[str, Engine] = {
    "peft": Engine("PEFT", ("peft.PeftModel.from_pretrained(model, {python})",), elsewhere=".*", saved=True),
    "vllm": Engine(
        "vLLM",
        ("vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={lora}",),
        _DECODERS | {"opt": _OPT},
        refused=frozenset(
            {"gpt2", "bloom", "falcon", "gpt_neox", "gptj", "bert", "roberta", "xlm-roberta"},
        ),
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    ),
    # SGLang stacks q, k and v into one matrix, found by q's name, and gate and up into another, found by gate's.
    "sglang": Engine(
        "SGLang",
        (
            "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
            "--lora-paths tuned={lora}",
            "python -m sgl_jax.launch_server --model-path {base} --lora-paths tuned={lora}",
        ),
        _DECODERS,
        elsewhere=rf".*\b{_LAYER}",
        together={
            "q_proj": ("v_proj",),
            "k_proj": ("q_proj", "v_proj"),
            "v_proj": ("q_proj",),
            "up_proj": ("gate_proj",),
        },
    ),
    # The converter transposes GPT-2's kernels, and so exchanges A and B, which PEFT does not store transposed.
    "llama.cpp": Engine(
        "llama.cpp",
        (
            "python convert_lora_to_gguf.py {lora} --base {base} --outfile lora.gguf",
            "llama-server -m base.gguf --lora lora.gguf",
        ),
        _DECODERS,
        refused=frozenset({"gpt2"}),
    ),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A LoRA directory, as far as engines look at it.

    Attributes:
        modules: Names of the adapted modules, as torch has them.
        rank: The one rank.
        saved: Names of the tensors of saved modules.
        model_type: The base's; None where it is not known.
    """

    modules: Sequence[str]
    rank: int
    saved: Sequence[str] = ()
    model_type: str | None = None


def engine_named(name: str) -> Engine:
    """A row of `ENGINES`.

    Raises:
        ValueError: another name.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    return ENGINES[name]


def model_type_of(folder: Path) -> str | None:
    """The model_type in a checkpoint's config.json."""
    found = read_json(folder / "config.json").get("model_type")
    return found if isinstance(found, str) else None


def refusal(engine: Engine, lora: Exported) -> str | None:
    """Why the engine does not serve the adapter as it is meant; None where nothing is known against it."""
    model = f"a model of type {lora.model_type!r}" if lora.model_type else "this model"
    if lora.model_type in engine.refused:
        return f"{engine.title} serves no LoRA on {model}"
    if lora.saved and not engine.saved:
        return f"{engine.title} takes no saved modules beside a LoRA, and this adapter saves {lora.saved[0]!r}"
    if engine.ranks and lora.rank > engine.ranks[-1]:
        return f"{engine.title} serves ranks up to {engine.ranks[-1]}, and this adapter has {lora.rank}"
    pattern = engine.modules.get(lora.model_type or "", engine.elsewhere)
    if pattern is not None and (odd := [one for one in lora.modules if not re.fullmatch(pattern, one)]):
        return f"{engine.title} serves no LoRA on the module {odd[0]!r} of {model}"
    there = set(lora.modules)
    for module in lora.modules:
        parent, _, last = module.rpartition(".")
        if lacking := [name for name in engine.together.get(last, ()) if f"{parent}.{name}" not in there]:
            return f"{engine.title} reads a LoRA on {module!r} only with one on {' and '.join(lacking)} of its layer"
    return None


def is_known(engine: Engine, lora: Exported) -> bool:
    """Whether it is known here on which modules of such a model the engine serves a LoRA."""
    return engine.elsewhere is not None or lora.model_type in engine.modules


def check(engine: Engine, lora: Exported, merge: str) -> None:
    """Refuses what the engine would refuse, or pass over in silence.

    Args:
        merge: The command that merges the adapter instead.

    Raises:
        ValueError: by name, with what to do instead.
    """
    if reason := refusal(engine, lora):
        raise ValueError(f"{reason}; merge it instead: {merge}")
