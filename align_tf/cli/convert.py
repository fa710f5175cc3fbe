"""`align-tf convert`: a checkpoint into another format."""

import argparse
import json
import pathlib
from typing import Any

from align_tf.cli.common import import_tensorflow, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="SOURCE",
        help="a checkpoint folder or id, align-tiny, a .keras file, or the folder or prefix of a "
        "checkpoint of the original training code",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "keras", "savedmodel"),
        help="a folder for transformers, a .keras file, or a folder for TensorFlow Serving",
    )
    parser.add_argument("--output", required=True, metavar="PATH", help="the folder or file")
    parser.add_argument(
        "--config", metavar="FILE", help="keys of config.json that go before the checkpoint's own"
    )
    parser.add_argument(
        "--processor",
        metavar="DIR_OR_ID",
        help="where the tokenizer and image settings come from if not from the checkpoint, such "
        "as bert-base-uncased; image settings that neither has are align-base's",
    )
    parser.add_argument(
        "--image-mode",
        choices=("hf", "original"),
        help="resize as transformers does (the default for an original checkpoint), or as the "
        "original training code did",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights written"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that is there"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="read and check everything, write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(arguments: Any) -> int:
    say(f"Converting {arguments.source} ...")
    import_tensorflow()
    from align_tf import files
    from align_tf.export.convert import convert, describe

    config = arguments.config and files.read_json(pathlib.Path(arguments.config))
    summary = convert(
        arguments.source,
        arguments.to,
        arguments.output,
        config=config,
        processor=arguments.processor,
        image_mode=arguments.image_mode,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
    )
    for note in summary["notes"]:
        say(f"Note: {note}")
    print(json.dumps(summary, indent=2) if arguments.json else describe(summary))
    return 0
