"""Progress of long work, on stderr."""

import datetime
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

TERMINAL_SECONDS, LOG_SECONDS = 0.2, 10.0  # between two states of a Rate


def track(items: Iterable, description: str, total: int | None = None, show: bool = True) -> Any:
    """Passes items on, and shows how far they have come.

    Args:
        items: what is worked through.
        description: what is done with them, such as `Embedding`.
        total: how many there are; None asks `items` itself, or shows a bar without an end.
        show: False passes the items on alone.

    Returns:
        An iterable of the items.
    """
    if not show or Bar.open:  # whose lines they would be
        return items
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    transient = console.is_terminal  # in a log the last state stays
    return rich.progress.track(items, description, total, console=console, transient=transient)


def counted(items: Iterable, description: str, unit: str) -> Iterator[Any]:
    """Passes items on, and shows how many there have been where it takes long.

    Args:
        items: what is worked through, of a number that is not known.
        description: what is done with them, such as `Listing`.
        unit: what they are, such as `images`.
    """
    with Rate(description, None, unit) as rate:
        for item in items:
            yield item
            rate.advance(1)


class Rate:
    """Shows how many items are done, how many a second, and the time left, on stderr.

    On a terminal it is one line that changes; elsewhere a line now and then, and at the end.

    Args:
        description: what is done, such as `Embedding`.
        total: how many items there are; None where that is not known: nothing is shown of what
            is over at once.
        unit: what they are, such as `images`.
    """

    def __init__(self, description: str, total: int | None, unit: str):
        self.description, self.total, self.unit = description, total, unit
        self.done = self.skipped = 0
        self.shown = total is not None

    def __enter__(self) -> "Rate":
        self.started = self.told = time.monotonic()
        self.terminal = sys.stderr.isatty()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.done and self.shown:
            self._tell(f"in {datetime.timedelta(seconds=round(self._seconds()))}", "\n")

    def skip(self, count: int) -> None:
        """Counts items that were done before."""
        self.skipped += count

    def advance(self, count: int) -> None:
        """Counts items that are done now."""
        self.done += count
        now = time.monotonic()
        if now - self.told >= (TERMINAL_SECONDS if self.terminal else LOG_SECONDS):
            self.told, self.shown = now, True
            self._tell(self._left(), "" if self.terminal else "\n")

    def _left(self) -> str:
        if self.total is None:
            return "so far"
        left = (self.total - self.skipped - self.done) * self._seconds() / self.done
        return f"{datetime.timedelta(seconds=round(left))} left"

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _tell(self, time_said: str, end: str) -> None:
        rate = self.done / max(self._seconds(), 1e-9)
        of_all = "" if self.total is None else f" of {self.total:,}"
        line = f"{self.description}: {self.skipped + self.done:,}{of_all} {self.unit}, "
        line += f"{rate:,.1f} {self.unit}/s, {time_said}"
        start = "\r\x1b[K" if self.terminal else ""
        print(start + line, end=end, file=sys.stderr, flush=True)


class Bar:
    """Shows steps on a terminal as a bar, with the time left; elsewhere nothing.

    Lines that are written to stderr meanwhile stand above it.

    Args:
        description: what is done, such as `Training`.
        total: how many steps there are.
        unit: what they are, such as `steps`.
        done: how many were done before.
    """

    open = False  # whether there is one

    def __init__(self, description: str, total: int, unit: str, done: int = 0):
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self.progress: Any = None

    def __enter__(self) -> "Bar":
        Bar.open = True
        if not sys.stderr.isatty():
            return self
        import rich.console
        import rich.progress

        self.progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn(self.unit + "  {task.fields[said]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True, soft_wrap=True),  # of the lines above
            transient=True,
            redirect_stdout=False,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            self.description, total=self.total, completed=self.done, said=""
        )
        return self

    def __exit__(self, *exception: object) -> None:
        Bar.open = False
        if self.progress is not None:
            self.progress.stop()

    def advance(self, count: int, said: str) -> None:
        """Counts steps that are done, and says something beside the bar."""
        if self.progress is not None:
            self.progress.update(self.task, advance=count, said=said)
