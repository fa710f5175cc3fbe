"""`align-tf export`: a SavedModel for TensorFlow Serving, or LiteRT files for a phone."""

import argparse
from typing import Any

from align_tf.cli.common import add_model_argument, hint, load, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_model_argument(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="the model's folder")
    parser.add_argument(
        "--format",
        choices=("saved_model", "litert"),
        default="saved_model",
        help="litert: each tower as a .tflite file, for phones",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="weights of the SavedModel (float32)",
    )
    parser.add_argument("--quantize", choices=("int8",), help="weights of --format litert")


def run(arguments: Any) -> int:
    if arguments.quantize and arguments.format != "litert":
        raise ValueError(f"--quantize {arguments.quantize}: only with --format litert")
    if arguments.dtype and arguments.format == "litert":
        raise ValueError(f"--dtype {arguments.dtype}: not with --format litert")
    model, processor = load(arguments.model)
    if arguments.format == "litert":
        return _export_litert(model, processor, arguments.output, arguments.quantize)
    from align_tf import export_saved_model

    say("Exporting ...")
    print(export_saved_model(model, processor, arguments.output, dtype=arguments.dtype))
    hint("align-tf serve", arguments.output)
    return 0


def _export_litert(model: Any, processor: Any, output: str, quantize: str | None) -> int:
    from align_tf.export import litert

    folder = litert.export_litert(model, processor, output, quantize=quantize, progress=True)
    try:
        figures = litert.compare_litert(folder, model, processor)
    except ModuleNotFoundError as error:
        say(f"Note: not compared with the model; {error}")
        figures = {}
    for file, row in figures.items():
        size, cosine = row["bytes"] / 1e6, row["cosine"]
        say(f"{file}: {size:.1f} MB, cosine to the model {cosine:.5f} or more on six examples")
    print(folder)
    return 0
