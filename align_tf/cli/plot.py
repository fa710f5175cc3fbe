"""`align-tf plot`: similarities, embeddings, the curves of a training."""

import argparse
import logging
import os
import pathlib
from typing import Any

from align_tf.cli.common import (
    add_model_argument,
    count,
    load,
    say,
)
from align_tf.cli.pictures import find_pictures
from align_tf.terminal import literal

PICTURE_SIDE = 96  # pixels, of an image beside its row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    kinds = parser.add_subparsers(title="plots", metavar="PLOT", required=True)

    def kind(name: str, draw: Any, text: str) -> argparse.ArgumentParser:
        added = kinds.add_parser(name, help=text, description=text)
        added.set_defaults(draw=draw)
        added.add_argument("--output", required=True, metavar="FILE", help="a .png or .svg file")
        return added

    heatmap = kind("heatmap", _plot_heatmap, "the similarity of images and texts")
    heatmap.add_argument("--images", nargs="+", required=True, metavar="IMAGE")
    heatmap.add_argument("--texts", nargs="+", required=True, metavar="TEXT")
    add_model_argument(heatmap)
    embeddings = kind("embeddings", _plot_embeddings, "the images of a collection in the plane")
    embeddings.add_argument("embeddings", metavar="DIR", help="the folder that embed wrote")
    embeddings.add_argument("--method", choices=("pca", "tsne"), default="pca")
    embeddings.add_argument(
        "--color-by",
        choices=("folder", "caption"),
        help="what the labels are (the folders of the images if they differ, else the captions)",
    )
    embeddings.add_argument(
        "--max-images", type=count, default=5000, metavar="N", help="drawn at most (5000)"
    )
    curves = kind("curves", _plot_curves, "the curves of a training")
    curves.add_argument("log", metavar="DIR", help="the folder that train wrote")


def run(arguments: Any) -> int:
    return arguments.draw(arguments)


def _plot_heatmap(arguments: Any) -> int:
    plots = open_plots(arguments.output)
    images = find_pictures(arguments.images)
    model, processor = load(arguments.model)
    from align_tf.search.encoder import Encoder

    encoder = Encoder(model, processor)
    similarities = encoder.embed_images(images) @ encoder.embed_texts(arguments.texts).T
    from align_tf.search.thumbnail import thumbnail

    pictures = [thumbnail(path, PICTURE_SIDE) for path in images]
    names = [pathlib.Path(path).stem for path in images]
    figure = plots.heatmap(similarities, names, arguments.texts, pictures)
    return _save_plot(figure, arguments.output)


def _plot_embeddings(arguments: Any) -> int:
    plots = open_plots(arguments.output)
    plots.require_sklearn()
    from align_tf.search.collection import Collection

    collection = Collection(arguments.embeddings)
    embeds, labels = collection.labelled(arguments.max_images, arguments.color_by)
    if len(embeds) < collection.rows:
        say(f"Drawing {len(embeds):,} of {collection.rows:,} images")
    return _save_plot(plots.embeddings(embeds, labels, arguments.method), arguments.output)


def _plot_curves(arguments: Any) -> int:
    plots = open_plots(arguments.output)
    lines = plots.read_metrics(arguments.log)
    figure = plots.curves(lines, title=os.path.basename(os.path.abspath(arguments.log)))
    return _save_plot(figure, arguments.output)


def open_plots(output: str) -> Any:
    """Returns `align_tf.plots` where it can draw, and can write a file of that name."""
    from align_tf import plots

    if os.path.isdir(output):
        raise IsADirectoryError(f"--output {output}: a folder; expected a .png or .svg file")
    plots.check_suffix(output)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its caches are no one's concern
    plots.require_matplotlib()
    return plots


def _save_plot(figure: Any, output: str) -> int:
    from align_tf import plots

    plots.save(figure, output)
    print(literal(output))
    return 0
