"""Plots: similarities of images and texts, embeddings in the plane, the curves of a training."""

import collections
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from align_tf import files
from align_tf.extras import extra

SUFFIXES = (".png", ".svg")
METHODS = ("pca", "tsne")
DPI = 150

# Okabe and Ito's palette, told apart by the color-blind; what is beyond it is gray.
COLORS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"),
    *("#7f3c8d", "#8c564b", "#1b1b1b"),
)
OTHERS = "#c3c8cf"
GRID = "#e3e6ea"

CELL = 0.62  # inches, of a heat map
NUMBERED = 16  # a heat map of up to so many rows and columns has its numbers written in
NAME_LENGTH = 32  # characters of an image's name or a text
PERPLEXITY = 30.0  # of t-SNE, at most

# Panels of a training: title, the values of metrics.jsonl
PANELS = (
    ("loss", ("loss", "loss_i2t", "loss_t2i")),
    ("accuracy within the batch", ("accuracy_i2t", "accuracy_t2i")),
    ("validation: recall", ("val_r1_i2t", "val_r1_t2i", "val_r5_i2t", "val_r5_t2i")),
    ("validation: median rank", ("val_median_rank_i2t", "val_median_rank_t2i")),
    ("temperature", ("temperature",)),
    ("learning rate", ("learning_rate",)),
    ("images per second", ("images_per_second",)),
)


def heatmap(
    similarities: Any, names: Sequence[str], texts: Sequence[str], pictures: Sequence[Any] = ()
) -> Any:
    """Draws the similarity of images, the rows, and texts, the columns.

    Args:
        similarities: (n, m), such as cosines.
        names: of the images (n).
        texts: the texts (m).
        pictures: RGB arrays or PIL images (n) to stand beside their rows; may be empty.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: the numbers do not fit.
    """
    values = np.asarray(similarities, float)
    if values.shape != (len(names), len(texts)) or not values.size:
        raise ValueError(
            f"similarities of shape {values.shape}: expected ({len(names)}, {len(texts)}), one or "
            "more of each"
        )
    rows, columns = values.shape
    figure = _figure(max(columns * CELL, 1.5) + 3.2, max(rows * CELL, 1.2) + 2.4)
    axes = figure.add_subplot()
    drawn = axes.imshow(values, cmap="Blues", aspect="equal")
    axes.set_xticks(range(columns), map(_short, texts), rotation=35, ha="left", va="bottom")
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(range(rows), map(_short, names))
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.xaxis.tick_top()
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, pad=4)
    axes.spines[:].set_visible(False)
    if max(rows, columns) <= NUMBERED:
        _write_numbers(axes, values)
    for row, picture in enumerate(pictures):
        _place(axes, row, picture)
    if len(pictures):
        axes.tick_params(axis="y", pad=40)
    bar = figure.colorbar(drawn, cax=axes.inset_axes([1 + 0.3 / columns, 0, 0.25 / columns, 1]))
    bar.set_label("cosine")
    bar.outline.set_visible(False)
    return figure


def _write_numbers(axes: Any, values: np.ndarray) -> None:
    middle = (values.min() + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > middle else "#1c2430"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)


def _place(axes: Any, row: int, picture: Any) -> None:
    """Puts a picture between a row and its name."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    array = np.asarray(picture)
    box = OffsetImage(array, zoom=26 / max(array.shape[:2]))
    where = {"xycoords": ("axes fraction", "data"), "boxcoords": "offset points"}
    axes.add_artist(AnnotationBbox(box, (0, row), (-20, 0), frameon=False, **where))


def embeddings(embeds: Any, labels: Sequence[str], method: str = "pca", seed: int = 0) -> Any:
    """Draws embeddings in the plane, colored by their labels.

    Args:
        embeds: (n, d).
        labels: (n); those beyond the ten that occur most are gray.
        method: `pca`, the two directions of the largest variance, or `tsne`, t-SNE of cosine
            distances (van der Maaten and Hinton, 2008).
        seed: of t-SNE.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: there are fewer than three, or the labels are not as many.
        ModuleNotFoundError: scikit-learn or matplotlib is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected {' or '.join(METHODS)}")
    embeds = np.asarray(embeds, np.float32)
    if embeds.ndim != 2 or len(embeds) < 3 or len(labels) != len(embeds):
        raise ValueError(
            f"embeddings of shape {embeds.shape}, {len(labels)} labels: expected three or more, "
            "and a label for each"
        )
    figure = _figure(7.5, 5.5)
    axes = figure.add_subplot()
    points, names = _project(embeds, method, seed)
    counts = collections.Counter(labels)
    shown = [label for label, _ in counts.most_common(len(COLORS))]
    labels = np.array(labels, object)
    size = float(np.clip(4000 / len(points), 3, 36))
    for label, color in zip(shown, COLORS, strict=False):
        own = points[labels == label]
        axes.scatter(*own.T, s=size, c=color, label=_short(str(label)), linewidths=0, alpha=0.85)
    others = ~np.isin(labels, shown)
    if others.any():
        left = f"{len(counts) - len(shown)} other labels"
        axes.scatter(*points[others].T, s=size, c=OTHERS, label=left, linewidths=0, zorder=0)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    _clear(axes)
    if method == "tsne":  # its axes have no meaning
        axes.set_xticks([])
        axes.set_yticks([])
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, markerscale=1.5)
    return figure


def _project(embeds: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    with extra("plot", "a plot of embeddings needs scikit-learn"):
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    if method == "pca":
        fitted = PCA(2, random_state=seed)
        points = fitted.fit_transform(embeds)
        shares = fitted.explained_variance_ratio_
        return points, tuple(
            f"PC {i}: {share:.0%} of variance" for i, share in enumerate(shares, 1)
        )
    perplexity = min(PERPLEXITY, (len(embeds) - 1) / 3)
    tsne = TSNE(2, metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return tsne.fit_transform(embeds), ("t-SNE 1", "t-SNE 2")


def curves(lines: Sequence[dict[str, float]], title: str = "") -> Any:
    """Draws the curves of a training.

    Args:
        lines: the lines of `metrics.jsonl`, as `read_metrics` gives them.
        title: of the figure.

    Returns:
        A matplotlib Figure, a panel for each kind of value that is there.

    Raises:
        ValueError: there is nothing to draw.
    """
    known = {key for line in lines for key in line}
    panels = [(name, [key for key in keys if key in known]) for name, keys in PANELS]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        raise ValueError("the log holds no line with a loss or another value to draw")
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = _figure(4.2 * across, 3.0 * down)
    figure.suptitle(title)
    for place, (name, keys) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place)
        for key, color in zip(keys, COLORS, strict=False):
            points = [(line["step"], line[key]) for line in lines if key in line]
            mark = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), color=color, label=key, marker=mark)
        axes.set_title(name, fontsize=10)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.set_xlabel("step")
        _clear(axes)
        if len(keys) > 1:
            axes.legend(frameon=False, fontsize=8)
    return figure


def read_metrics(run: str | os.PathLike) -> list[dict[str, float]]:
    """Reads the log of a training.

    Args:
        run: the folder that `align-tf train` wrote, or its `metrics.jsonl`.

    Returns:
        A dict of `step` and values for each line.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: a line is none of a log; the last one may be cut off.
    """
    path = pathlib.Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the log of `align-tf train`")
    lines = path.read_text(encoding="utf-8").splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            values.append({**value, "step": value["step"]})
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a line of a log") from error
    return values


def save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a figure as its file's suffix says, .png or .svg.

    Raises:
        ValueError: it is another suffix.
    """
    path = pathlib.Path(path)
    check_suffix(path)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=DPI, bbox_inches="tight")


def check_suffix(path: str | os.PathLike) -> None:
    """Raises a ValueError where a plot cannot be written under a name."""
    if pathlib.Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def _figure(width: float, height: float) -> Any:
    with extra("plot", "a plot needs matplotlib"):
        from matplotlib.figure import Figure
    return Figure((width, height), layout="constrained")


def _clear(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("$", r"\$")  # which begins a formula
    return text if len(text) <= NAME_LENGTH else text[: NAME_LENGTH - 1].rstrip() + "…"
