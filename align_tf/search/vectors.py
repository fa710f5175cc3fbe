"""Vectors as FAISS takes them."""

from collections.abc import Iterator

import numpy as np


def evenly_spread(shards: Iterator[np.ndarray], rows: int, count: int) -> np.ndarray:
    """Takes `count` rows of `rows`, evenly spread, as float32."""
    wanted = np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(int))
    parts, start = [], 0
    for embeds in shards:
        first, last = np.searchsorted(wanted, (start, start + len(embeds)))
        parts.append(as_float32(embeds[wanted[first:last] - start]))
        start += len(embeds)
    return np.concatenate(parts)


def as_float32(embeds: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(embeds, np.float32)
