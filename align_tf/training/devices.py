"""The devices that Keras's backend computes on, and training on several of them."""

import importlib.metadata
from typing import Any

import keras


def count_devices() -> int:
    """Counts the GPUs or TPU cores that Keras's backend finds; without any, its CPU devices."""
    return len(keras.distribution.list_devices())


def has_tpu() -> bool:
    """Whether Keras's backend finds a TPU."""
    return any("tpu" in device.lower() for device in keras.distribution.list_devices())


def describe_devices() -> str:
    """Says what there is to compute on, such as `8 TPU devices, Keras on jax`."""
    kinds = [device.split(":")[0].upper() for device in keras.distribution.list_devices()]
    plural = "s" if len(kinds) > 1 else ""
    return f"{len(kinds)} {kinds[0]} device{plural}, Keras on {keras.backend.backend()}"


def data_parallel(count: int | None = None) -> Any:
    """Makes what spreads each batch over devices; build, compile and fit within `.scope()`.

    Args:
        count: how many of them; None takes all.

    Returns:
        On JAX a `keras.distribution.DataParallel`. On TensorFlow a `TPUStrategy` over all cores
        where tensorflow-tpu is installed, a `MirroredStrategy` for several devices, and for a
        single one the default strategy.

    Raises:
        ValueError: there are fewer than `count`.
    """
    devices = keras.distribution.list_devices()
    if count is not None and count > len(devices):
        raise ValueError(f"devices={count}: found {len(devices)}, {', '.join(devices)}")
    devices = devices[:count]
    if keras.backend.backend() == "jax":
        # Each process reads its own part of a batch: see `make_dataset`'s shard.
        return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    import tensorflow as tf

    if _is_installed("tensorflow-tpu"):
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.get_strategy()


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
