"""Evaluation of embeddings: arrays in, numbers out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

# Similarities held at once: 64 MiB of float32.
BLOCK = 2**24


def retrieval_recall(
    image_embeds: ArrayLike,
    text_embeds: ArrayLike,
    image_ids: ArrayLike | None = None,
    text_ids: ArrayLike | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[int, float]]:
    """Measures how often a query's own pair is among the k nearest, in both directions.

    A query with several right answers counts as found when one of them is (the Karpathy
    protocol of image-caption retrieval, arXiv 1412.2306). A wrong answer as near as the right
    one ranks before it, so embeddings that are all alike score 0, not 1.

    Args:
        image_embeds: (n, d), compared by dot product, so of unit length for cosines.
        text_embeds: (m, d).
        image_ids: (n,), an image and a text of one id belong together; None numbers them.
        text_ids: (m,); None numbers them.
        ks: numbers of nearest neighbors to look at.

    Returns:
        `{"text_to_image": {1: ..., 5: ..., 10: ...}, "image_to_text": {...}}`, shares in 0..1.

    Raises:
        ValueError: the shapes do not fit, or an image or a text has no partner.
    """
    images, texts = np.asarray(image_embeds), np.asarray(text_embeds)
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"embeddings of shapes {images.shape} and {texts.shape}: expected (n, d) and (m, d)"
        )
    image_ids = _ids("image_ids", image_ids, len(images))
    text_ids = _ids("text_ids", text_ids, len(texts))
    alone = np.setxor1d(image_ids, text_ids)
    if alone.size:
        raise ValueError(f"id {alone[0]}: expected both an image and a text of each id")
    ranks = {
        "text_to_image": _ranks(texts, images, text_ids, image_ids),
        "image_to_text": _ranks(images, texts, image_ids, text_ids),
    }
    return {way: {k: float(np.mean(rank < k)) for k in ks} for way, rank in ranks.items()}


def _ids(name: str, ids: ArrayLike | None, count: int) -> np.ndarray:
    ids = np.arange(count) if ids is None else np.asarray(ids)
    if ids.shape != (count,):
        raise ValueError(f"{name} of shape {ids.shape}: expected ({count},)")
    return ids


def _ranks(
    queries: np.ndarray, gallery: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray
) -> np.ndarray:
    """Counts, for each query, the wrong answers that are at least as near as its best right one."""
    ranks = np.empty(len(queries), int)
    step = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        scores = queries[rows] @ gallery.T  # (rows, gallery)
        right = query_ids[rows, None] == gallery_ids
        best = np.max(scores, axis=1, where=right, initial=-np.inf, keepdims=True)
        ranks[rows] = np.sum((scores >= best) & ~right, axis=1)
    return ranks
