"""Weighted k nearest neighbors: classes learned from examples without training."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from align_tf.evaluation.arrays import accuracies, unit_length
from align_tf.evaluation.examples import checked_examples, rank_classes, require_sklearn

# Weighted nearest neighbors, as DINO's eval_knn.py (arXiv 2104.14294).
NUM_NEIGHBORS, KNN_TEMPERATURE = 20, 0.07


def knn_metrics(
    train_embeds: ArrayLike,
    train_labels: ArrayLike,
    test_embeds: ArrayLike,
    test_labels: ArrayLike,
    k: int = NUM_NEIGHBORS,
    temperature: float | None = KNN_TEMPERATURE,
    ks: Sequence[int] = (1, 5),
    progress: bool = False,
) -> dict[str, float]:
    """Measures classification by the nearest training embeddings, compared by cosine.

    Each of the k nearest votes for its class with weight exp(cosine / temperature), as in DINO
    (arXiv 2104.14294). A class with as many votes as the right one ranks before it.

    Args:
        train_embeds: (n, d).
        train_labels: (n,), numbers or strings.
        test_embeds: (m, d).
        test_labels: (m,).
        k: how many neighbors vote.
        temperature: None gives every neighbor one vote.
        ks: the k of the shares `top{k}`.
        progress: show it on stderr.

    Returns:
        What `zero_shot_metrics` returns.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, k is more than there are, or a
            test label is no training label.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    sets = (train_embeds, train_labels, test_embeds, test_labels)
    return knn_with_predictions(*sets, k, temperature, ks, progress)[0]


def knn_with_predictions(
    train_embeds: ArrayLike,
    train_labels: ArrayLike,
    test_embeds: ArrayLike,
    test_labels: ArrayLike,
    k: int = NUM_NEIGHBORS,
    temperature: float | None = KNN_TEMPERATURE,
    ks: Sequence[int] = (1, 5),
    progress: bool = False,
) -> tuple[dict[str, float], np.ndarray]:
    """Measures as `knn_metrics` does, and says what class each test embedding is taken for.

    Args:
        train_embeds, train_labels, test_embeds, test_labels, k, temperature, ks, progress: as
            there.

    Returns:
        The figures; and (m,) labels, of classes with as many votes another than the right one.

    Raises:
        ValueError, ModuleNotFoundError: as there.
    """
    require_sklearn()
    from sklearn.neighbors import KNeighborsClassifier

    train, test = checked_examples(train_embeds, train_labels, test_embeds, test_labels)
    if not 1 <= k <= len(train[0]):
        raise ValueError(f"k={k}: expected 1 to the {len(train[0])} training embeddings")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0, or None")

    def weights(distances: np.ndarray) -> np.ndarray:  # (rows, k), Euclidean
        # Of unit vectors cosine = 1 - distance^2 / 2; the nearest one's weight is scaled to 1.
        squares = np.square(distances)
        return np.exp((squares.min(axis=1, keepdims=True) - squares) / (2 * temperature))

    classifier = KNeighborsClassifier(
        k, weights="uniform" if temperature is None else weights, algorithm="brute"
    )
    classifier.fit(unit_length(train[0]), train[1])
    ranks, predicted = rank_classes(
        lambda embeds: classifier.predict_proba(unit_length(embeds)), *test, "Voting", progress
    )
    return accuracies(ranks, test[1], ks), np.unique(train_labels)[predicted]
