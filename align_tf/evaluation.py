"""Evaluation of embeddings: arrays in, numbers out."""

from collections.abc import Sequence

import numpy as np

BLOCK = 1024  # queries compared at a time


def retrieval_recall(
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    image_ids: Sequence[int] | None = None,
    text_ids: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[int, float]]:
    """Recall at k of retrieval among all images and all texts, both ways.

    A query counts as found at k if any candidate of its id is among the k nearest (Karpathy and
    Fei-Fei, arXiv 1412.2306). A wrong candidate as near as the right one ranks before it, so
    embeddings that have collapsed to one point find nothing.

    Args:
        image_embeds: float (n, d), of unit length.
        text_embeds: float (m, d), of unit length.
        image_ids: (n,), what each image shows; None numbers the rows.
        text_ids: (m,), what each text describes; None numbers the rows.
        ks: how many candidates are looked at.

    Returns:
        `text_to_image` and `image_to_text`, each k -> share of the queries from 0 to 1.

    Raises:
        ValueError: the arrays do not fit together, or a query has no candidate of its id.
    """
    images, texts = np.asarray(image_embeds), np.asarray(text_embeds)
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"embeddings of shapes {images.shape} and {texts.shape}: expected (n, d) and (m, d)"
        )
    image_ids = _ids("image_ids", image_ids, len(images))
    text_ids = _ids("text_ids", text_ids, len(texts))
    lonely = np.setxor1d(image_ids, text_ids)
    if len(lonely):
        raise ValueError(f"id {lonely[0]}: expected both an image and a text of each id")
    return {
        "text_to_image": _recall(texts, text_ids, images, image_ids, ks),
        "image_to_text": _recall(images, image_ids, texts, text_ids, ks),
    }


def _ids(name: str, ids: Sequence[int] | None, count: int) -> np.ndarray:
    ids = np.arange(count) if ids is None else np.asarray(ids)
    if ids.shape != (count,):
        raise ValueError(f"{name} of shape {ids.shape}: expected ({count},), one for each row")
    return ids


def _recall(
    queries: np.ndarray,
    query_ids: np.ndarray,
    candidates: np.ndarray,
    candidate_ids: np.ndarray,
    ks: Sequence[int],
) -> dict[int, float]:
    found = {k: 0 for k in ks}
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, start + BLOCK)
        scores = queries[rows] @ candidates.T  # (rows, candidates)
        right = query_ids[rows, None] == candidate_ids[None, :]
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        rank = np.sum(~right & (scores >= best), axis=1)  # wrong candidates before the right one
        for k in ks:
            found[k] += int(np.sum(rank < k))
    return {k: count / len(queries) for k, count in found.items()}
