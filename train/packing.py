"""Prompts and responses as rows for the decoder: packed, with segments, and a loss on the responses alone."""

from collections.abc import Sequence

import numpy as np

Example = tuple[Sequence[int], Sequence[int]]


def pack(examples: Sequence[Example], length: int) -> dict[str, np.ndarray]:
    """Puts examples into rows of `length` tokens, in their order, each where it first fits.

    Args:
        examples: (prompt, response) token ids; an empty prompt for plain text. The response should end with the
            end-of-sequence token.
        length: Of a row. A longer example is cut, which is an error if nothing of its response is left.

    Returns:
        [rows, length] arrays: `tokens`; `labels`, the token that follows each; `weights`, 1 where that is one of a
        response; `segments`, the example's number in its row, from 1, and 0 for padding.

    Raises:
        ValueError: no examples; one without a response within `length` tokens.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    if not examples:
        raise ValueError("examples is empty")
    for i, (prompt, response) in enumerate(examples):
        if len(prompt) >= length or not len(response) or len(prompt) + len(response) < 2:
            raise ValueError(
                f"example {i} has a prompt of {len(prompt)} and a response of {len(response)} tokens: nothing of the "
                f"response is left in a row of {length}"
            )
        size = min(length, len(prompt) + len(response))
        row = next((row for row, free in enumerate(room) if free >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append((prompt, response))
        room[row] -= size
    packed = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "labels", "weights", "segments")}
    for row, members in enumerate(rows):
        start = 0
        for number, (prompt, response) in enumerate(members, 1):
            ids = [*prompt, *response][:length]
            stop = start + len(ids)
            packed["tokens"][row, start:stop] = ids
            packed["labels"][row, start : stop - 1] = ids[1:]
            packed["weights"][row, start + max(len(prompt) - 1, 0) : stop - 1] = 1
            packed["segments"][row, start:stop] = number
            start = stop
    packed["weights"] = packed["weights"].astype(np.float32)
    return packed
