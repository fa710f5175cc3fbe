"""What there is to compute on, and the strategy over all of it."""

import os
import subprocess
import sys

import keras
import pytest
from quick_xla import xla_flags

from align_tf.training import data_parallel
from align_tf.training.devices import describe_devices

# Virtual devices are set up before a backend starts.
TWO_DEVICES = """
import keras
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    devices = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
from align_tf.training import data_parallel
from align_tf.training.devices import describe_devices
print(describe_devices())
print(type(data_parallel()).__name__)
"""
BACKEND = keras.backend.backend()
# backend: strategy of one device, of several
STRATEGIES = {
    "tensorflow": ("_DefaultDistributionStrategy", "MirroredStrategy"),
    "jax": ("DataParallel", "DataParallel"),
}


def test_the_one_device_is_used():
    assert describe_devices() == f"1 CPU device, Keras on {BACKEND}"
    assert type(data_parallel()).__name__ == STRATEGIES[BACKEND][0]


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_a_number_of_devices_that_is_none_is_refused(count):
    with pytest.raises(ValueError, match=f"devices={count}: expected a positive integer"):
        data_parallel(count)


@pytest.mark.slow  # the import of another process
def test_all_devices_are_used():
    environment = {**os.environ, "XLA_FLAGS": xla_flags(2), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", TWO_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, strategy = done.stdout.splitlines()
    assert said == f"2 CPU devices, Keras on {BACKEND}"
    assert strategy == STRATEGIES[BACKEND][1]
