"""A training on several devices is that on one, and goes on as that does."""

import json
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import safetensors.numpy
from small_training import flags

from align_tf.training import Recipe, train

# Trains on two devices, then again from the checkpoint of step 3.
TWO_DEVICES = """
import os, pathlib, shutil, sys
import keras
if keras.backend.backend() == "jax":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
else:
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, parts)
from align_tf.cli.main import main

two, again, *arguments = sys.argv[1:]
if main(["train", *arguments, "--output", two]):
    sys.exit("the training on two devices failed")
shutil.copytree(two, again)
shutil.rmtree(pathlib.Path(again) / "checkpoint-6")
sys.exit(main(["train", *arguments, "--output", again]))
"""


@pytest.mark.slow  # two replicas to trace, twice
def test_devices_share_a_batch_and_the_training_goes_on(settings, place, tmp_path):
    """Two devices train as one does, and a training on them goes on as on one."""
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config["text_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config["vision_config"]["drop_connect_rate"] = 0.0
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    settings |= {"model": str(tmp_path / "tiny"), "steps": 6, "save_every": 3, "log_every": 1}
    outputs = {name: tmp_path / name for name in ("one", "two", "again")}

    def losses(output):
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    train(Recipe(**{**settings, "output": str(outputs["one"]), "devices": 1}))
    del settings["output"]
    folders = [str(outputs["two"]), str(outputs["again"])]
    given = flags({**settings, "devices": 2})
    subprocess.run([sys.executable, "-c", TWO_DEVICES, *folders, *given], check=True)
    assert len(losses(outputs["one"])) == 6
    np.testing.assert_allclose(losses(outputs["two"]), losses(outputs["one"]), atol=1e-5)
    for name in ("model.safetensors", "checkpoint-6/training_state.safetensors"):
        found, expected = (
            safetensors.numpy.load_file(outputs[run] / name) for run in ("again", "two")
        )
        assert found.keys() == expected.keys()
        for key, value in found.items():
            np.testing.assert_array_equal(value, expected[key], err_msg=f"{name}: {key}")


def test_devices_that_are_not_there_are_refused(settings):
    with pytest.raises(ValueError, match=r"devices=8: found 1, .*(?i:cpu:0)"):
        train(Recipe(**settings, devices=8))
    if keras.backend.backend() == "jax":
        expected = "shard_state=True: one device holds the whole state; expected several"
    else:
        expected = "shard_state=True: JAX shards the state; expected KERAS_BACKEND=jax"
    with pytest.raises(ValueError, match=expected):
        train(Recipe(**settings, shard_state=True))
    with pytest.raises(ValueError, match="batch_size=8: expected a multiple of devices=3"):
        train(Recipe(**settings, devices=3))
