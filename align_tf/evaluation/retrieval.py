"""Image-text retrieval: how near images and their texts are, as ranks and recalls."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from align_tf.evaluation.arrays import checked_embeddings, row_blocks
from align_tf.progress import track

# Similarities are tied where they differ by this many roundings of their size: a matrix product
# may give two equal columns numbers that differ in the last bits.
TIED_ROUNDINGS = 16


def retrieval_metrics(
    image_embeds: ArrayLike,
    text_embeds: ArrayLike,
    pairs: ArrayLike | None = None,
    ks: Sequence[int] = (1, 5, 10),
    progress: bool = False,
) -> dict[str, float]:
    """Measures how near an image's own texts are to it, and a text's own images to it.

    The rank of a query is that of its best right answer, the others being left out (the
    Karpathy protocol of image-caption retrieval, arXiv 1412.2306). A wrong answer that is as
    near as the right one ranks before it, so embeddings that are all alike score 0, not 1.

    Args:
        image_embeds: (n, d), compared by dot product, so of unit length for cosines.
        text_embeds: (m, d).
        pairs: (p, 2), the row of an image and the row of a text that belongs to it; any number
            of texts an image and of images a text. None pairs row i with row i.
        ks: the k of the shares `r{k}`.
        progress: show it on stderr.

    Returns:
        For both directions, `i2t` (an image is the query) and `t2i`: `r1_i2t`, `r5_i2t`,
        `r10_i2t`, the share in 0..1 of the queries with a right answer among the k nearest, and
        `median_rank_i2t` and `mean_rank_i2t`, 1 being the best.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or an image or a text has no
            partner.
    """
    images = checked_embeddings("image_embeds", image_embeds)
    texts = checked_embeddings("text_embeds", text_embeds, images.shape[1])
    pairs = _pairs(pairs, len(images), len(texts))
    metrics = {}
    for way, ranks in zip(
        ("i2t", "t2i"), ranks_of_right_answers(images, texts, pairs, progress), strict=True
    ):
        metrics.update({f"r{k}_{way}": float(np.mean(ranks <= k)) for k in ks})
        metrics[f"median_rank_{way}"] = float(np.median(ranks))
        metrics[f"mean_rank_{way}"] = float(np.mean(ranks))
    return metrics


def distinct_pairs(
    image_ids: ArrayLike, text_ids: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Takes rows that pair an image with a text to each image and each text once.

    Args:
        image_ids: (p,), rows of one id hold the same image.
        text_ids: (p,), rows of one id hold the same text.

    Returns:
        The first row of each image (n,), the first row of each text (m,), and the `pairs` that
        `retrieval_metrics` takes for the embeddings of those rows.

    Raises:
        ValueError: the shapes differ.
    """
    image_ids, text_ids = np.asarray(image_ids), np.asarray(text_ids)
    if image_ids.shape != text_ids.shape or image_ids.ndim != 1:
        raise ValueError(
            f"image_ids of shape {image_ids.shape} and text_ids of shape {text_ids.shape}: "
            "expected (p,) both"
        )
    _, image_rows, images = np.unique(image_ids, return_index=True, return_inverse=True)
    _, text_rows, texts = np.unique(text_ids, return_index=True, return_inverse=True)
    return image_rows, text_rows, np.unique(np.stack([images, texts], axis=1), axis=0)


def _pairs(pairs: ArrayLike | None, images: int, texts: int) -> np.ndarray:
    """Checks pairs (p, 2)."""
    if pairs is None:
        if images != texts:
            raise ValueError(
                f"{images} image_embeds and {texts} text_embeds: expected as many, or pairs"
            )
        return np.repeat(np.arange(images)[:, None], 2, axis=1)
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"pairs of {pairs.dtype} {pairs.shape}: expected whole numbers, (p, 2)")
    for name, rows, count in (("image", pairs[:, 0], images), ("text", pairs[:, 1], texts)):
        outside = rows[(rows < 0) | (rows >= count)]
        if outside.size:
            raise ValueError(f"pairs name {name} {outside[0]}: expected rows 0 to {count - 1}")
        alone = np.bincount(rows, minlength=count) == 0
        if alone.any():
            raise ValueError(f"{name} {np.argmax(alone)} is in no pair: expected a partner of each")
    return pairs


def ranks_of_right_answers(
    left: np.ndarray, right: np.ndarray, pairs: np.ndarray, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks the best right answer of each row, by one pass over blocks of similarities.

    Returns:
        1 + the number of wrong answers that are at least as near, for each row of left (n,) and
        of right (m,).
    """
    left_best, right_best = _best(left, right, pairs)
    left_ranks, right_ranks = np.ones(len(left), int), np.ones(len(right), int)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    blocks = list(itertools.product(row_blocks(len(left)), row_blocks(len(right))))
    for rows, columns in track(blocks, "Comparing", show=progress and len(blocks) > 1):
        scores = left[rows] @ right[columns].T  # (rows, columns)
        first, last = np.searchsorted(pairs[:, 0], (rows.start, rows.stop))
        own = pairs[first:last]
        own = own[(own[:, 1] >= columns.start) & (own[:, 1] < columns.stop)]
        scores[own[:, 0] - rows.start, own[:, 1] - columns.start] = -np.inf
        # Bytes, counted in 16 bits, which hold BLOCK, are ten times as fast as count_nonzero.
        nearer = (scores >= left_best[rows, None]).view(np.uint8)
        left_ranks[rows] += nearer.sum(axis=1, dtype=np.uint16)
        nearer = (scores >= right_best[columns]).view(np.uint8)
        right_ranks[columns] += nearer.sum(axis=0, dtype=np.uint16)
    return left_ranks, right_ranks


def _best(left: np.ndarray, right: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds from which similarity on a wrong answer ranks before the best right one, (n,), (m,)."""
    dtype = np.result_type(left, right)
    bests = np.full(len(left), -np.inf, dtype), np.full(len(right), -np.inf, dtype)
    for some in row_blocks(len(pairs)):
        rows, columns = pairs[some].T
        scores = np.einsum("pd,pd->p", left[rows], right[columns])
        np.maximum.at(bests[0], rows, scores)
        np.maximum.at(bests[1], columns, scores)
    lengths = [np.sqrt(np.einsum("nd,nd->n", embeds, embeds)) for embeds in (left, right)]
    rounding = dtype.type(TIED_ROUNDINGS * np.finfo(dtype).eps)
    return (
        bests[0] - rounding * lengths[0] * lengths[1].max(),
        bests[1] - rounding * lengths[1] * lengths[0].max(),
    )
