"""`align-tf embed`: a collection of images into Parquet shards."""

import argparse
import json
from typing import Any

from align_tf.cli.common import add_model_argument, count, hint, import_tensorflow, say
from align_tf.terminal import literal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images, tar or TFRecord shards, a table of paths, Parquet, a glob",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder of the shards")
    add_model_argument(parser)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--batch-size", type=count, metavar="N", help="images embedded at a time")
    parser.add_argument("--shard-size", type=count, metavar="N", help="records of a shard")
    parser.add_argument(
        "--engine",
        choices=("default", "ray"),
        default="default",
        help="this process, or Ray Data: the cluster of RAY_ADDRESS, or this machine",
    )
    parser.add_argument(
        "--workers", type=count, default=2, metavar="N", help="processes of Ray (2)"
    )
    parser.add_argument("--image-key", metavar="NAME", help="the image's column, feature or key")
    parser.add_argument("--caption-key", metavar="NAME", help="the caption's")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(arguments: Any) -> int:
    from align_tf.search.required import require_pyarrow, require_ray

    require_pyarrow()
    if arguments.engine == "ray":
        require_ray()
    say(f"Loading {arguments.model} ...")
    import_tensorflow()
    from align_tf.search.embedding import embed

    names = ("model", "dtype", "engine", "workers", "image_key", "caption_key")
    options = {name: getattr(arguments, name) for name in names}
    for name in ("batch_size", "shard_size"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    summary = embed(arguments.source, arguments.output, **options)
    if summary["skipped"]:
        say(f"align-tf: warning: left out {summary['skipped']} of {summary['records']} records")
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        counts = f"{summary['images']:,} images, {summary['dim']} dimensions"
        print(f"{literal(arguments.output)}: {counts}")
    output = arguments.output.rstrip("/")
    hint("align-tf index", arguments.output, "--output", f"{output}-index")
    return 0
