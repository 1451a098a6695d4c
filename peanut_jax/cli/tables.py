"""Tables and figures for the terminal."""

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

# A first column of paths keeps this many characters however narrow the terminal is.
_SHORTEST_PATH = 16


def make_table(*columns: str, title: str) -> Table:
    table = Table(*columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


class PipeConsole(Console):
    """Rich's console, which leaves a pipe without a reader to `main`."""

    def on_broken_pipe(self) -> None:
        raise


def path_table(headers: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str], title: str) -> Table:
    """A table whose first column holds paths, which keep their ends where the terminal is too narrow for all of them.

    Args:
        headers: Of the columns; they break between words.
        rows: The cells of each row.
        total: The last row, below a line, which breaks as the headers do.
        title: Stands above the table.
    """
    table = make_table(*headers, title=title)
    widths = _widths(headers, rows, total)
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    for row in rows:
        table.add_row(shortened(row[0], widths[0]), *row[1:])
    table.add_section()
    table.add_row(*total)
    return table


def _widths(headers: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str]) -> list[int | None]:
    """The columns' widths by which the table fits the terminal, at the first one's cost; None without a terminal."""
    if (width := _width()) is None:
        return [None] * len(headers)
    widths = [
        max(len(text) for text in (*header.split(), *total[i].split(), *(row[i] for row in rows)))
        for i, header in enumerate(headers)
    ]
    # A border beside each column, and a blank on both of its sides.
    room = width - sum(widths[1:]) - 3 * len(headers) - 1
    return [max(min(widths[0], room), _SHORTEST_PATH), *widths[1:]]


def print_table(table: Table) -> None:
    """Prints a table that fits the terminal; as wide as it needs to be where there is no terminal, as in a pipe."""
    console = PipeConsole(width=_width())
    if _width() is None:
        console.width = max(console.measure(table, options=console.options.update(max_width=10_000)).maximum, 80)
    console.print(table)


def _width() -> int | None:
    """Columns of the terminal, or as COLUMNS says; None where there is neither."""
    given = os.environ.get("COLUMNS", "")
    return Console().width if sys.stdout.isatty() or (given.isdigit() and int(given)) else None


def shortened(path: str, room: int | None) -> str:
    """The end of a path in `room` characters, behind an ellipsis where something is left out."""
    if room is None or len(path) <= room:
        return path
    return "\N{HORIZONTAL ELLIPSIS}" + path[len(path) - room + 1 :]


def in_bytes(count: float) -> str:
    """Bytes in a unit by their number: "1.234 GB", "56.79 kB"."""
    return _scaled(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def in_seconds(seconds: float) -> str:
    """A time in a unit by its length: "12.30 ms"."""
    return _scaled(seconds, (("s", 1), ("ms", 1e-3), ("us", 1e-6)))


def in_flops(flops: float) -> str:
    """FLOPs in a unit by their number: "1.234 T"."""
    return _scaled(flops, (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1))).rstrip()


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    """`value` in the largest unit of which it is at least one, with four figures; plain in the smallest."""
    name, size = next((unit for unit in units if value >= unit[1]), units[-1])
    if (name, size) == units[-1]:
        return f"{value / size:.3g} {name}"
    return f"{value / size:,.{max(0, 4 - len(str(int(value / size))))}f} {name}"
