"""The tokenizer of a base."""

from typing import Any

from transformers import AutoTokenizer

_TOLD = 200  # characters of the cause


def load_tokenizer(model: str) -> Any:
    """The tokenizer in a model's folder or hub repository.

    Raises:
        ValueError: there is none, or its files are damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (
        Exception
    ) as error:  # tokenizers raises Exception itself, and transformers an AttributeError where there is none
        text = " ".join(str(error).split())[:_TOLD]
        raise ValueError(
            f"{model} holds no tokenizer that can be read: copy the tokenizer's files of the checkpoint into it, such "
            f"as tokenizer.json and tokenizer_config.json ({type(error).__name__}: {text})"
        ) from error
