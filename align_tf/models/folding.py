"""BatchNorm without training, as a part of the convolution before it."""

from typing import Any

import numpy as np
from keras import layers, ops


def fold(
    convolution: layers.Layer, kernel: Any, norm: layers.Layer, statistics: list[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Puts the scale of a BatchNorm into a kernel, and what it adds into an offset.

    Args:
        convolution: the layer before the BatchNorm.
        kernel: the convolution's.
        norm: the BatchNorm.
        statistics: its gamma, beta, moving mean and moving variance.

    Returns:
        The kernel and the offset of each channel, in float64, to be rounded once.
    """
    kernel, gamma, beta, mean, variance = (
        ops.convert_to_numpy(value).astype(np.float64) for value in (kernel, *statistics)
    )
    with np.errstate(invalid="ignore"):  # of a negative variance; the callers tell of NaN
        scale = gamma / np.sqrt(variance + norm.epsilon)
    offset = beta - mean * scale
    if isinstance(convolution, layers.DepthwiseConv2D):
        scale = scale[:, None]  # its kernel is (h, w, channels, 1)
    return kernel * scale, offset
