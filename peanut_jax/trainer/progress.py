"""What a run shows while it trains: a progress bar, or lines where there is no terminal."""

import contextlib
import dataclasses
import datetime
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meter:
    """Takes a training loop's figures and shows them.

    Attributes:
        total: Steps of the whole run.
        rate_unit: What `rate` counts.
        show: Called with the step, the figures, and the time that is left.
    """

    total: int
    rate_unit: str
    show: Callable[[int, str, str], None]

    def update(self, step: int, *, loss: float, rate: float, step_seconds: float) -> None:
        """Shows that `step` steps are done.

        Args:
            step: Counted over the whole run, with the steps before a resume.
            loss: The newest loss.
            rate: Tokens or examples a second.
            step_seconds: Time of one step, from which the time left is estimated; evaluations come on top.
        """
        left = datetime.timedelta(seconds=round((self.total - step) * step_seconds))
        figures = f"loss {float(loss):.4g}  {rate:,.0f} {self.rate_unit}  {1e3 * step_seconds:.1f} ms"
        self.show(step, figures, f"ETA {left.days} d {left.seconds // 3600} h" if left.days else f"ETA {left}")


@contextlib.contextmanager
def progress(
    total: int, completed: int, description: str, *, rate_unit: str = "tokens/s", enabled: bool = True
) -> Iterator[Meter]:
    """A progress bar on stderr, the figures below it; where stderr is not a terminal, a line for every update.

    Args:
        total: Steps of the whole run.
        completed: Those of them that were done before, by the run that is resumed.
        description: In front of the bar.
        rate_unit: What the rate counts.
        enabled: False shows nothing, for processes other than the first.

    Yields:
        The meter to update.
    """
    console = Console(stderr=True)
    meter = functools.partial(Meter, total=total, rate_unit=rate_unit)
    if not enabled:
        yield meter(show=lambda *_: None)
    elif not console.is_interactive:
        yield meter(show=functools.partial(_print_line, time.monotonic(), f"{description} {{}}/{total}"))
    else:
        bar = Progress(*_columns(console.width, len(description), total), expand=True)
        task = bar.add_task(description, total=total, completed=completed, left="")
        below = Text(
            no_wrap=True, overflow="ellipsis"
        )  # a line of its own: all on one would leave no bar in 80 columns
        with Live(Group(bar, below), console=console):
            yield meter(show=functools.partial(_move, bar, task, below))


def _columns(width: int, description: int, total: int) -> list[ProgressColumn]:
    """What a line of so many characters has room for; a line that is too long would be drawn anew at each update."""
    steps = 2 * len(str(total)) + 1
    elapsed, left, least = 8, 14, 10  # "12:34:56", "ETA 231 d 18 h" and the shortest bar
    found: list[ProgressColumn] = [MofNCompleteColumn()]
    room = width - steps
    if room > elapsed + 1:
        found.append(TimeElapsedColumn())
        room -= elapsed + 1
    if room > left + 1:
        found.append(TextColumn("{task.fields[left]}"))
        room -= left + 1
    if room > least + 1:
        found.insert(0, BarColumn(bar_width=None))
        room -= least + 1
    if room > description + 1:
        found.insert(0, TextColumn("{task.description}"))
    return found


def _move(bar: Progress, task: TaskID, below: Text, step: int, figures: str, left: str) -> None:
    bar.update(task, completed=step, left=left)
    below.plain = figures


def _print_line(started: float, heading: str, step: int, figures: str, left: str) -> None:
    elapsed = datetime.timedelta(seconds=round(time.monotonic() - started))
    show(f"{heading.format(step)}  {figures}  elapsed {elapsed}  {left}")


def show(line: str) -> None:
    """Prints a line on stderr."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:  # as `2>&1 | head` leaves it: what nobody reads is no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
