"""Times contenders in turn, round by round, and prints medians and their ratios."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import rich.console
import rich.table


def compare(
    title: str,
    contenders: Mapping[str, Callable[[], Any]],
    *,
    items: int,
    rounds: int = 7,
) -> dict[str, Any]:
    """Calls every contender once a round, after a round that does not count.

    A machine's speed drifts, so that only figures of one round are compared: a ratio is the
    median over the rounds of the first contender's time by another's in the same round.

    Args:
        title: what is measured.
        contenders: name -> what to time; ours comes first.
        items: what one call handles, such as captions.
        rounds: that count.

    Returns:
        `title`, and `rows`: of each contender its `name`, the median `seconds` of an item, and
        the `ratio` of its throughput to ours.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        print(f"\r{title}: round {turn} of {rounds}", end="", file=sys.stderr, flush=True)
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            if turn:
                times[name].append((time.perf_counter() - started) / items)
    print(file=sys.stderr)
    ours = next(iter(times.values()))
    rows = [
        {
            "name": name,
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(a / b for a, b in zip(ours, seconds, strict=True)),
        }
        for name, seconds in times.items()
    ]
    return {"title": title, "rows": rows}


def show(results: list[dict[str, Any]], as_json: bool = False) -> None:
    """Prints tables, or JSON, to stdout."""
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        table = rich.table.Table(title=result["title"], title_justify="left")
        for column in ("", "items/s", "throughput by ours"):
            table.add_column(column, justify="right" if column else "left")
        for row in result["rows"]:
            table.add_row(row["name"], f"{1 / row['seconds']:,.1f}", f"{row['ratio']:.2f}")
        rich.console.Console().print(table)
