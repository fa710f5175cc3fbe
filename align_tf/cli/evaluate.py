"""`align-tf evaluate`: retrieval, zero-shot, kNN and linear-probe figures."""

import argparse
import json
import pathlib
from typing import Any

from align_tf.cli.common import (
    add_model_argument,
    import_tensorflow,
    load,
    print_table,
    say,
)

TASKS = ("retrieval", "zero-shot", "knn", "linear-probe")
# option: the tasks it is for
OPTIONS = {
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
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: Any) -> int:
    for option, tasks in OPTIONS.items():
        if getattr(arguments, option) and arguments.task not in tasks:
            raise ValueError(
                f"--{option.replace('_', '-')}: of no use to --task {arguments.task}, "
                f"but to {' and '.join(tasks)}"
            )
    output = arguments.output and pathlib.Path(arguments.output)
    if output and output.is_dir():
        raise ValueError(f"--output {output}: a folder, expected a file")
    _check_early(arguments)
    model, processor = load(arguments.model)
    from align_tf.evaluation.tasks import evaluate
    from align_tf.files import write_text

    report = {
        "task": arguments.task,
        "model": arguments.model,
        "data": arguments.data,
        **evaluate(model, processor, arguments),
    }
    if output:
        write_text(output, json.dumps(report, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_figures(report)
    _say_skipped(report["skipped"])
    return 0


def _check_early(arguments: Any) -> None:
    """Finds, before the model is loaded, what no model could make right."""
    say(f"Looking at {arguments.data} ...")
    import_tensorflow()
    from align_tf.evaluation import examples, tasks

    if arguments.task == "retrieval":
        return  # which reads its records as it goes
    if arguments.task == "zero-shot":
        tasks.read_templates(arguments.templates)
    else:
        examples.require_sklearn()
    folders = tasks.class_folders(arguments.data)
    if arguments.task == "zero-shot":
        tasks.class_labels(arguments.labels, list(folders))
    if arguments.train_data:
        tasks.class_folders(arguments.train_data)


def _print_figures(report: dict) -> None:
    metrics = report["metrics"]
    ways = {"_i2t": "image to text", "_t2i": "text to image"}
    if report["task"] != "retrieval":
        ways = {"": report["task"]}
    shown = [row for row in FIGURES if any(row[0] + way in metrics for way in ways)]
    rows = [
        [name, *(form.format(metrics[figure + way]) for figure, _, form in shown)]
        for way, name in ways.items()
    ]
    counts = [f"{value} {name}" for name, value in report.items() if isinstance(value, int)]
    title = f"{report['model']} on {report['data']}: {', '.join(counts).replace('_', ' ')}"
    print_table(title, ["", *(title for _, title, _ in shown)], rows)


def _say_skipped(skipped: dict[str, str]) -> None:
    if not skipped:
        return
    named = [f"{key} ({reason})" for key, reason in list(skipped.items())[:SKIPPED_NAMED]]
    more = f" and {len(skipped) - len(named)} more" if len(skipped) > len(named) else ""
    images = "1 image" if len(skipped) == 1 else f"{len(skipped)} images"
    say(f"align-tf: warning: left out {images}: {', '.join(named)}{more}")
