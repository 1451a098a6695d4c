"""What is known of an architecture: one row each, with its default targets and its sharding rules."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from jax.sharding import PartitionSpec as Spec

Rules = Sequence[tuple[str, Spec]]


def _encoder(*first: tuple[str, Spec]) -> Rules:
    return (
        *first,
        (r".*/(query|key|value)/kernel", Spec("fsdp", "tensor")),
        (r".*/intermediate/dense/kernel", Spec("fsdp", "tensor")),
        (r".*/layer/\d+/(attention/)?output/dense/kernel", Spec("tensor", "fsdp")),
        (r".*", Spec()),
    )


def _decoder(*stack: None) -> Rules:
    return (
        (r"model/embed_tokens/embedding", Spec("tensor", "fsdp")),
        (r".*/(q|k|v|gate|up)_proj/kernel", Spec(*stack, "fsdp", "tensor")),
        (r".*/(o|down)_proj/kernel", Spec(*stack, "tensor", "fsdp")),
        (r"(lm_head/kernel)?", Spec("fsdp", "tensor")),
        (r".*", Spec()),
    )


_T5: Rules = (
    (r"shared/embedding", Spec(None, "fsdp")),
    (r".*Attention/(q|k|v)/kernel", Spec("fsdp", "tensor")),
    (r".*Attention/o/kernel", Spec("tensor", "fsdp")),
    (r".*DenseReluDense/wi(_\d)?/kernel", Spec("fsdp", "tensor")),
    (r".*DenseReluDense/wo/kernel", Spec("tensor", "fsdp")),
    (r".*", Spec()),
)
# GPT-2 stores [d_out, d_in].
_GPT2: Rules = (
    (r"transformer/wte/embedding", Spec(None, "fsdp")),
    (r".*/(c_attn|c_fc)/kernel", Spec("tensor", "fsdp")),
    (r".*/c_proj/kernel", Spec("fsdp", "tensor")),
    (r".*", Spec()),
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        model_types: HF's, such as "roberta".
        targets: The modules that `target_modules=None` adapts; their names also tell the architecture.
        rules: How `sharding.shard` spreads its parameters: (regular expression, PartitionSpec) pairs. None where
            there is no table yet.
        layer_rules: The same where the layers are not one scanned stack, of an architecture that can be either.
    """

    model_types: tuple[str, ...]
    targets: tuple[str, ...]
    rules: Rules | None = None
    layer_rules: Rules | None = None


# Targets: peft 0.21.2, `peft/utils/constants.py` TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, which its PEANuT
# uses too; ViT and its kin are ours, the paper's choice (table 8). Vocabularies such as RoBERTa's 50,265 divide by
# nothing, so that embeddings are sharded along their width.
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(("gpt2",), ("c_attn",), _GPT2),
    Architecture(("bloom", "gpt_neox", "falcon"), ("query_key_value",)),
    Architecture(
        ("bert", "roberta", "xlm-roberta"),
        ("query", "value"),
        _encoder((r".*/word_embeddings/embedding", Spec(None, "fsdp"))),
    ),
    Architecture(("electra", "roberta-prelayernorm", "roformer", "big_bird", "albert"), ("query", "value")),
    Architecture(("vit",), ("query", "value"), _encoder()),
    Architecture(("beit", "dinov2"), ("query", "value")),
    Architecture(("llama", "mistral", "qwen2", "qwen3"), ("q_proj", "v_proj"), _decoder(None), _decoder()),
    Architecture(("gemma",), ("q_proj", "v_proj")),
    Architecture(
        ("opt", "gptj", "gpt_neo", "bart", "mbart", "marian", "pegasus", "blenderbot", "xglm", "whisper", "clip"),
        ("q_proj", "v_proj"),
    ),
    Architecture(("distilbert",), ("q_lin", "v_lin")),
    Architecture(("t5", "mt5"), ("q", "v"), _T5),
    Architecture(("longt5",), ("q", "v")),
)

# "all-linear" leaves these out: the projection to classes or vocabulary of HF's heads.
_OUTPUT_HEAD = re.compile(
    r"(lm_head|classifier|score|qa_outputs|embed_out|proj_out)(\.decoder)?"
    r"|(cls|generator_lm_head|predictions)(\.predictions)?\.decoder|vocab_projector"
)


def is_output_head(module: str) -> bool:
    """Whether a dotted module path is a projection to classes or vocabulary."""
    return _OUTPUT_HEAD.fullmatch(module) is not None


def default_targets(modules: Iterable[str]) -> tuple[str, ...]:
    """The targets of the first architecture that has modules of these names.

    Raises:
        ValueError: if none does.
    """
    last = {module.rpartition(".")[2] for module in modules}
    for row in ARCHITECTURES:
        if last.issuperset(row.targets):
            return row.targets
    known = sorted(name for row in ARCHITECTURES for name in row.model_types)
    raise ValueError(
        f"no default target_modules for this model; set them to some of {sorted(last)}. "
        f"Architectures with a default: {', '.join(known)}"
    )


def rules_for(model_type: str, *, scan_layers: bool = True) -> Rules:
    """The sharding rules of an architecture: (regular expression, PartitionSpec) pairs for `shard` and the loaders.

    Args:
        model_type: HF's, such as "roberta"; "llama", "mistral", "qwen2" and "qwen3" are the library's decoder.
        scan_layers: Whether the decoder's layers are one stack.

    Raises:
        ValueError: an architecture without rules.
    """
    for row in ARCHITECTURES:
        if model_type in row.model_types and row.rules is not None:
            return row.layer_rules if row.layer_rules is not None and not scan_layers else row.rules
    known = sorted(name for row in ARCHITECTURES if row.rules is not None for name in row.model_types)
    raise ValueError(f"no sharding rules for {model_type!r} (there are some for {', '.join(known)}): pass your own")
