"""The activations of both towers, by the names that Hugging Face gives them."""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import activations


def swish(x: Any) -> Any:
    """x * sigmoid(x); on TensorFlow its gradient is one loop, where the operations would be six."""
    if keras.backend.backend() != "tensorflow":
        return activations.silu(x)
    import tensorflow as tf

    @tf.custom_gradient
    def with_gradient(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        return x * tf.sigmoid(x), lambda upstream: swish_gradient(x, upstream)

    return with_gradient(tf.convert_to_tensor(x))


def swish_gradient(x: Any, upstream: Any, scale: Any = None, offset: Any = None) -> Any:
    """The gradient of swish at x * scale + offset, or at x, on TensorFlow.

    Args:
        x: float (..., c).
        upstream: the gradient at swish's result, as x.
        scale: float32 (c,) or None.
        offset: float32 (c,) or None.

    Returns:
        As x.
    """
    import tensorflow as tf

    return tf.ensure_shape(_swish_gradient()(x, upstream, scale, offset), x.shape)


@functools.cache
def _swish_gradient() -> Callable:
    """Returns the gradient as a function that XLA compiles, for each shape once."""
    import tensorflow as tf

    @tf.function(jit_compile=True, reduce_retracing=True)
    def gradient(x: tf.Tensor, upstream: tf.Tensor, scale: Any, offset: Any) -> tf.Tensor:
        if scale is not None:
            x = tf.cast(tf.cast(x, scale.dtype) * scale + offset, x.dtype)
        s = tf.sigmoid(x)
        return upstream * (s + x * s * (1 - s))

    return gradient


ACTIVATIONS = {
    "gelu": functools.partial(activations.gelu, approximate=False),
    "gelu_new": functools.partial(activations.gelu, approximate=True),
    "mish": activations.mish,
    "relu": activations.relu,
    "selu": activations.selu,
    "silu": swish,
    "swish": swish,
}


def get_activation(name: str | Callable) -> Callable:
    """Returns the function of that name, or the callable itself."""
    return name if callable(name) else ACTIVATIONS[name]
