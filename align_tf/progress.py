"""Progress of long work, on stderr."""

from collections.abc import Iterable
from typing import Any


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
    if not show:
        return items
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    transient = console.is_terminal  # in a log the last state stays
    return rich.progress.track(items, description, total, console=console, transient=transient)
