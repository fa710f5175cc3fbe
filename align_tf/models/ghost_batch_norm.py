"""Ghost BatchNorm: parts of a batch, each normalised by its own statistics, as in the original."""

from typing import Any

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable(package="align_tf")
class GhostBatchNormalization(layers.BatchNormalization):
    """BatchNorm over parts of a batch (arXiv 1705.08741), by the arithmetic of tf.keras 2.

    That is what its `BatchNormalization(virtual_batch_size=...)` computes: of a device's n rows,
    those that are as far apart as there are parts, n / virtual_batch_size, are one part; the
    moving averages move once, by the mean of the parts' means and variances.

    Args:
        virtual_batch_size: rows of a part; it divides those of a device.
        options: as those of `keras.layers.BatchNormalization`.
    """

    def __init__(self, virtual_batch_size: int, **options: Any):
        super().__init__(**options)
        self.virtual_batch_size = virtual_batch_size

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "virtual_batch_size": self.virtual_batch_size}

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        rows, size, devices = inputs.shape[0], self.virtual_batch_size, _devices()
        if rows is not None and rows % (size * devices):
            raise ValueError(
                f"virtual_batch_size={size}: expected a divisor of the images that a device "
                f"computes at a time, {rows / devices:g}"
            )
        shape = ops.shape(inputs)
        wide = keras.backend.result_type(inputs.dtype, "float32")
        x = ops.reshape(ops.cast(inputs, wide), (devices, size, -1, *shape[1:]))
        within = (1, *range(3, len(shape) + 1))  # rows and pixels of a part
        mean, variance = ops.moments(x, within, keepdims=True)
        y = (x - mean) * ops.rsqrt(variance + self.epsilon)
        y = y * ops.cast(self.gamma, wide) + ops.cast(self.beta, wide)
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            value = ops.cast(ops.mean(value, tuple(range(len(shape) + 1))), moving.dtype)
            moving.assign(moving * self.momentum + value * (1.0 - self.momentum))
        return ops.cast(ops.reshape(y, shape), inputs.dtype)


def _devices() -> int:
    """The devices that share the rows that a layer sees: under JAX all of a batch's."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return 1
    return distribution.device_mesh.devices.size
