"""Augmentation of drawings, a batch at a time: another place, another light, another style."""

import math

import tensorflow as tf


def augment(pictures: tf.Tensor, mirrored: tf.Tensor, size: int) -> tf.Tensor:
    """Draws a new version of each picture.

    Args:
        pictures: uint8 (n, s, s, 4), RGBA.
        mirrored: bool (n,), whether a picture may be flipped.
        size: side of the result in pixels.

    Returns:
        float32 (n, size, size, 3) in 0..255.
    """
    x = tf.cast(pictures, tf.float32) / 255.0
    x = tf.concat([x[..., :3] * x[..., 3:], x[..., 3:]], axis=-1)  # alpha premultiplied
    x = _warp(x, mirrored, size)
    color, alpha = x[..., :3], x[..., 3:]
    color = _recolor(color, alpha)
    color, alpha = _outline(color, alpha)
    x = color + (1.0 - alpha) * _background(x)
    x = _blur(x)
    x = x + tf.random.normal(tf.shape(x), stddev=0.02) * _chosen(x, 0.3)
    x = _cutout(x)
    return tf.clip_by_value(x, 0.0, 1.0) * 255.0


def _uniform(x: tf.Tensor, low: float, high: float, channels: int = 1) -> tf.Tensor:
    return tf.random.uniform([tf.shape(x)[0], 1, 1, channels], low, high)


def _chosen(x: tf.Tensor, probability: float) -> tf.Tensor:
    """1 for the samples a change is made to, 0 for the others: (n, 1, 1, 1)."""
    return tf.cast(_uniform(x, 0.0, 1.0) < probability, tf.float32)


def _warp(x: tf.Tensor, mirrored: tf.Tensor, size: int) -> tf.Tensor:
    """Scales, flips, rotates, shears and shifts, and resizes to `size` in the same pass."""
    n, side = tf.shape(x)[0], tf.cast(tf.shape(x)[1], tf.float32)

    def draw(low, high):
        return tf.random.uniform([n], low, high)

    angle = draw(-1.0, 1.0) * math.pi / 12
    scale_x = side / size / draw(0.65, 1.1)
    scale_y = scale_x * draw(0.85, 1.18)
    shear = draw(-0.1, 0.1)
    flip = tf.where(mirrored & (draw(0.0, 1.0) < 0.5), -1.0, 1.0)
    a, b = flip * tf.cos(angle) * scale_x, (shear - tf.sin(angle)) * scale_y
    c, d = flip * tf.sin(angle) * scale_x, tf.cos(angle) * scale_y
    shift_x, shift_y = draw(-0.1, 0.1) * side, draw(-0.1, 0.1) * side
    middle = (size - 1) / 2
    zeros = tf.zeros([n])
    transforms = tf.stack(
        [
            *(a, b, (side - 1) / 2 + shift_x - (a + b) * middle),
            *(c, d, (side - 1) / 2 + shift_y - (c + d) * middle),
            *(zeros, zeros),
        ],
        axis=1,
    )
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=x,
        transforms=transforms,
        output_shape=[size, size],
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
        fill_value=0.0,
    )


def _recolor(color: tf.Tensor, alpha: tf.Tensor) -> tf.Tensor:
    """Mixes the channels a little, changes saturation, contrast and brightness, adds shading."""
    n, size = tf.shape(color)[0], tf.shape(color)[1]
    mixing = tf.eye(3)[None] + tf.random.normal([n, 3, 3], stddev=0.12) * _chosen(color, 0.7)[:, 0]
    mixing /= tf.reduce_sum(mixing, axis=1, keepdims=True)  # gray stays gray
    color = tf.einsum("nhwc,ncd->nhwd", color, mixing)
    gray = tf.reduce_mean(color, axis=-1, keepdims=True)
    saturation = _uniform(color, 0.4, 1.5) * (1.0 - _chosen(color, 0.1))
    color = gray + (color - gray) * saturation
    contrast = _uniform(color, 0.7, 1.3)
    brightness = _uniform(color, -0.15, 0.15)
    color = (color - 0.5 * alpha) * contrast + (0.5 + brightness) * alpha
    ramp = tf.linspace(-0.5, 0.5, size)
    shading = (
        _uniform(color, -0.4, 0.4) * ramp[None, :, None, None]
        + _uniform(color, -0.4, 0.4) * ramp[None, None, :, None]
    )
    color += shading * alpha * _chosen(color, 0.5)
    return tf.clip_by_value(color, 0.0, alpha)


def _outline(color: tf.Tensor, alpha: tf.Tensor) -> tf.Tensor:
    """Draws a dark line around the silhouette, and along edges within, of some samples."""
    wider = tf.nn.max_pool2d(alpha, 5, 1, "SAME")
    around = _chosen(color, 0.25)
    alpha = alpha + (wider - alpha) * around
    gray = tf.reduce_mean(color, axis=-1, keepdims=True)
    thick = tf.nn.max_pool2d(gray, 3, 1, "SAME") + tf.nn.max_pool2d(-gray, 3, 1, "SAME")
    edges = tf.clip_by_value(3.0 * (thick - 0.15), 0.0, 1.0) * _chosen(color, 0.25)
    return color * (1.0 - edges), alpha


def _background(x: tf.Tensor) -> tf.Tensor:
    """White for half of the samples, black for some, a plain color for the others."""
    white, black = _chosen(x, 0.5), 1.0 - _chosen(x, 0.4)
    return white + (1.0 - white) * black * _uniform(x, 0.0, 1.0, 3)


def _blur(x: tf.Tensor) -> tf.Tensor:
    """Blurs some samples and sharpens others."""
    smooth = tf.nn.avg_pool2d(x, 3, 1, "SAME")
    return smooth + (x - smooth) * (1.0 + _uniform(x, -1.0, 1.0) * _chosen(x, 0.5))


def _cutout(x: tf.Tensor) -> tf.Tensor:
    """Paints a gray square over some samples."""
    size = tf.shape(x)[1]
    at = tf.range(size)[None, :, None, None]
    side = tf.cast(_uniform(x, 0.1, 0.35) * tf.cast(size, tf.float32), tf.int32)
    top, left = (tf.cast(_uniform(x, 0.0, 1.0) * tf.cast(size, tf.float32), tf.int32) for _ in "yx")
    inside_y = (at >= top) & (at < top + side)
    across = tf.transpose(at, [0, 2, 1, 3])
    inside_x = (across >= left) & (across < left + side)
    hole = tf.cast(inside_y & inside_x, tf.float32) * _chosen(x, 0.25)
    return x * (1.0 - hole) + 0.5 * hole
