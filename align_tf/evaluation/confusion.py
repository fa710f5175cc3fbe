"""Classes one by one: how many images of each are told right, and what the others are taken for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from align_tf.evaluation.arrays import checked_labels

OTHERS = "others"  # the column of the classes that are not among the rows


def class_figures(
    labels: ArrayLike, predicted: ArrayLike, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Measures each class that has images, first those that are told right least often.

    Args:
        labels: (n,), the row of each image's class.
        predicted: (n,), the row of the class that it is taken for.
        names: of the classes (c).

    Returns:
        Name -> `images`, how many there are; `top1`, the share in 0..1 that is told right; and
        `mistaken_for`, the name of another class -> how many are taken for it, the most first.

    Raises:
        ValueError: the shapes differ, or a label is no row.
    """
    labels = np.asarray(labels)
    labels, predicted = (
        checked_labels(name, rows, len(labels))
        for name, rows in (("labels", labels), ("predicted", predicted))
    )
    for name, rows in (("labels", labels), ("predicted", predicted)):
        outside = rows[(rows < 0) | (rows >= len(names))]
        if outside.size:
            raise ValueError(f"{name} hold {outside[0]}: expected rows 0 to {len(names) - 1}")
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    taken: dict[int, dict[int, int]] = {}  # of all pairs of classes few occur
    for (own, other), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        taken.setdefault(own, {})[other] = count
    figures = {}
    for own, counted in taken.items():
        images, right = sum(counted.values()), counted.pop(own, 0)
        mistaken = sorted(counted.items(), key=lambda item: -item[1])
        figures[names[own]] = {
            "images": images,
            "top1": right / images,
            "mistaken_for": {names[other]: count for other, count in mistaken},
        }
    return dict(sorted(figures.items(), key=lambda item: (item[1]["top1"], -item[1]["images"])))


def confusion_matrix(
    figures: Mapping[str, Mapping[str, Any]], limit: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """Counts which class is taken for which, for a picture.

    Args:
        figures: as `class_figures` gives them.
        limit: how many classes are shown at most, those that are in the most mistakes.

    Returns:
        int (k, k) or (k, k + 1), the number of images of the class of a row that are taken for
        the class of a column; the names of the rows; and those of the columns, the same, and
        `others` behind them where some are taken for a class that is not shown.
    """
    mistakes = {name: sum(of["mistaken_for"].values()) for name, of in figures.items()}
    for of in figures.values():
        for other, count in of["mistaken_for"].items():
            if other in mistakes:  # it has images of its own, and so a row
                mistakes[other] += count
    rows = sorted(sorted(mistakes, key=lambda name: -mistakes[name])[:limit])
    places = {name: place for place, name in enumerate(rows)}
    matrix = np.zeros((len(rows), len(rows) + 1), int)
    for row, name in enumerate(rows):
        of = figures[name]
        matrix[row, row] = of["images"] - sum(of["mistaken_for"].values())
        for other, count in of["mistaken_for"].items():
            matrix[row, places.get(other, len(rows))] += count
    if not matrix[:, -1].any():
        return matrix[:, :-1], rows, rows
    return matrix, rows, [*rows, OTHERS]
