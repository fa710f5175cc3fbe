"""`align-tf classify`: zero-shot classification of image files."""

import argparse
import csv
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from align_tf.cli.common import (
    EXIT_USER_ERROR,
    add_model_argument,
    count,
    load,
    print_table,
    probabilities,
    say,
)
from align_tf.cli.pictures import find_pictures, looks_like_a_photograph
from align_tf.data.label_files import is_file_of_labels, read_labels
from align_tf.terminal import literal

IMAGES_AT_ONCE = 32  # images classified at a time
SHOWN = 5  # labels of an image in the table, without --top


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder with all that is in it, a glob in quotes, or - for a list of paths "
        "on stdin, one a line",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        required=True,
        metavar="LABEL",
        help="what to choose from; one that is given twice counts once; or a file "
        "of them, one a line, or a .csv with a column label. Images come before it, or after it "
        "behind a --",
    )
    parser.when_missing = (
        "; where images come after --labels, a -- has to stand between: "
        '--labels "a cat" "a dog" -- photo.jpg'
    )
    parser.add_argument(
        "--template", default="{}", help='wraps each label, such as "a photo of a {}"'
    )
    parser.add_argument(
        "--top",
        type=count,
        metavar="N",
        help=f"how many labels of each image are given, the likeliest ({SHOWN} in the table, else "
        "all)",
    )
    add_model_argument(parser)
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument(
        "--json",
        action="store_true",
        help="print the results as JSON: of each image the probability of each distinct label",
    )
    machine.add_argument(
        "--csv", action="store_true", help="print them as CSV: image, label, probability"
    )


def run(arguments: Any) -> int:
    labels = _read_labels(arguments.labels)
    if "{}" not in arguments.template:
        raise ValueError(f"--template {arguments.template!r}: expected a {{}} for the label")
    images = find_pictures(arguments.images)
    model, processor = load(arguments.model)
    prompts = [arguments.template.replace("{}", label) for label in labels]
    results, broken = [], []
    for path, probs in _classified(model, processor, images, prompts):
        if isinstance(probs, ValueError):
            broken.append(str(probs))
        else:
            given = dict(zip(labels, map(float, probs), strict=True))
            results.append({"image": path, "probs": _top(given, arguments.top)})
    if arguments.json:
        print(json.dumps(results, indent=2))
    elif arguments.csv:
        _print_csv(results)
    elif results:
        _print_probabilities(results, len(dict.fromkeys(labels)), arguments.top or SHOWN)
    _say_limits(arguments.model, labels, results)
    for message in broken:
        say(f"align-tf: error: {message}")
    return EXIT_USER_ERROR if broken else 0


def _read_labels(given: list[str]) -> list[str]:
    """Returns the labels, or those that a file alone lists."""
    listed = is_file_of_labels(given)
    labels = [label for _, label in read_labels(given[0])] if listed else given
    for place, label in enumerate(labels, start=1):
        if not label.strip():
            raise ValueError(f"--labels: label {place} of {len(labels)} is blank, expected a text")
        if not listed and pathlib.Path(label).suffix and pathlib.Path(label).is_file():
            raise ValueError(
                f"--labels: {label!r} is a file; expected labels, or one file of them alone; "
                "images come before --labels, or after the labels behind a --"
            )
    return labels


def _classified(model: Any, processor: Any, paths: list, prompts: list[str]) -> Iterator[tuple]:
    """Yields each path with its probabilities, or with the error that its file gave."""
    from align_tf.files import CheckpointError
    from align_tf.progress import track

    batches = [
        paths[start : start + IMAGES_AT_ONCE] for start in range(0, len(paths), IMAGES_AT_ONCE)
    ]
    for batch in track(batches, "Classifying", show=len(batches) > 1):
        try:
            yield from zip(batch, probabilities(model, processor, batch, prompts), strict=True)
        except CheckpointError:  # of the model, whatever the file
            raise
        except ValueError as error:
            if len(batch) == 1:
                yield batch[0], error
            else:  # one file is broken: the others are answered all the same
                for path in batch:
                    yield from _classified(model, processor, [path], prompts)


def _ranked(probs: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(probs.items(), key=lambda item: -item[1])


def _top(probs: dict[str, float], count: int | None) -> dict[str, float]:
    """Returns the likeliest labels, the first first; None returns all as they were given."""
    return probs if count is None else dict(_ranked(probs)[:count])


def _print_csv(results: list[dict]) -> None:
    shown = literal if sys.stdout.isatty() else str  # to a file or a program all as it is
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "label", "probability"])
    for result in results:
        image = shown(result["image"])
        writer.writerows([image, shown(label), prob] for label, prob in _ranked(result["probs"]))


def _print_probabilities(results: list[dict], label_count: int, shown: int) -> None:
    rows = []
    for result in results:
        ranked = _ranked(result["probs"])[:shown]
        lines = [f"{prob:6.1%}  {literal(label)}" for label, prob in ranked]
        if label_count > shown:
            lines.append(f"        {label_count - shown:,} more")
        rows.append([literal(result["image"]), "\n".join(lines)])
    print_table("Zero-shot classification", ["image", "probability and label"], rows)


def _say_limits(model: str, labels: list[str], results: list[dict]) -> None:
    """Says where the figures tell less than they seem to."""
    if len(set(labels)) == 1:
        way = "give others to choose from"
        if "," in labels[0]:
            way = 'spaces set labels apart, not commas: "a cat" "a dog"'
        say(f"Note: one label alone always has 100 %; {way}")
    if model != "align-tiny":
        return
    looked_at = [result["image"] for result in results[:IMAGES_AT_ONCE]]
    photograph = next(filter(looks_like_a_photograph, looked_at), None)
    if photograph is not None:
        say(
            f"Note: align-tiny knows emoji and pictures like them alone, and {photograph} looks "
            "like a photograph; --model kakaobrain/align-base is for those"
        )
