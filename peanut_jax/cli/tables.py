"""Tables for the terminal."""

import sys

from rich.console import Console
from rich.table import Table


def make_table(*columns: str, title: str) -> Table:
    table = Table(*columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def print_table(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table)
