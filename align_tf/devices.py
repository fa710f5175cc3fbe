"""The devices that Keras's backend computes on, and training on all of them."""

import importlib.metadata
from typing import Any

import keras


def describe_devices() -> str:
    """Says what there is to compute on, such as `8 TPU devices, Keras on jax`."""
    kinds = [device.split(":")[0].upper() for device in keras.distribution.list_devices()]
    plural = "s" if len(kinds) > 1 else ""
    return f"{len(kinds)} {kinds[0]} device{plural}, Keras on {keras.backend.backend()}"


def data_parallel() -> Any:
    """Makes what spreads each batch over all devices; build, compile and fit within `.scope()`.

    Returns:
        On JAX a `keras.distribution.DataParallel`. On TensorFlow a `TPUStrategy` where
        tensorflow-tpu is installed, a `MirroredStrategy` for several devices, and for a single
        one the default strategy.
    """
    if keras.backend.backend() == "jax":
        return keras.distribution.DataParallel()
    import tensorflow as tf

    if _is_installed("tensorflow-tpu"):
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    devices = keras.distribution.list_devices()
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.get_strategy()


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
