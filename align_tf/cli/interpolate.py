"""`align-tf interpolate`: a model between one and those fine-tuned from it (WiSE-FT, soups)."""

import argparse
import json
import math
import types
from collections.abc import Callable
from typing import Any

from align_tf.addresses import is_local, names, place
from align_tf.cli.common import hint, import_tensorflow, print_table, say

TASKS = ("retrieval", "zero-shot")
STEPS = 10  # of a sweep, from the base to the fine-tuned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("base", metavar="BASE", help="the checkpoint that was fine-tuned")
    parser.add_argument(
        "tuned",
        nargs="+",
        metavar="TUNED",
        help="what came of it, a checkpoint or an adapter; of several their mean (a soup)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the model is written")
    parser.add_argument(
        "--alpha", type=float, metavar="SHARE", help="of TUNED: 0 is BASE, 1 is TUNED (0.5)"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="measure eleven shares on each --data, write the best"
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="SOURCE",
        help="what a sweep measures on, as align-tf evaluate takes it; twice for what was trained "
        "on and for what is to be kept, of which the best has the highest mean",
    )
    parser.add_argument(
        "--task",
        action="append",
        choices=TASKS,
        help="what is measured on each --data, once or as often: the mean of both R@1, or top-1 "
        "(retrieval)",
    )
    parser.add_argument("--templates", metavar="FILE", help="as of align-tf evaluate")
    parser.add_argument("--plot", metavar="FILE", help="draw the sweep, as a .png or .svg file")
    parser.add_argument("--json", action="store_true", help="print the sweep as JSON")


def run(arguments: Any) -> int:
    tasks = _check(arguments)
    if arguments.plot:
        from align_tf.cli.plot import open_plots

        open_plots(arguments.plot)
    say(f"Loading {', '.join([arguments.base, *arguments.tuned])} ...")
    import_tensorflow()
    from align_tf.export.interpolation import Interpolation

    opened = [_open(task, data, arguments.templates) for task, data in tasks]
    line = Interpolation(arguments.base, arguments.tuned)
    if arguments.sweep:
        _sweep(arguments, line, opened)
    else:
        line.move(0.5 if arguments.alpha is None else arguments.alpha)
    line.save(arguments.output)
    if not arguments.json:
        print(arguments.output)
    hint("align-tf evaluate", "--model", arguments.output, "--data", "held-out")
    return 0


def _check(arguments: Any) -> list[tuple[str, str]]:
    """Returns what a sweep measures: each task, and its data."""
    output = place(arguments.output)
    if (is_local(output) and output.is_file()) or names(output):
        raise FileExistsError(f"{output}: it is there already; expected a new folder")
    if arguments.alpha is not None and not math.isfinite(arguments.alpha):
        raise ValueError(f"--alpha {arguments.alpha}: expected a number")
    if not arguments.sweep:
        for option in ("data", "task", "templates", "plot", "json"):
            if getattr(arguments, option):
                raise ValueError(f"--{option}: of no use without --sweep")
        return []
    if arguments.alpha is not None:
        raise ValueError("--alpha: of no use to --sweep, which finds it")
    if not arguments.data:
        raise ValueError("--sweep: expected --data, what to measure on")
    tasks = arguments.task or [TASKS[0]]
    tasks = tasks * len(arguments.data) if len(tasks) == 1 else tasks
    if len(tasks) != len(arguments.data):
        raise ValueError(f"--task: {len(tasks)} of them, expected one or {len(arguments.data)}")
    return list(zip(tasks, arguments.data, strict=True))


def _open(task: str, data: str, templates: str | None) -> tuple[Any, dict[str, Any]]:
    from align_tf.evaluation import tasks

    absent = dict.fromkeys(("image_key", "caption_key", "train_data", "labels"))
    options = types.SimpleNamespace(task=task, data=data, templates=templates, **absent)
    return options, tasks.read(options)


def _sweep(arguments: Any, line: Any, opened: list[tuple[Any, dict]]) -> None:
    from align_tf.evaluation.embedder import Embedder
    from align_tf.export.interpolation import sweep

    embedder = Embedder(line.model)
    measures = [_measure(line, embedder, *of) for of in opened]
    rows, best = sweep(line, [step / STEPS for step in range(STEPS + 1)], measures)
    sources = [options.data for options, _ in opened]
    names = [
        of.data if sources.count(of.data) == 1 else f"{of.data} ({of.task})" for of, _ in opened
    ]
    if arguments.plot:
        from align_tf import plots

        shares = [row["alpha"] for row in rows]
        series = {name: [row["figures"][i] for row in rows] for i, name in enumerate(names)}
        plots.save(plots.sweep(shares, series, best), arguments.plot)
    if arguments.json:
        print(json.dumps({"data": names, "rows": rows, "best": best}, indent=2))
        return
    cells = [
        [
            f"{row['alpha']:.1f}",
            *(f"{figure:.1%}" for figure in row["figures"]),
            "best" if row["alpha"] == best else "",
        ]
        for row in rows
    ]
    print_table(f"{arguments.base} to {', '.join(arguments.tuned)}", ["alpha", *names, ""], cells)


def _measure(line: Any, embedder: Any, options: Any, opened: dict) -> Callable[[], float]:
    from align_tf.evaluation import tasks

    def measure() -> float:
        metrics = tasks.evaluate(line.model, line.processor, options, opened, embedder)["metrics"]
        if options.task == "retrieval":
            return (metrics["r1_i2t"] + metrics["r1_t2i"]) / 2
        return metrics["top1"]

    return measure
