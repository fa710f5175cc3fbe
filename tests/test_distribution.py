"""Many devices take the steps of one, in processes of their own.

Virtual devices are set up before a backend starts.
"""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

CASES = pathlib.Path(__file__).with_name("distribution_cases.py")
TENSORFLOW = keras.backend.backend() == "tensorflow"


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(CASES), *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, out + err[-3000:]
    return out


@pytest.mark.parametrize("count", [2, 4] if TENSORFLOW else [2, 4, 8])
def test_devices_of_one_process_take_the_steps_of_one(count):
    flags = f"--xla_force_host_platform_device_count={count}"
    out = finish(start(keras.backend.backend(), str(count), XLA_FLAGS=flags))
    lines = [line.split() for line in out.splitlines()]
    found = {line[0]: float(line[1]) for line in lines if len(line) == 2}
    if count == 2:
        own = found.pop("own")
        # A replica's BatchNorm sees its own rows; under JAX one program sees all of them.
        assert own > 1e-4 if TENSORFLOW else own < 1e-5
        assert {"accumulation", "synchronized", "dropout"} < set(found)
    assert {"weights", "logs"} <= set(found)
    assert {name: value for name, value in found.items() if not value < 1e-5} == {}
