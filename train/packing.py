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
    plan = plan_rows([(len(prompt), len(response)) for prompt, response in examples], length)
    rows = [pack_row([examples[i] for i in members], length) for members in plan]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def plan_rows(sizes: Sequence[tuple[int, int]], length: int) -> list[list[int]]:
    """The examples of each row, from their sizes alone.

    Args:
        sizes: Tokens of each example's prompt and response.

    Raises:
        ValueError: as `pack`.
    """
    if not sizes:
        raise ValueError("examples is empty")
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (row, room), in order
    for i, (prompt, response) in enumerate(sizes):
        if prompt >= length or not response or prompt + response < 2:
            raise ValueError(
                f"example {i} has a prompt of {prompt} and a response of {response} tokens: nothing of the "
                f"response is left in a row of {length}"
            )
        size = min(length, prompt + response)
        place = next((k for k, (_, room) in enumerate(open_rows) if room >= size), None)
        if place is None:
            place = len(open_rows)
            open_rows.append((len(rows), length))
            rows.append([])
        row, room = open_rows[place]
        rows[row].append(i)
        open_rows[place] = row, room - size
        if room - size < 2:  # no example is shorter: the search need not look here again
            del open_rows[place]
    return rows


def pack_row(members: Sequence[Example], length: int) -> dict[str, np.ndarray]:
    """One row of `pack`, as [length] arrays."""
    packed = {name: np.zeros(length, np.int32) for name in ("tokens", "labels", "weights", "segments")}
    start = 0
    for number, (prompt, response) in enumerate(members, 1):
        ids = [*prompt, *response][:length]
        stop = start + len(ids)
        packed["tokens"][start:stop] = ids
        packed["labels"][start : stop - 1] = ids[1:]
        packed["weights"][start + max(len(prompt) - 1, 0) : stop - 1] = 1
        packed["segments"][start:stop] = number
        start = stop
    packed["weights"] = packed["weights"].astype(np.float32)
    return packed
