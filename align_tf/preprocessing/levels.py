"""What rescaling and normalizing make of the 256 levels of a channel, as a table."""

import functools

import numpy as np


@functools.cache
def levels(
    factor: float | None,
    offset: bool,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...],
    include_top: bool,
) -> np.ndarray:
    """Tabulates what becomes of each level, in the reference's order and precision.

    Returns:
        float32 (256,), or (3 * 256,) where the channels differ.
    """
    table = np.repeat(np.arange(256, dtype=np.uint8)[None], 3, axis=0)  # (3, 256)
    if factor is not None:
        table = (table.astype(np.float64) * factor).astype(np.float32)
        table -= np.float32(offset)
    table = table.astype(np.float32)
    deviation = np.array(std, np.float32)[:, None]
    if mean is not None:
        table = (table - np.array(mean, np.float32)[:, None]) / deviation
    if include_top:
        table = table / deviation
    return table[0] if (table == table[0]).all() else table.reshape(-1)
