"""The command `align-tf`: a table of commands, each a file of its own."""

import atexit
import codecs
import gc
import io
import os
import sys
from typing import Any

from align_tf import addresses, interrupts
from align_tf.cli import (
    classify,
    convert,
    demo,
    embed,
    evaluate,
    export,
    index,
    interpolate,
    plot,
    push,
    quickstart,
    search,
    serve,
    tpu_check,
    train,
)
from align_tf.cli.common import EXIT_USER_ERROR
from align_tf.cli.parser import Parser, by_flags, check_spelling
from align_tf.files import check_local, check_writable, readable
from align_tf.terminal import say

# Nothing heavy is imported here or in a command's file: `align-tf --help` answers at once.

EXIT_INTERRUPTED = 130

# The arguments that are paths on this machine, or several.
PATHS = (
    *("output", "source", "data", "train_data", "images", "image", "embeddings", "index", "recipe"),
    *("html", "montage", "plot", "log", "program", "directory", "model_config_file", "config"),
    *("model", "processor", "base", "tuned", "folder"),
)

# Those that may be addresses, such as gs://bucket/x.
ADDRESSES = (
    *("output", "source", "data", "embeddings", "index", "recipe"),
    *("model", "processor", "base", "tuned"),
)

# Those that are written, and of these the ones that are a file each.
FILES = ("html", "montage", "plot", "program")
WRITTEN = ("output", *FILES)

# Those that are texts.
TEXTS = ("labels", "texts", "text", "add", "subtract", "template")

# command: (its file, with add_arguments and run; what it does)
COMMANDS = {
    "quickstart": (quickstart, "the main job, end to end, on the bundled checkpoint"),
    "classify": (classify, "zero-shot classification of image files"),
    "evaluate": (evaluate, "retrieval, zero-shot, kNN or linear-probe figures"),
    "export": (export, "write a SavedModel for TensorFlow Serving, or files for ONNX or LiteRT"),
    "convert": (convert, "convert a checkpoint into another format"),
    "interpolate": (interpolate, "a model between one and those fine-tuned from it"),
    "train": (train, "train by a recipe, or go on with a training"),
    "tpu-check": (tpu_check, "what a training takes on TPUs, by their compiler, without one"),
    "push": (push, "upload a model, an adapter or an export to the Hugging Face hub"),
    "embed": (embed, "embed a collection of images into Parquet shards"),
    "index": (index, "build a FAISS index over embedded images"),
    "search": (search, "find images by a text, an image, or both"),
    "serve": (serve, "serve SavedModels over gRPC and REST, on one machine"),
    "demo": (demo, "a web page: classify and search by pictures and words"),
    "plot": (plot, "draw similarities, embeddings or the curves of a training"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        Exit code: 0, 2 for a mistake of the user's, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    _open_standard_streams()
    _write_any_text()
    parser = _parser()
    check_spelling(parser, argv)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow takes oneDNN's kernels by itself on newer processors alone (AVX512_VNNI), and they
    # are faster with AVX2 too.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # TensorFlow, models and graphs are a million objects that stay. Python's collector would go
    # through them again and again while they are made, and once more at the end.
    gc.set_threshold(100_000, 20, 10)
    atexit.register(gc.freeze)
    try:
        _check_paths(arguments)
        _check_texts(arguments)
        with interrupts.noted():
            return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        say("align-tf: stopped")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        sys.stdout = None
        return 0
    except (OSError, ValueError, ModuleNotFoundError) as error:
        message = addresses.as_named(str(error))
        say(f"align-tf: error: {by_flags(message, arguments.flags())}")
        return EXIT_USER_ERROR


def _write_any_text() -> None:
    """Has stdout take names that are not UTF-8, and what its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf_8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf_8 else "backslashreplace")


def _check_paths(arguments: Any) -> None:
    for name in PATHS:
        given = getattr(arguments, name, None)
        for path in [given] if isinstance(given, str) else given or []:
            if not path:
                raise ValueError(f"{name}: an empty name; expected a path")
            (addresses.check if name in ADDRESSES else check_local)(path)
            if name in WRITTEN:
                check_writable(path)
            if name in FILES and os.path.isdir(path):
                raise IsADirectoryError(f"{path}: a folder; expected a file")


def _check_texts(arguments: Any) -> None:
    for name in TEXTS:
        given = getattr(arguments, name, None)
        for text in [given] if isinstance(given, str) else given or []:
            if readable(text) is not text and not os.path.exists(text):
                shown = arguments.flags().get(name, name.upper())
                raise ValueError(f"{shown}: {text!r} is not UTF-8")


def _open_standard_streams() -> None:
    """Has the streams that a shell closed (`2>&-`) lead nowhere: files would take their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _parser() -> Parser:
    parser = Parser(
        prog="align-tf",
        description="ALIGN for TensorFlow and Keras: classify, train, export and serve.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.set_defaults(
        run=lambda arguments: _print_version_or_help(parser, arguments), flags=parser.flags
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (command, text) in COMMANDS.items():
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=command.run, flags=added.flags)
        command.add_arguments(added)
    return parser


def _print_version_or_help(parser: Parser, arguments: Any) -> int:
    if arguments.version:
        from align_tf import __version__

        print(__version__)
        return 0
    parser.print_help(sys.stderr)
    return EXIT_USER_ERROR
