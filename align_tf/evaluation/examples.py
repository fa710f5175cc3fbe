"""Labelled examples to learn classes from, and some of them held out."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from align_tf.evaluation.arrays import checked_embeddings, checked_labels, row_blocks
from align_tf.extras import extra
from align_tf.progress import track


def holdout(labels: ArrayLike, share: float, seed: int = 0) -> np.ndarray:
    """Draws a share of each class, at least one and not all.

    Args:
        labels: (n,), numbers or strings.
        share: in 0..1.
        seed: of the draw.

    Returns:
        bool (n,), True for those drawn.

    Raises:
        ValueError: there is one alone of a class.
    """
    labels = np.asarray(labels)
    drawn = np.zeros(len(labels), bool)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) == 1:
            raise ValueError(
                f"class {label!s} has one example: expected two or more, to hold one out"
            )
        count = min(max(1, int(share * len(rows))), len(rows) - 1)
        drawn[rng.choice(rows, count, replace=False)] = True
    return drawn


def require_sklearn() -> None:
    """Asks for the extra that `knn_metrics` and `linear_probe_metrics` need.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    with extra("eval", "kNN and the linear probe need scikit-learn"):
        import sklearn  # noqa: F401


def checked_examples(
    train_embeds: ArrayLike, train_labels: ArrayLike, test_embeds: ArrayLike, test_labels: ArrayLike
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Checks both sets, and numbers their classes."""
    train = checked_embeddings("train_embeds", train_embeds)
    test = checked_embeddings("test_embeds", test_embeds, train.shape[1])
    names, classes = np.unique(
        checked_labels("train_labels", train_labels, len(train)), return_inverse=True
    )
    test_labels = checked_labels("test_labels", test_labels, len(test))
    unknown = np.setdiff1d(test_labels, names)
    if unknown.size:
        raise ValueError(f"test label {unknown[0]!s}: expected one of the training labels")
    return (train, classes), (test, np.searchsorted(names, test_labels))


def rank_classes(
    score: Callable[[np.ndarray], np.ndarray],
    embeds: np.ndarray,
    classes: np.ndarray,
    description: str,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks the right class of each row among its scores (rows, c), ties before it.

    Returns:
        The ranks, and the class that each row is taken for: that of the highest score, and of
        several another than the right one.
    """
    ranks, predicted = np.empty(len(embeds), int), np.array(classes, int)
    blocks = list(row_blocks(len(embeds)))
    for rows in track(blocks, description, show=progress and len(blocks) > 1):
        scores = score(embeds[rows])
        right = np.take_along_axis(scores, classes[rows, None], axis=1)
        ranks[rows] = np.count_nonzero(scores >= right, axis=1)  # the right one is counted too
        others = np.array(scores)
        np.put_along_axis(others, classes[rows, None], -np.inf, axis=1)
        predicted[rows] = np.where(ranks[rows] == 1, classes[rows], others.argmax(axis=1))
    return ranks, predicted
