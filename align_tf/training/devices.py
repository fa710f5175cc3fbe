"""The devices that Keras's backend computes on, and training on several of them."""

import importlib.metadata
import numbers
from collections.abc import Sequence
from typing import Any

import keras

from align_tf.models.sharded_state import ShardedState
from align_tf.training import hosts


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


def data_parallel(count: int | None = None, shard_state: bool = False) -> Any:
    """Makes what spreads each batch over devices; build, compile and fit within `.scope()`.

    Args:
        count: how many of them; None takes all.
        shard_state: on JAX, keep weights and the optimizer's slots in parts, one on each device,
            and gather a weight where it is computed with (ZeRO, arXiv 1910.02054).

    Returns:
        On JAX a `keras.distribution.DataParallel`, or a subclass of it that shards state. On
        TensorFlow a `TPUStrategy` over all cores where tensorflow-tpu is installed, a
        `MirroredStrategy` for several devices, and for a single one the default strategy.

    Raises:
        ValueError: `count` is no positive integer, or there are fewer, or more and several
            processes; or `shard_state` on another backend than JAX, or with a single device.
    """
    devices = keras.distribution.list_devices()
    if count is not None:
        if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
            raise ValueError(f"devices={count!r}: expected a positive integer")
        if count > len(devices):
            raise ValueError(f"devices={count}: found {len(devices)}, {', '.join(devices)}")
        check_all(count)
    devices = devices[:count]
    if shard_state:
        check_shard_state(len(devices))
    if keras.backend.backend() == "jax":
        return spread_over(devices, shard_state)
    import tensorflow as tf

    if _is_installed("tensorflow-tpu"):
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.get_strategy()


def spread_over(devices: Sequence[Any], shard_state: bool) -> keras.distribution.DataParallel:
    """Makes what spreads each batch over JAX's devices, and the state if asked for."""
    if shard_state:
        return ShardedState(devices)
    # Each process reads its own part of a batch: see `make_dataset`'s shard.
    return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)


def check_all(count: int) -> None:
    """Checks that a training of several processes is on all of their devices.

    Raises:
        ValueError: it is not, so that a process may have none.
    """
    if hosts.place()[1] > 1 and count != count_devices():
        raise ValueError(f"devices={count}: expected all, where several processes train")


def check_shard_state(count: int) -> None:
    """Checks that the state of a training can be sharded.

    Args:
        count: the devices.

    Raises:
        ValueError: Keras does not run on JAX, or there is a single device.
    """
    if keras.backend.backend() != "jax":
        raise ValueError("shard_state=True: JAX shards the state; expected KERAS_BACKEND=jax")
    if count == 1:
        raise ValueError("shard_state=True: one device holds the whole state; expected several")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
