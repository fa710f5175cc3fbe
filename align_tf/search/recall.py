"""The recall of an index: as many lists searched as it needs, against exact search."""

from typing import Any

import numpy as np

from align_tf.progress import track
from align_tf.search.collection import Collection
from align_tf.search.vectors import as_float32, evenly_spread

# The fewest lists are searched that find this share of the true neighbors. It is measured on
# other queries than will come.
RECALL = 0.96
RECALL_AT = 10  # neighbors
QUERIES = 256  # of each kind, for measuring recall
TIE_MARGIN = 1e-5  # a neighbor this much less near than the last true one is one too


def tune(index: Any, kind: str, collection: Collection, progress: bool) -> dict[str, float]:
    """Sets how many lists are searched, and returns recall@10 by the kind of query."""
    own = np.unique(np.linspace(0, collection.rows - 1, QUERIES).astype(int))
    queries = {"image": evenly_spread(collection.image_embeds(), collection.rows, QUERIES)}
    texts = _some_texts(collection)
    if len(texts):
        queries["text"] = texts
    # An image is not its own neighbor.
    left_out = {"image": own, "text": np.full(len(texts), -1)}
    true = {
        name: _least_scores(collection, embeds, left_out[name], progress)
        for name, embeds in queries.items()
    }
    nprobe = 1
    while True:
        if kind == "ivf":
            index.nprobe = nprobe
        recall = {
            name: _recall(index, embeds, left_out[name], true[name])
            for name, embeds in queries.items()
        }
        if kind == "flat" or min(recall.values()) >= RECALL or nprobe == index.nlist:
            return {name: round(value, 4) for name, value in recall.items()}
        nprobe = min(nprobe + max(1, nprobe // 4), index.nlist)


def _some_texts(collection: Collection) -> np.ndarray:
    each = -(-QUERIES // collection.settings.shards)
    texts = np.concatenate([as_float32(embeds[:each]) for embeds in collection.text_embeds()])
    return texts[np.unique(np.linspace(0, len(texts) - 1, QUERIES).astype(int))[: len(texts)]]


def _least_scores(
    collection: Collection, queries: np.ndarray, left_out: np.ndarray, progress: bool
) -> np.ndarray:
    """Finds how near the last of the true neighbors of each query is, by exact search (q,)."""
    best, start = np.full((len(queries), RECALL_AT), -np.inf, np.float32), 0
    shards = collection.image_embeds()
    for embeds in track(shards, "Comparing", collection.settings.shards, show=progress):
        scores = queries @ as_float32(embeds).T  # (q, n)
        inside = np.flatnonzero((left_out >= start) & (left_out < start + len(embeds)))
        scores[inside, left_out[inside] - start] = -np.inf
        best = np.partition(np.concatenate([best, scores], axis=1), -RECALL_AT, axis=1)
        best = best[:, -RECALL_AT:]
        start += len(embeds)
    return np.where(np.isfinite(best), best, np.inf).min(axis=1)


def _recall(
    index: Any, queries: np.ndarray, left_out: np.ndarray, least_scores: np.ndarray
) -> float:
    """Returns the share of the true neighbors that the index finds."""
    scores, rows = index.search(queries, RECALL_AT + 1)
    counted = (rows >= 0) & (rows != left_out[:, None])
    near = counted & (scores >= least_scores[:, None] - TIE_MARGIN)
    wanted = min(RECALL_AT, index.ntotal - (left_out[0] >= 0))
    return float(np.minimum(near.sum(axis=1) / max(wanted, 1), 1).mean()) if wanted else 1.0
