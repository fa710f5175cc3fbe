"""The devices of this machine that share a batch, in either backend."""

import contextlib

import keras


def count_devices() -> int:
    """Counts the GPUs or TPU cores that Keras's backend finds; without any, its CPU devices."""
    return len(_names())


def sharing(count: int) -> contextlib.AbstractContextManager:
    """Returns a scope in which models are built and trained over the first `count` devices.

    Args:
        count: devices; 1 gives a scope that changes nothing.

    Raises:
        ValueError: there are fewer.
    """
    names = _names()
    if count > len(names):
        raise ValueError(f"devices={count}: found {len(names)}, {', '.join(names)}")
    if count == 1:
        return contextlib.nullcontext()
    if keras.backend.backend() == "jax":
        return keras.distribution.DataParallel(devices=names[:count]).scope()
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(names[:count]).scope()


def _names() -> list[str]:
    if keras.backend.backend() == "jax":
        return keras.distribution.list_devices()
    import tensorflow as tf

    devices = tf.config.list_logical_devices
    return [device.name for device in devices("GPU") or devices("CPU")]
