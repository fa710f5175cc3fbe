"""Plots: similarities and confusions, embeddings in the plane, the curves of a training."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from align_tf import addresses, files, fonts
from align_tf.extras import extra
from align_tf.terminal import literal

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
CHARACTER = 0.09  # inches, as wide as most are
SLANT = 35  # degrees, of the names above a heat map
NUMBERED = 16  # a heat map of up to so many rows and columns has its numbers written in
CONFUSION_NUMBERED = 31  # so has one of classes, whose numbers are short
NAME_LENGTH = 32  # characters of an image's name or a text
PERPLEXITY = 30.0  # of t-SNE, at most

NO_LABEL = "without a label"
UNLABELLED = "#8a929c"

# Panels of a training: title, the values of metrics.jsonl and what they are called
_WAYS = {"i2t": "image to text", "t2i": "text to image"}
PANELS = (
    (
        "loss",
        {
            "loss": "training",
            "val_loss": "validation",
            **{f"loss_{way}": f"training, {name}" for way, name in _WAYS.items()},
        },
    ),
    ("accuracy within the batch", {f"accuracy_{way}": name for way, name in _WAYS.items()}),
    (
        "validation: recall",
        {f"val_r{k}_{way}": f"{name}, R@{k}" for k in (1, 5) for way, name in _WAYS.items()},
    ),
    (
        "validation: median rank",
        {f"val_median_rank_{way}": name for way, name in _WAYS.items()},
    ),
    ("temperature", {"temperature": "temperature"}),
    ("learning rate", {"learning_rate": "learning rate"}),
    ("images per second", {"images_per_second": "images per second"}),
)


def heatmap(
    similarities: Any, names: Sequence[str], texts: Sequence[str], pictures: Sequence[Any] = ()
) -> Any:
    """Draws the similarity of images, the rows, and texts, the columns.

    Args:
        similarities: (n, m), such as cosines.
        names: of the images (n).
        texts: the texts (m).
        pictures: RGB arrays or PIL images (n) to stand beside their rows, None where there is
            none; may be empty.

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
    figure, axes, drawn = _grid(values, names, texts)
    if max(values.shape) <= NUMBERED:
        _write_numbers(axes, drawn, values, "{:.2f}".format)
    for row, picture in enumerate(pictures):
        if picture is not None:
            _place(axes, row, picture)
    if len(pictures):
        axes.tick_params(axis="y", pad=40)
    _add_bar(figure, axes, drawn, "cosine")
    return _written(figure)


def confusion(counts: Any, rows: Sequence[str], columns: Sequence[str]) -> Any:
    """Draws which classes are taken for which.

    Args:
        counts: (n, m), the images of the class of a row that are taken for that of a column.
        rows: the names of the classes (n).
        columns: what they are taken for (m).

    Returns:
        A matplotlib Figure, colored by the share of a row; the numbers are written in where there
        is room.

    Raises:
        ValueError: the numbers do not fit.
    """
    counts = np.asarray(counts)
    if counts.shape != (len(rows), len(columns)) or not counts.size:
        raise ValueError(
            f"counts of shape {counts.shape}: expected ({len(rows)}, {len(columns)}), one or more "
            "of each"
        )
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes, drawn = _grid(shares, rows, columns)
    drawn.set_clim(0, 1)
    if max(counts.shape) <= CONFUSION_NUMBERED:
        _write_numbers(axes, drawn, counts, lambda count: f"{count:,}" if count else "")
    axes.set_ylabel("class")
    axes.set_xlabel("taken for")
    axes.xaxis.set_label_position("top")
    _add_bar(figure, axes, drawn, "share of the class")
    return _written(figure)


def _grid(values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> tuple[Any, Any, Any]:
    """Draws colored cells; returns the figure, its axes and the cells."""
    height, width = values.shape
    beside, above = (max(map(_width, names)) for names in (rows, columns))
    slanted = math.radians(SLANT)
    figure = _figure(
        max(width * CELL, 1.5) + beside + above * math.cos(slanted) + 1.8,
        max(height * CELL, 1.2) + above * math.sin(slanted) + 1.2,
    )
    axes = figure.add_subplot()
    drawn = axes.imshow(values, cmap="Blues", aspect="equal")
    axes.set_xticks(range(width), map(_short, columns), rotation=SLANT, ha="left", va="bottom")
    axes.set_xticks(np.arange(width + 1) - 0.5, minor=True)
    axes.set_yticks(range(height), map(_short, rows))
    axes.set_yticks(np.arange(height + 1) - 0.5, minor=True)
    axes.xaxis.tick_top()
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, pad=4)
    axes.spines[:].set_visible(False)
    return figure, axes, drawn


def _add_bar(figure: Any, axes: Any, drawn: Any, label: str) -> None:
    width = drawn.get_array().shape[1]
    bar = figure.colorbar(drawn, cax=axes.inset_axes([1 + 0.3 / width, 0, 0.25 / width, 1]))
    bar.set_label(label)
    bar.outline.set_visible(False)


def _write_numbers(axes: Any, drawn: Any, values: np.ndarray, form: Callable[[Any], str]) -> None:
    """Writes numbers into their cells, light where a cell is dark."""
    dark = drawn.norm(drawn.get_array()) > 0.5
    for (row, column), value in np.ndenumerate(values):
        color = "white" if dark[row, column] else "#1c2430"
        axes.text(column, row, form(value), ha="center", va="center", color=color, fontsize=8)


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
        labels: (n); those beyond the ten that occur most are gray, and so are points whose label
            is blank.
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
    labels = np.array([str(label).strip() for label in labels], object)
    counts = collections.Counter(labels[labels != ""])
    shown = [label for label, _ in counts.most_common(len(COLORS))]
    size = float(np.clip(4000 / len(points), 3, 36))
    for label, color in zip(shown, COLORS, strict=False):
        own = points[labels == label]
        axes.scatter(*own.T, s=size, c=color, label=_short(label), linewidths=0, alpha=0.85)
    others, none = ~np.isin(labels, [*shown, ""]), labels == ""
    if others.any():
        left = f"{len(counts) - len(shown)} other labels"
        axes.scatter(*points[others].T, s=size, c=OTHERS, label=left, linewidths=0, zorder=0)
    if none.any():
        left = f"{NO_LABEL} ({none.sum():,})"
        axes.scatter(*points[none].T, s=size, c=UNLABELLED, marker="x", label=left, zorder=0)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    _clear(axes)
    if method == "tsne":  # its axes have no meaning
        axes.set_xticks([])
        axes.set_yticks([])
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, markerscale=1.5)
    return _written(figure)


def _project(embeds: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    require_sklearn()
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == "pca":
        fitted = PCA(2, random_state=seed)
        with np.errstate(invalid="ignore"):
            points = fitted.fit_transform(embeds)
        shares = np.nan_to_num(fitted.explained_variance_ratio_)  # none where all are the same
        return points, tuple(
            f"PC {i}: {share:.0%} of variance" for i, share in enumerate(shares, 1)
        )
    perplexity = min(PERPLEXITY, (len(embeds) - 1) / 3)
    start = "pca" if np.ptp(embeds, axis=0).any() else "random"  # where all are the same
    tsne = TSNE(2, metric="cosine", init=start, perplexity=perplexity, random_state=seed)
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
    panels = [
        (title, {key: name for key, name in keys.items() if key in known}) for title, keys in PANELS
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        raise ValueError("the log holds no line with a loss or another value to draw")
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = _figure(4.2 * across, 3.0 * down)
    figure.suptitle(_short(title))
    for place, (name, keys) in enumerate(panels, 1):
        _draw_curves(figure.add_subplot(down, across, place), name, keys, lines)
    return _written(figure)


def _draw_curves(axes: Any, title: str, keys: dict[str, str], lines: Sequence[dict]) -> None:
    from matplotlib.ticker import MaxNLocator

    for (key, name), color in zip(keys.items(), COLORS, strict=False):
        points = [(float(line["step"]), float(line[key])) for line in lines if key in line]
        mark = "o" if len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), color=color, label=name, marker=mark)
    axes.set_title(title, fontsize=10)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    _clear(axes)
    if len(keys) > 1:
        axes.legend(frameon=False, fontsize=8)


def sweep(shares: Sequence[float], series: dict[str, Sequence[float]], best: float) -> Any:
    """Draws what models between two others are worth.

    Args:
        shares: of the second of them, ascending.
        series: of each data set, a figure from 0 to 1 for each share.
        best: the share that is chosen, marked.

    Returns:
        A matplotlib Figure.
    """
    figure = _figure(5.0, 3.4)
    axes = figure.add_subplot()
    for (name, figures), color in zip(series.items(), COLORS, strict=False):
        axes.plot(shares, figures, color=color, label=_short(name), marker="o", markersize=4)
    axes.axvline(best, color=GRID, linewidth=2.5, zorder=0)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("alpha")
    _clear(axes)
    axes.legend(frameon=False, fontsize=8)
    return _written(figure)


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
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        value = _read_line(line)
        if value is not None:
            values.append(value)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: not a line of a log")
    return values


def _read_line(line: str) -> dict[str, float] | None:
    """Returns the numbers of a line of a log; None where it is not one."""
    try:
        value = json.loads(line)
        numbers = {key: one for key, one in value.items() if type(one) in (int, float)}
        return numbers if math.isfinite(float(numbers["step"])) else None
    except (ValueError, AttributeError, KeyError, OverflowError, RecursionError):
        return None


def save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a figure as its file's suffix says, .png or .svg.

    Raises:
        ValueError: it is another suffix.
    """
    path = addresses.place(path)
    check_suffix(path)
    with files.replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # told when it was drawn
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # all is cut to fit
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=DPI, bbox_inches="tight")


def check_suffix(path: str | os.PathLike) -> None:
    """Raises a ValueError where a plot cannot be written under a name."""
    if os.path.splitext(str(path))[1].lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def require_matplotlib() -> None:
    """Asks for the extra that a plot needs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with extra("plot", "a plot needs matplotlib"):
        import matplotlib.figure  # noqa: F401


def require_sklearn() -> None:
    """Asks for the extra that `embeddings` needs.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    with extra("plot", "a plot of embeddings needs scikit-learn"):
        import sklearn  # noqa: F401


def _figure(width: float, height: float) -> Any:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _written(figure: Any) -> Any:
    """Gives the texts of a figure the fonts that have their characters."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    base = font_manager.findfont(font_manager.FontProperties())
    found = fonts.fallbacks("".join(text.get_text() for text in texts), base)
    families = list(dict.fromkeys(found.values()))
    known = {entry.name for entry in font_manager.fontManager.ttflist}
    for path in families:
        if path not in known:  # by its path it is not mistaken for another of its family
            about = font_manager.ttfFontProperty(font_manager.get_font(path))
            entry = dataclasses.replace(about, name=path, style="normal", weight="normal")
            font_manager.fontManager.ttflist.append(entry)
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])
    return figure


def _clear(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _short(text: str) -> str:
    text = literal(" ".join(text.split())).replace("$", r"\$")  # which begins a formula
    return text if len(text) <= NAME_LENGTH else text[: NAME_LENGTH - 1].rstrip() + "…"


def _width(text: str) -> float:
    """Returns about how wide a name is, in inches."""
    wide = sum(unicodedata.east_asian_width(one) in "FW" for one in _short(text))
    return CHARACTER * (len(_short(text)) + wide)
