"""`align-tf index`: a FAISS index over embedded images."""

import argparse
import json
from typing import Any

from align_tf.cli.common import hint, say
from align_tf.terminal import literal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("embeddings", metavar="DIR", help="the folder that embed wrote")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder of the index")
    parser.add_argument(
        "--kind", choices=("flat", "ivf"), help="flat up to 100,000 images, ivf above"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(arguments: Any) -> int:
    from align_tf.search.index import build_index

    about = build_index(arguments.embeddings, arguments.output, kind=arguments.kind, progress=True)
    how = "flat: each vector is compared"
    if about["kind"] == "ivf":
        how = f"ivf: {about['nprobe']} of {about['nlist']} lists are searched"
    say(f"Chose {how}")
    if arguments.json:
        print(json.dumps(about, indent=2))
    else:
        recall = ", ".join(f"{v:.1%} ({name})" for name, v in about["recall_at_10"].items())
        print(f"{literal(arguments.output)}: {about['rows']:,} images, recall@10 {recall}")
    hint("align-tf search", arguments.output, "a red car")
    return 0
