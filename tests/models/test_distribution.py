"""Many devices take the steps of one, in processes of their own.

Virtual devices are set up before a backend starts.
"""

import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import pytest
from quick_xla import xla_flags

pytestmark = pytest.mark.slow

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
        out, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 0, out + err[-3000:]
    return out


def read(out: str) -> dict[str, float]:
    """Reads what distribution_cases.py printed."""
    lines = [line.split() for line in out.splitlines()]
    return {line[0]: float(line[1]) for line in lines if len(line) == 2}


def check(found: dict[str, float], *names: str) -> None:
    assert set(names) == set(found)
    assert {name: value for name, value in found.items() if not value < 1e-5} == {}


def test_devices_of_one_process_take_the_steps_of_one():
    found = read(finish(start(keras.backend.backend(), "2", XLA_FLAGS=xla_flags(2))))
    assert found.pop("other") > 1e-3  # another seed, other masks
    # Of 8 rows, those with the mask of the row 8 further on. Under TensorFlow these are another
    # replica's, and Keras gives each replica the same seeds.
    assert found.pop("equal") == (8 if TENSORFLOW else 0)
    names = ("weights", "logs", "accumulation", "synchronized", "synchronized_logs", "lora")
    names += ("own", "again")
    parts = [f"parts{how}{logs}" for how in ("", "_remat", "_loop") for logs in ("", "_logs")]
    parts += ["parts_lora", "parts_accumulation", "a_row_at_a_time"]
    parts += [f"outside_{call}" for call in ("fit", "train", "test", "predict")]
    parts += [f"uneven_{call}" for call in ("fit", "train", "test")]
    replicas = ["short", "short_logs", "refused"]
    replicas += [f"itself_{call}" for call in ("train", "test", "predict")]
    check(found, *names, *(replicas if TENSORFLOW else parts))


@pytest.mark.skipif(not TENSORFLOW, reason="MultiWorkerMirroredStrategy is TensorFlow's")
def test_two_processes_take_the_steps_of_one():
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    cluster = {"worker": [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]}
    for free in sockets:
        free.close()
    tasks = [{"type": "worker", "index": index} for index in range(2)]
    configs = [json.dumps({"cluster": cluster, "task": task}) for task in tasks]
    workers = [start("workers", "2", TF_CONFIG=config) for config in configs]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # both pipes are read at once
        for out in pool.map(finish, workers):
            check(read(out), "weights", "logs", "accumulation")
