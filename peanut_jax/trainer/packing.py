"""Prompts and responses as rows for the decoder: packed, with segments, and a loss on the responses alone."""

import heapq
from collections.abc import Sequence

import numpy as np

from peanut_jax.models.token_ids import check_inside, id_list

Example = tuple[Sequence[int], Sequence[int]]


def pack(examples: Sequence[Example], length: int, *, vocab_size: int | None = None) -> dict[str, np.ndarray]:
    """Puts examples into rows of `length` tokens, in their order, each where it first fits.

    Args:
        examples: (prompt, response) token ids; an empty prompt for plain text. The response should end with the
            end-of-sequence token.
        length: Tokens of a row. A longer example is truncated, which is an error if nothing of its response is left.
        vocab_size: The model's; ids that it does not have are refused here, since a compiled step cannot tell. None
            refuses those that no model has.

    Returns:
        [rows, length] arrays: `tokens`; `labels`, the token that follows each; `weights`, 1 where that is one of a
        response; `segments`, the example's number in its row, from 1, and 0 for padding.

    Raises:
        ValueError: no examples; one without a response within `length` tokens; something that is not a token id.
    """
    for i, (prompt, response) in enumerate(examples):
        for part, ids in (("prompt", prompt), ("response", response)):
            known = id_list(f"the {part} of example {i}", ids)
            check_inside(f"the {part} of example {i} holds", known, 1 << 31 if vocab_size is None else vocab_size)
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
    # By the room that is left in them: the rows, as heaps, and the first of each (`nowhere` for none).
    nowhere = len(sizes)
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    first = np.full(length + 1, nowhere)

    def put(row: int, room: int) -> None:
        heapq.heappush(with_room[room], row)
        first[room] = with_room[room][0]

    for i, (prompt, response) in enumerate(sizes):
        if not fits(prompt, response, length):
            raise ValueError(
                f"example {i} has a prompt of {prompt} and a response of {response} tokens: nothing of the "
                f"response is left in a row of {length}"
            )
        size = min(length, prompt + response)
        room = size + int(first[size:].argmin())
        if first[room] == nowhere:
            rows.append([i])
            put(len(rows) - 1, length - size)
        else:
            row = heapq.heappop(with_room[room])
            first[room] = with_room[room][0] if with_room[room] else nowhere
            rows[row].append(i)
            put(row, room - size)
    return rows


def fits(prompt: int, response: int, length: int) -> bool:
    """Whether a row of `length` tokens holds something of the response to learn."""
    return prompt < length and response > 0 and prompt + response >= 2


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
