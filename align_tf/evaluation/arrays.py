"""What the measures take: embeddings and labels, checked, and accuracies out of ranks."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

# Side of a block of similarities: 64 MiB of float32.
BLOCK = 4096


def row_blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))


def checked_embeddings(name: str, embeds: ArrayLike, width: int | None = None) -> np.ndarray:
    """Checks embeddings, and takes them to float32, or float64 where they are."""
    embeds = np.asarray(embeds)
    if embeds.ndim != 2 or not embeds.size or width not in (None, embeds.shape[1]):
        raise ValueError(
            f"{name} of shape {embeds.shape}: expected (rows, {width or 'width'}), one row or more"
        )
    if embeds.dtype != np.float64:
        embeds = embeds.astype(np.float32, copy=False)
    for rows in row_blocks(len(embeds)):
        finite = np.isfinite(embeds[rows]).all(axis=1)
        if not finite.all():
            row = rows.start + int(np.argmin(finite))
            raise ValueError(f"{name}: row {row} holds a NaN or an infinity")
    return embeds


def checked_labels(name: str, labels: ArrayLike, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"{name} of shape {labels.shape}: expected ({count},)")
    return labels


def accuracies(ranks: np.ndarray, labels: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    metrics = {f"top{k}": float(np.mean(ranks <= k)) for k in ks}
    _, classes = np.unique(labels, return_inverse=True)
    right = np.bincount(classes, weights=ranks == 1) / np.bincount(classes)
    return {**metrics, "mean_per_class": float(right.mean())}


def unit_length(embeds: np.ndarray) -> np.ndarray:
    """Scales vectors to unit length; zero stays zero."""
    lengths = np.linalg.norm(embeds, axis=-1, keepdims=True)
    return embeds / np.where(lengths > 0, lengths, 1)
