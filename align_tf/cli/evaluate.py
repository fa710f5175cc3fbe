"""`align-tf evaluate`: retrieval, zero-shot, kNN and linear-probe figures."""

import argparse
import json
from typing import Any

from align_tf.addresses import is_local, place
from align_tf.cli.common import (
    add_model_argument,
    import_tensorflow,
    load,
    print_table,
    say,
)
from align_tf.cli.plot import open_plots

TASKS = ("retrieval", "zero-shot", "knn", "linear-probe")
# option: the tasks it is for
OPTIONS = {
    "image_key": ("retrieval",),
    "caption_key": ("retrieval",),
    "plot": ("zero-shot", "knn", "linear-probe"),
    "labels": ("zero-shot",),
    "templates": ("zero-shot",),
    "train_data": ("knn", "linear-probe"),
}
# figure, column, how it is written
FIGURES = (
    ("r1", "R@1", "{:.1%}"),
    ("r5", "R@5", "{:.1%}"),
    ("r10", "R@10", "{:.1%}"),
    ("median_rank", "median rank", "{:g}"),
    ("mean_rank", "mean rank", "{:.1f}"),
    ("top1", "top-1", "{:.1%}"),
    ("top5", "top-5", "{:.1%}"),
    ("mean_per_class", "mean per class", "{:.1%}"),
    ("C", "C", "{:.3g}"),
)
WAYS = {"_i2t": "image to text", "_t2i": "text to image"}  # of retrieval
CLASSES_SHOWN = 20  # in the table, those that are told right least often
CONFUSION_SHOWN = 30  # classes of a picture, those of the most mistakes
MISTAKES_SHOWN = 3  # of a class
SKIPPED_NAMED = 5  # of the images that are left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_model_argument(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="for retrieval, images with captions (a folder with a .txt beside each, tar or "
        "TFRecord shards, a table); for the other tasks, a folder with a sub-folder for each class",
    )
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument(
        "--train-data",
        metavar="SOURCE",
        help="what kNN and the linear probe learn from (without it, four fifths of each class)",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="the classes of zero-shot (the sub-folders); or a file, one a line, "
        "FOLDER<TAB>LABEL where the two differ",
    )
    parser.add_argument(
        "--templates",
        metavar="FILE",
        help='wrap each label, one a line, such as "a photo of a {}."; '
        "imagenet takes the 80 of CLIP",
    )
    parser.add_argument("--image-key", metavar="NAME", help="the image's column, feature or key")
    parser.add_argument(
        "--caption-key",
        nargs="+",
        metavar="NAME",
        help="the captions' column or key; of several, retrieval also has the figures of each",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw which classes are taken for which, as a .png or .svg file",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: Any) -> int:
    for option, tasks in OPTIONS.items():
        if getattr(arguments, option) and arguments.task not in tasks:
            raise ValueError(
                f"--{option.replace('_', '-')}: of no use to --task {arguments.task}, "
                f"but to {' and '.join(tasks)}"
            )
    output = arguments.output and place(arguments.output)
    if output and is_local(output) and output.is_dir():
        raise ValueError(f"--output {output}: a folder, expected a file")
    opened = _open_early(arguments)
    model, processor = load(arguments.model)
    from align_tf.evaluation.tasks import evaluate
    from align_tf.files import write_text

    report = {
        "task": arguments.task,
        "model": arguments.model,
        "data": arguments.data,
        **evaluate(model, processor, arguments, opened),
    }
    if output:
        write_text(output, json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        _plot_confusion(report["per_class"], arguments.plot)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_figures(report)
        if "per_class" in report:
            _print_classes(report["per_class"])
    _say_skipped(report["skipped"])
    return 0


def _open_early(arguments: Any) -> dict[str, Any]:
    """Finds, before the model is loaded, what no model could make right."""
    if arguments.plot:
        open_plots(arguments.plot)
    if arguments.task in ("knn", "linear-probe"):
        from align_tf.evaluation.examples import require_sklearn

        require_sklearn()
    say(f"Looking at {arguments.data} ...")
    import_tensorflow()
    from align_tf.evaluation import tasks

    return tasks.read(arguments)


def _print_figures(report: dict) -> None:
    parts = {"all": report, **report.get("by_caption", {})}
    ways = WAYS if report["task"] == "retrieval" else {"": report["task"]}
    shown = [row for row in FIGURES if any(row[0] + way in report["metrics"] for way in ways)]
    rows = [
        [part, way, *(form.format(of["metrics"][figure + end]) for figure, _, form in shown)]
        for part, of in parts.items()
        for end, way in ways.items()
    ]
    columns = ["captions", "", *(title for _, title, _ in shown)]
    if len(parts) == 1:
        columns, rows = columns[1:], [row[1:] for row in rows]
    counts = [f"{value} {name}" for name, value in report.items() if isinstance(value, int)]
    title = f"{report['model']} on {report['data']}: {', '.join(counts).replace('_', ' ')}"
    print_table(title, columns, rows)


def _print_classes(figures: dict[str, dict]) -> None:
    rows = []
    for name, of in list(figures.items())[:CLASSES_SHOWN]:
        mistaken = list(of["mistaken_for"].items())
        said = ", ".join(f"{other} {count}" for other, count in mistaken[:MISTAKES_SHOWN])
        left = sum(count for _, count in mistaken[MISTAKES_SHOWN:])
        more = f", others {left}" if left else ""
        rows.append([name, str(of["images"]), f"{of['top1']:.1%}", said + more])
    title = "Each class"
    if len(figures) > CLASSES_SHOWN:
        title = (
            f"The {CLASSES_SHOWN} classes of {len(figures):,} that are told right least often; "
            "--output has all"
        )
    print_table(title, ["class", "images", "top-1", "mistaken for"], rows)


def _plot_confusion(figures: dict[str, dict], output: str) -> None:
    from align_tf import plots
    from align_tf.evaluation import confusion_matrix

    plots.save(plots.confusion(*confusion_matrix(figures, CONFUSION_SHOWN)), output)


def _say_skipped(skipped: dict[str, str]) -> None:
    if not skipped:
        return
    named = [f"{key} ({reason})" for key, reason in list(skipped.items())[:SKIPPED_NAMED]]
    more = f" and {len(skipped) - len(named)} more" if len(skipped) > len(named) else ""
    images = "1 image" if len(skipped) == 1 else f"{len(skipped)} images"
    say(f"align-tf: warning: left out {images}: {', '.join(named)}{more}")
