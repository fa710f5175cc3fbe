"""What there is to compute on, and the strategy over all of it, in processes of their own.

Virtual devices are set up before a backend starts.
"""

import os
import subprocess
import sys

import keras
import pytest

SHOW = """
import sys
import keras
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    devices = [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1])
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
from align_tf.training import data_parallel; from align_tf.training.devices import describe_devices
print(describe_devices())
print(type(data_parallel()).__name__)
"""
BACKEND = keras.backend.backend()
# backend: strategy of one device, of several
STRATEGIES = {
    "tensorflow": ("_DefaultDistributionStrategy", "MirroredStrategy"),
    "jax": ("DataParallel", "DataParallel"),
}


@pytest.mark.parametrize("count", [1, 2])
def test_all_devices_are_used(count):
    flags = f"--xla_force_host_platform_device_count={count}"
    environment = {**os.environ, "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", SHOW, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, strategy = done.stdout.splitlines()
    assert said == f"{count} CPU device{'s' * (count > 1)}, Keras on {BACKEND}"
    assert strategy == STRATEGIES[BACKEND][count > 1]
