"""`align-tf search`: images by a text, an image, or both."""

import argparse
import json
import os
from typing import Any

from align_tf.addresses import is_remote
from align_tf.cli.common import (
    count,
    import_tensorflow,
    print_table,
    say,
)

CAPTION_SHOWN = 200  # characters in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("index", metavar="INDEX", help="the folder that index wrote")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what the images show")
    parser.add_argument("--image", metavar="FILE", help="a picture like them")
    for sign, what in (("add", "towards"), ("subtract", "away from")):
        parser.add_argument(
            f"--{sign}",
            nargs="+",
            default=[],
            action="extend",
            metavar="TEXT",
            help=f"move the query {what} these texts",
        )
    parser.add_argument("-k", type=count, default=10, metavar="N", help="how many (10)")
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="the model that embedded the collection (its name)"
    )
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        help="show the pictures below it (the folder that was embedded, of an index of yours)",
    )
    parser.add_argument("--html", metavar="FILE", help="also write a page with the pictures")
    parser.add_argument("--montage", metavar="FILE", help="also write the pictures as a PNG")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: Any) -> int:
    query = {name: getattr(arguments, name) for name in ("text", "image", "add", "subtract")}
    if arguments.text is None and arguments.image is None:
        raise ValueError("expected a TEXT or --image, or both")
    from align_tf.search import gallery
    from align_tf.search.index import Index

    index = Index(arguments.index, arguments.pictures)
    import_tensorflow()
    from align_tf.search.searcher import Searcher

    say(f"Loading {arguments.model or index.about['model']} ...")
    hits = Searcher(index, model=arguments.model).search(**query, k=arguments.k)
    said = gallery.describe(**query)
    if arguments.html:
        gallery.write_html(arguments.html, said, hits, arguments.image)
    if arguments.montage:
        gallery.write_montage(arguments.montage, said, hits)
    if arguments.json:
        fields = ("score", "id", "path", "caption")
        results = [{name: getattr(hit, name) for name in fields} for hit in hits]
        print(json.dumps({"query": said, "results": results}, indent=2))
    else:
        rows = [
            [f"{hit.score:.3f}", hit.id, _cut(hit.caption or ""), _short(hit.path or "")]
            for hit in hits
        ]
        print_table(said, ["cosine", "id", "caption", "file"], rows)
    if arguments.html or arguments.montage:
        _say_outside(hits)
    _say_gone(hits)
    return 0


def _say_outside(hits: list) -> None:
    outside = [hit.path for hit in hits if hit.outside]
    if outside:
        say(
            f"align-tf: warning: {len(outside)} of {len(hits)} pictures are not shown, such as "
            f"{outside[0]}: not below the folder that you embedded; --pictures DIR shows those "
            "below another"
        )


def _say_gone(hits: list) -> None:
    gone = [
        hit.path
        for hit in hits
        if hit.path and not (is_remote(hit.path) or os.path.isfile(hit.path))
    ]
    if gone:
        say(
            f"align-tf: warning: {len(gone)} of {len(hits)} pictures are gone, such as {gone[0]}; "
            "expected the collection embedded and indexed again"
        )


def _cut(caption: str) -> str:
    """Writes a caption in one line that is not too long."""
    line = " ".join(caption.split())
    return line if len(line) <= CAPTION_SHOWN else line[: CAPTION_SHOWN - 1] + "…"


def _short(path: str) -> str:
    """Writes a path as seen from here, where that is shorter."""
    if not path or is_remote(path):
        return path
    return min(path, os.path.relpath(path), key=len)
