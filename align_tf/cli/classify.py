"""`align-tf classify`: zero-shot classification of image files."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from align_tf.cli.common import (
    EXIT_USER_ERROR,
    add_model_argument,
    check_files,
    load,
    print_table,
    probabilities,
    say,
)

IMAGES_AT_ONCE = 32  # images classified at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--labels",
        nargs="+",
        required=True,
        metavar="LABEL",
        help="what to choose from; one that is given twice counts once",
    )
    parser.add_argument(
        "--template", default="{}", help='wraps each label, such as "a photo of a {}"'
    )
    add_model_argument(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the results as JSON: of each image the probability of each distinct label",
    )


def run(arguments: Any) -> int:
    if "{}" not in arguments.template:
        raise ValueError(f"--template {arguments.template!r}: expected a {{}} for the label")
    check_files(arguments.images)
    model, processor = load(arguments.model)
    prompts = [arguments.template.replace("{}", label) for label in arguments.labels]
    results, broken = [], []
    for path, probs in _classified(model, processor, arguments.images, prompts):
        if isinstance(probs, ValueError):
            broken.append(str(probs))
        else:
            ranked = dict(zip(arguments.labels, map(float, probs), strict=True))
            results.append({"image": path, "probs": ranked})
    if arguments.json:
        print(json.dumps(results, indent=2))
    elif results:
        _print_probabilities(results)
    for message in broken:
        say(f"align-tf: error: {message}")
    return EXIT_USER_ERROR if broken else 0


def _classified(model: Any, processor: Any, paths: list, prompts: list[str]) -> Iterator[tuple]:
    """Yields each path with its probabilities, or with the error that its file gave."""
    from align_tf.progress import track

    batches = [
        paths[start : start + IMAGES_AT_ONCE] for start in range(0, len(paths), IMAGES_AT_ONCE)
    ]
    for batch in track(batches, "Classifying", show=len(batches) > 1):
        try:
            yield from zip(batch, probabilities(model, processor, batch, prompts), strict=True)
        except ValueError as error:
            if len(batch) == 1:
                yield batch[0], error
            else:  # one file is broken: the others are answered all the same
                for path in batch:
                    yield from _classified(model, processor, [path], prompts)


def _print_probabilities(results: list[dict]) -> None:
    rows = []
    for result in results:
        ranked = sorted(result["probs"].items(), key=lambda item: -item[1])
        lines = "\n".join(f"{prob:6.1%}  {label}" for label, prob in ranked[:5])
        rows.append([result["image"], lines])
    print_table("Zero-shot classification", ["image", "probability and label"], rows)
