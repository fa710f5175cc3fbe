"""Times contenders in turn, round by round; holds ratios against aims; prints and writes both."""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import rich.console
import rich.table

from align_tf.files import write_text


def compare(
    title: str,
    contenders: Mapping[str, Callable[[], Any]],
    *,
    items: int,
    rounds: int = 7,
    settle: bool = False,
) -> dict[str, Any]:
    """Calls every contender once a round, after a round that does not count.

    A machine's speed drifts, so that only figures of one round are compared: a ratio is the
    median over the rounds of the first contender's time by another's in the same round.

    Args:
        title: what is measured.
        contenders: name -> what to time; ours comes first.
        items: what one call handles, such as captions.
        rounds: that count.
        settle: also call each once before it is timed. Threads of the library before it that still
            wait for work, busily, would take a core from it: PyTorch's made a text of 16 tokens
            take 0.030 s here, where after another call of ours it takes 0.024.

    Returns:
        `title`, and `rows`: see `to_rows`.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        print(f"\r{title}: round {turn} of {rounds}", end="", file=sys.stderr, flush=True)
        for name, call in contenders.items():
            if settle:
                call()
            started = time.perf_counter()
            call()
            if turn:
                times[name].append((time.perf_counter() - started) / items)
    print(file=sys.stderr)
    return {"title": title, "rows": to_rows(times)}


def to_rows(times: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Returns of each contender its `name`, the median `seconds` of an item, all `times`, and the
    `ratio` of its throughput to that of the first."""
    ours = next(iter(times.values()))
    return [
        {
            "name": name,
            "seconds": statistics.median(seconds),
            "times": seconds,
            "ratio": statistics.median(a / b for a, b in zip(ours, seconds, strict=True)),
        }
        for name, seconds in times.items()
    ]


def throughput(result: dict[str, Any], ours: str, theirs: Iterable[str]) -> float:
    """Returns a contender's throughput by that of the best of others, round by round."""
    rows = {row["name"]: row for row in result["rows"]}
    best = min((rows[name] for name in theirs), key=lambda row: row["seconds"])
    pairs = zip(best["times"], rows[ours]["times"], strict=True)
    return statistics.median(their / our for their, our in pairs)


def aim(
    name: str, reached: float, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """Holds a figure against what was aimed at, at_least or at_most."""
    met = reached >= at_least if at_most is None else reached <= at_most
    return {"aim": name, "reached": reached, "at_least": at_least, "at_most": at_most, "met": met}


def describe(aimed: dict[str, Any]) -> str:
    """Says an aim and what became of it in a line."""
    word = "at most" if aimed["at_least"] is None else "at least"
    wanted = aimed["at_most"] if aimed["at_least"] is None else aimed["at_least"]
    verdict = "met" if aimed["met"] else "MISSED"
    return f"{verdict}: {aimed['aim']}: {aimed['reached']:.4g} ({word} {wanted:g})"


def show(results: list[dict[str, Any]], as_json: bool = False) -> None:
    """Prints tables and aims, or JSON, to stdout."""
    if as_json:
        print(json.dumps(results, indent=2))
        return
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    for result in results:
        console.print(_table(result))
        for aimed in result.get("aims", ()):
            console.print(describe(aimed), highlight=False, soft_wrap=True)
        console.print()


def _table(result: dict[str, Any]) -> rich.table.Table:
    """Lays out the rows of a comparison, or the `table` that a result has in their place."""
    if "table" in result:
        names = list(result["table"][0])
        cells = [[_cell(row[name]) for name in names] for row in result["table"]]
    else:
        extra = [key for key in result["rows"][0] if key not in ("name", "times")]
        names = ["", "items/s", "s/item", "throughput by the first's"]
        names += [key for key in extra if key not in ("seconds", "ratio")]
        cells = [
            [row["name"], f"{1 / row['seconds']:,.1f}", f"{row['seconds']:.4g}"]
            + [f"{row['ratio']:.2f}"]
            + [_cell(row[key]) for key in extra if key not in ("seconds", "ratio")]
            for row in result["rows"]
        ]
    table = rich.table.Table(title=result["title"], title_justify="left")
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left")
    for row in cells:
        table.add_row(*row)
    return table


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(
    doc: str,
    measure: Callable[..., Iterable[dict[str, Any]]],
    more: argparse.ArgumentParser | None = None,
) -> None:
    """Runs one part of the benchmarks as a program; `python benchmarks` runs them all.

    Args:
        doc: the part's docstring; its first line is the help.
        measure: takes `quick`, `rounds` and `folder`, where checkpoints are kept between parts;
            gives results, one after another.
        more: options of the part's own, which `measure` takes too.
    """
    parser = argparse.ArgumentParser(
        description=doc.partition("\n")[0], parents=[more] if more else []
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that it runs")
    parser.add_argument("--rounds", type=int, help="that count; the default is each part's own")
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the checkpoints made")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures")
    arguments = vars(parser.parse_args())
    file, folder = arguments.pop("json"), arguments.pop("folder")
    with contextlib.ExitStack() as stack:
        folder = folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = []
        for result in measure(folder=folder, **arguments):
            show([result])
            results.append(result)
            if file:  # each as it comes, so that nothing is lost
                write_text(file, json.dumps(results, indent=2) + "\n")
