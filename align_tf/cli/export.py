"""`align-tf export`: a SavedModel for TensorFlow Serving, LiteRT files for a phone, or ONNX."""

import argparse
from typing import Any

from align_tf.addresses import place
from align_tf.cli.common import add_model_argument, hint, load, say
from align_tf.files import check_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_model_argument(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="the model's folder")
    parser.add_argument(
        "--format",
        choices=("saved_model", "litert", "onnx"),
        default="saved_model",
        help="litert: each tower as a .tflite file, for phones; onnx: as a .onnx file, for ONNX "
        "Runtime and OpenVINO",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="weights of the SavedModel (float32)",
    )
    parser.add_argument(
        "--quantize", choices=("int8",), help="weights of --format litert, or of onnx's text tower"
    )


def run(arguments: Any) -> int:
    check_folder(place(arguments.output))
    if arguments.format == "saved_model":
        return _export_saved_model(arguments)
    if arguments.dtype:
        raise ValueError(f"--dtype {arguments.dtype}: not with --format {arguments.format}")
    if arguments.format == "onnx":
        from align_tf.export.onnx_graph import check_free, check_installed

        check_installed(arguments.quantize)
        check_free(place(arguments.output))
    return _export_towers(arguments)


def _export_saved_model(arguments: Any) -> int:
    if arguments.quantize:
        raise ValueError(f"--quantize {arguments.quantize}: only with --format litert or onnx")
    model, processor = load(arguments.model)
    from align_tf import export_saved_model

    say("Exporting ...")
    print(export_saved_model(model, processor, arguments.output, dtype=arguments.dtype))
    hint("align-tf serve", arguments.output)
    return 0


def _export_towers(arguments: Any) -> int:
    model, processor = load(arguments.model)
    from align_tf import export

    # format: what writes it, what compares it with the model
    export_to, compare = {
        "litert": (export.export_litert, export.compare_litert),
        "onnx": (export.export_onnx, export.compare_onnx),
    }[arguments.format]
    folder = export_to(
        model, processor, arguments.output, quantize=arguments.quantize, progress=True
    )
    try:
        figures = compare(folder, model, processor)
    except ModuleNotFoundError as error:
        say(f"Note: not compared with the model; {error}")
        figures = {}
    for file, row in figures.items():
        size, cosine = row["bytes"] / 1e6, row["cosine"]
        say(f"{file}: {size:.1f} MB, cosine to the model {cosine:.5f} or more on six examples")
    print(folder)
    return 0
