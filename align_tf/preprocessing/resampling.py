"""Pillow's resampling inside the graph, bit for bit."""

from collections.abc import Sequence

import tensorflow as tf

from align_tf.preprocessing.decoding import pixels

NEAREST, BILINEAR, BICUBIC = 0, 2, 3  # as Pillow numbers them
# How far a filter reaches, in pixels of the larger image.
SUPPORT = {BILINEAR: 1.0, BICUBIC: 2.0}
# Fractional bits of a resampling coefficient (Pillow's libImaging/Resample.c: 32 - 8 - 2).
COEFFICIENT_BITS = 22


def resize(
    image: tf.Tensor, shape: tf.Tensor, window: Sequence[tf.Tensor], resample: int
) -> tf.Tensor:
    """Resizes uint8 (h, w, 3) as Pillow's Image.resize does, bit for bit, and crops.

    Pillow resamples along each row, rounds and clips to uint8, then along each column; since
    Pillow 13 it begins with the columns of an image that loses more than twice as much height as
    width (libImaging/Resample.c). Only what the window needs is computed.

    Args:
        image: uint8 (h, w, 3).
        shape: height and width to resize to.
        window: top, left, height and width of what is wanted of the result.
        resample: NEAREST, BILINEAR or BICUBIC.

    Returns:
        uint8, of the window's height and width.
    """
    top, left, height, width = window
    if resample == NEAREST:
        rows = _nearest(tf.shape(image)[0], shape[0])[top : top + height]
        columns = _nearest(tf.shape(image)[1], shape[1])[left : left + width]
        return tf.gather(tf.gather(image, rows), columns, axis=1)
    rows, first_row, last_row = _matrix(tf.shape(image)[0], shape[0], top, height, resample, 1)
    columns, first, last = _matrix(tf.shape(image)[1], shape[1], left, width, resample, 3)
    narrowed = tf.shape(image)[:2] - shape
    vertical_first = (narrowed[0] > 0) & (narrowed[0] > 2 * narrowed[1])
    image = image[first_row:last_row, first:last]
    image = tf.cond(
        vertical_first,
        lambda: _vertical_first(image, rows, columns, resample),
        lambda: _horizontal_first(image, rows, columns, resample),
    )
    return tf.reshape(image, [height, width, 3])


def _horizontal_first(
    image: tf.Tensor, rows: tf.SparseTensor, columns: tf.SparseTensor, resample: int
) -> tf.Tensor:
    height, width = tf.unstack(tf.shape(image)[:2])

    def resample_rows(start: tf.Tensor, stop: tf.Tensor) -> tf.Tensor:
        band = tf.transpose(tf.reshape(image[start:stop], [-1, width * 3]))
        return tf.transpose(_apply(columns, band, resample))

    return _apply(rows, pixels.in_bands(resample_rows, height, width), resample)


def _vertical_first(
    image: tf.Tensor, rows: tf.SparseTensor, columns: tf.SparseTensor, resample: int
) -> tf.Tensor:
    height, width = tf.unstack(tf.shape(image)[:2])

    def resample_columns(start: tf.Tensor, stop: tf.Tensor) -> tf.Tensor:
        band = tf.reshape(image[:, start:stop], [height, -1])
        return tf.transpose(_apply(rows, band, resample))

    return tf.transpose(_apply(columns, pixels.in_bands(resample_columns, width, height), resample))


def _apply(matrix: tf.SparseTensor, levels: tf.Tensor, resample: int) -> tf.Tensor:
    """Multiplies uint8 (n, k) by a sparse matrix, rounds and clips to uint8.

    Coefficients are whole numbers over 2^22 and levels whole numbers, so float64 sums are exact.
    """
    # Made where it is used: a loop of a loaded SavedModel cannot take one from outside.
    compressed = tf.raw_ops.SparseTensorToCSRSparseMatrix(
        indices=matrix.indices, values=matrix.values, dense_shape=matrix.dense_shape
    )
    total = tf.raw_ops.SparseMatrixMatMul(a=compressed, b=tf.cast(levels, tf.float64))
    total = tf.minimum(total + 0.5, 255.0)
    if resample == BICUBIC:  # alone has weights below zero
        total = tf.maximum(total, 0.0)
    return tf.cast(total, tf.uint8)  # the cast rounds down


def _matrix(
    length: tf.Tensor,
    size: tf.Tensor,
    offset: tf.Tensor,
    count: tf.Tensor,
    resample: int,
    channels: int,
) -> tuple[tf.SparseTensor, tf.Tensor, tf.Tensor]:
    """Builds the sparse matrix that resamples one axis.

    Args:
        length: of the axis.
        size: what it is resized to.
        offset: the first output place that is wanted.
        count: how many are.
        resample: BILINEAR or BICUBIC.
        channels: that lie next to each other at each place.

    Returns:
        float64 (count * channels, (last - first) * channels); first and last, the part of the
        axis that it needs.
    """
    start, weights = _coefficients(length, size, resample)
    start, weights = start[offset : offset + count], weights[offset : offset + count]
    first = start[0]
    last = tf.minimum(start[-1] + tf.shape(weights)[1], length)
    place = start[:, None, None] - first + tf.range(tf.shape(weights)[1])  # (count, 1, taps)
    # The taps that reach over the end have no weight.
    place = tf.minimum(place, last - first - 1)
    channel = tf.range(channels)[:, None]
    column = place * channels + channel  # (count, channels, taps)
    row = tf.range(count)[:, None, None] * channels + channel
    indices = tf.stack([tf.broadcast_to(row, tf.shape(column)), column], axis=-1)
    weights = tf.broadcast_to(weights[:, None], tf.shape(column))
    used = weights != 0
    matrix = tf.SparseTensor(
        indices=tf.cast(tf.boolean_mask(indices, used), tf.int64),
        values=tf.boolean_mask(weights, used),
        dense_shape=tf.cast(tf.stack([count, last - first]) * channels, tf.int64),
    )
    return matrix, first, last


def _coefficients(length: tf.Tensor, size: tf.Tensor, resample: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes Pillow's resampling table for one axis (libImaging/Resample.c).

    Args:
        length: of the axis.
        size: what it is resized to.
        resample: BILINEAR or BICUBIC.

    Returns:
        the first place that each output place depends on, int32 (size,), and the coefficients of
        it and those that follow, float64 (size, taps).
    """
    scale = _divide(length, size)
    filter_scale = tf.maximum(scale, 1.0)
    support = SUPPORT[resample] * filter_scale
    center = (tf.range(tf.cast(size, tf.float64), dtype=tf.float64) + 0.5) * scale  # (size,)
    start = tf.maximum(tf.cast(center - support + 0.5, tf.int32), 0)
    stop = tf.minimum(tf.cast(center + support + 0.5, tf.int32), length)
    taps = 2 * tf.cast(tf.math.ceil(support), tf.int32) + 1
    place = start[:, None] + tf.range(taps)  # (size, taps)
    distance = (tf.cast(place, tf.float64) - center[:, None] + 0.5) * (1.0 / filter_scale)
    weights = _bilinear(distance) if resample == BILINEAR else _bicubic(distance)
    weights = tf.where(place < stop[:, None], weights, tf.zeros_like(weights))
    # A running sum adds in Pillow's order, which tf.reduce_sum does not promise.
    weights = weights / tf.cumsum(weights, axis=1)[:, -1:]
    one = tf.constant(2.0**COEFFICIENT_BITS, tf.float64)
    return start, tf.sign(weights) * tf.floor(tf.abs(weights) * one + 0.5) / one


def _bilinear(x: tf.Tensor) -> tf.Tensor:
    return tf.maximum(1.0 - tf.abs(x), 0.0)


def _bicubic(x: tf.Tensor) -> tf.Tensor:
    a, x = -0.5, tf.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return tf.where(x < 1.0, near, tf.where(x < 2.0, far, tf.zeros_like(x)))


def _divide(length: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    # Grappler makes `/` by a constant a product with its rounded reciprocal, one ulp off.
    return tf.math.divide_no_nan(tf.cast(length, tf.float64), tf.cast(size, tf.float64))


def _nearest(length: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Returns which place of the input each place of the output takes."""
    scale = _divide(length, size)
    # Pillow adds the step up, and its rounding errors with it (libImaging/Geometry.c).
    steps = tf.concat([[scale * 0.5], tf.repeat(scale, size - 1)], 0)
    return tf.minimum(tf.cast(tf.cumsum(steps), tf.int32), length - 1)
