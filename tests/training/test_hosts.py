"""Several processes train as one: to its weights, with its figures, and after one was killed."""

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import safetensors.numpy
from quick_xla import xla_flags
from small_training import STEPS, apart, flags, settings_of

from align_tf import AlignModel
from align_tf.training import hosts

# Two epochs of `fit`, and the validation of each; the first process writes.
FIT = """
import json, os, sys
import jax, keras
if "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize()
from align_tf import AlignModel, AlignProcessor
from align_tf.data import make_dataset
from align_tf.training import ResumableCheckpoint, RetrievalEvaluation, data_parallel

place, output = sys.argv[1:]
index, count = jax.process_index(), jax.process_count()
processor = AlignProcessor.from_pretrained(place + "/tiny")
options = {"batch_size": 8 // count, "shard": (index, count)}
keras.utils.set_random_seed(0)
with data_parallel().scope():
    model = AlignModel.from_pretrained(place + "/tiny")
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    checkpoints = ResumableCheckpoint(output, processor)
    assert checkpoints.restore(model) == 0
    history = model.fit(
        make_dataset(place + "/pairs", processor, training=True, **options),
        steps_per_epoch=3, epochs=2, shuffle=False, verbose=0,
        validation_data=make_dataset(place + "/pairs", processor, **options),
        callbacks=[
            RetrievalEvaluation(make_dataset(place + "/pairs", processor, batch_size=8)),
            checkpoints,
        ],
    ).history
    if index == 0:  # the others do not wait for it
        model.save(output + ".keras")
        model.save_weights(output + ".weights.h5")
if index == 0:
    print(json.dumps(history))
"""

# Runs commands in turn, each in an environment: one import serves them all.
IN_TURN = """
import json, os, sys
from align_tf.cli.main import main

index = int(os.environ.get("KERAS_DISTRIBUTION_PROCESS_ID", 0))
for environment, arguments in json.loads(sys.argv[1])[index]:
    os.environ.update(environment)
    print("--", main(arguments), file=sys.stderr, flush=True)
    for name in environment:
        del os.environ[name]
"""


# `align-tf train`, with parts of all weights, and with a look at what lies on a device and at what
# a user saves.
IN_PARTS = """
import functools, sys
import jax, numpy, pytest
from align_tf.cli.main import main
from align_tf.evaluation import Embedder
from align_tf.models import sharded_state
from align_tf.training import gathered, resume

sharded_state.LEAST = 1
save = resume.save

# What would wait for the other processes, where the first alone does it.
def refuse_to_compute(model):
    pixels, texts = numpy.zeros((4, 16, 16, 3), "float32"), numpy.ones((4, 6), "int32")
    pairs = {"pixel_values": pixels, "input_ids": texts}
    calls = [functools.partial(model.fit, pairs, batch_size=4, verbose=0)]
    calls += [functools.partial(model.evaluate, pairs, batch_size=4, verbose=0)]
    calls += [functools.partial(model.train_on_batch, pairs)]
    calls += [functools.partial(model.test_on_batch, pairs)]
    calls += [functools.partial(model, pairs), functools.partial(model.text_model, texts)]
    calls += [functools.partial(Embedder(model).images, pixels)]
    for one in (model, model.text_model):
        calls += [functools.partial(one.load_weights, "a.weights.h5")]
        calls += [functools.partial(one.set_weights, [])]
    calls += [functools.partial(model.use_sigmoid_loss, 8), model.merge_adapter]
    calls += [functools.partial(model.enable_lora, 2), functools.partial(model.load_adapter, "a")]
    calls += [functools.partial(model.set_adapter, None)]
    calls += [functools.partial(model.delete_adapter, None)] if model.active_adapter else []
    for call in calls:
        with pytest.raises(ValueError, match="gathered for the first process to save; expected to"):
            call()

def checked(output, step, model, *rest):
    values = [v.value for v in (*model.variables, *model.optimizer.variables)]
    there = sum(value.addressable_shards[0].data.size for value in values)
    assert there < sum(value.size for value in values) * 1.3 / jax.device_count()
    if jax.process_count() > 1 and step == 6:
        for name in ("save_pretrained", "save", "save_weights"):
            place = output / {"save": "a.keras", "save_weights": "a.weights.h5"}.get(name, "a")
            with pytest.raises(ValueError, match="a part of it alone; expected `with align_tf.tr"):
                getattr(model, name)(place)
            assert not place.exists()
    if step == 18:
        with gathered(model), gathered(model):
            if jax.process_count() > 1:
                refuse_to_compute(model)
            if jax.process_index() == 0:
                model.save_pretrained(output / "by_hand")
                model.save(output / "by_hand.keras")
                model.save_weights(output / "by_hand.weights.h5")
        if jax.process_count() > 1:
            weight = next(v for v in model.variables if sharded_state.is_apart(v.value))
            with pytest.raises(ValueError, match="assigned while gathered; expected it after"):
                with gathered(model):
                    weight.assign(numpy.zeros(weight.shape))
            assert sharded_state.is_apart(weight.value)
    return save(output, step, model, *rest)

if "true" in sys.argv[sys.argv.index("--shard-state"):][1]:
    resume.save = checked
sys.exit(main(sys.argv[1:]))
"""


def start(
    count: int, devices: int, settings: dict | list[dict], command: list[str] | None = None
) -> list[subprocess.Popen]:
    """Starts the processes of a training, each with so many devices; a list has each one's."""
    given = settings if isinstance(settings, list) else [settings] * count
    commands = [command or ["-m", "align_tf", "train", *flags(one)] for one in given]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": xla_flags(devices),
    }
    if count > 1:
        environment |= {
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(count),
        }
    return [
        subprocess.Popen(
            [sys.executable, *commands[index]],
            env={**environment, "KERAS_DISTRIBUTION_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Waits for all, and returns what each has said on stderr."""
    try:
        said = [process.communicate()[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def last_words(process: subprocess.Popen) -> list[tuple[str, str]]:
    """Waits for a process of IN_TURN, and returns each command's last line and code."""
    return re.findall(r"^(.*)\n-- (\d+)$", process.communicate()[1], re.MULTILINE)


def assert_equal(model, *others) -> None:
    for weight, *found in zip(*(each.weights for each in (model, *others)), strict=True):
        for value in found:
            np.testing.assert_array_equal(value, weight, err_msg=weight.path)


@pytest.fixture(scope="module")
def settings(place):
    pytest.importorskip("jax")
    return {**settings_of(place, "?"), "validation_data": str(place / "pairs"), "devices": None}


def run(settings, output, count: int, devices: int = 1) -> list[str]:
    given = {key: value for key, value in settings.items() if value is not None}
    given |= {"output": str(output)}
    command = ["-c", IN_PARTS, "train", *flags(given)] if "shard_state" in given else None
    return finish(start(count, devices, given, command))


@pytest.fixture(scope="module")
def of_one(settings, tmp_path_factory):
    """The folder of a training by one process."""
    output = tmp_path_factory.mktemp("hosts") / "one"
    run(settings, output, 1)
    return output


@pytest.fixture(scope="module")
def of_two(settings, of_one):
    """The same by two."""
    said = run(settings, of_one.with_name("two"), 2)
    assert "Devices: 2 CPU devices" in said[0] and "step 20/20" in said[0]
    assert "step" not in said[1]
    return of_one.with_name("two")


def figures(output) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_alike(output, of_one) -> None:
    # Attention does not depend on its keys' bias: the gradient is rounding, which LAMB makes large.
    assert apart(output, of_one, r"seed|key.bias") < 1e-5
    found, expected = figures(output), figures(of_one)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert sum("val_r1_i2t" in line for line in found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(of_one, of_two):
    assert_alike(of_two, of_one)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(4, 1), (2, 2)])
def test_more_processes_and_devices_take_them_too(settings, of_one, tmp_path, count, devices):
    run(settings, tmp_path / "out", count, devices)
    assert_alike(tmp_path / "out", of_one)


@pytest.fixture(scope="module")
def in_parts(settings, of_one):
    """The same by two processes with the state in parts."""
    output = of_one.with_name("parts")
    run({**settings, "shard_state": "true"}, output, 2)
    return output


@pytest.mark.slow
def test_processes_with_the_state_in_parts_take_them_too(of_one, in_parts):
    assert_alike(in_parts, of_one)


@pytest.mark.slow
def test_the_first_process_saves_what_all_have_gathered(in_parts):
    found = AlignModel.from_pretrained(in_parts / "by_hand")
    read = AlignModel(found.config)
    read.load_weights(in_parts / "by_hand.weights.h5")
    assert_equal(found, read, keras.saving.load_model(in_parts / "by_hand.keras"))
    # The checkpoint's own weights are an average over the steps before.
    expected = AlignModel.from_pretrained(in_parts / "checkpoint-18")
    for one, other in zip(expected.weights, found.weights, strict=True):
        np.testing.assert_allclose(one, other, atol=0.03, err_msg=one.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "changes", "count", "devices"),
    [
        ("in_parts", {"shard_state": "false"}, 1, 1),
        ("of_one", {"shard_state": "true"}, 1, 4),
        ("of_one", {"shard_state": "true"}, 2, 1),
        ("of_one", {"devices": "2", "remat": "true"}, 1, 4),
        ("of_one", {"loop_blocks": "true"}, 1, 1),
    ],
)
def test_a_training_goes_on_in_the_other_layout(
    request, settings, of_one, tmp_path, begun, changes, count, devices
):
    shutil.copytree(request.getfixturevalue(begun), tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / f"checkpoint-{STEPS}")
    said = run({**settings, **changes}, tmp_path / "out", count, devices)
    assert "Going on from step 18, " in said[0]
    assert_alike(tmp_path / "out", of_one)


@pytest.mark.slow
def test_an_adapter_of_a_base_in_parts_goes_on_with_it_whole(settings, tmp_path):
    settings = {**settings, "lora_rank": "2", "batch_norm": "frozen", "keep_best": "val_r1_t2i"}
    run({**settings, "shard_state": "true"}, tmp_path / "two", 2)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / f"checkpoint-{STEPS}")
    said = run({**settings, "shard_state": "false"}, tmp_path / "one", 1)
    assert "Going on from step 18, " in said[0]  # the checkpoint tells its base from others
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-5


@pytest.mark.slow
def test_fit_by_two_processes_is_that_of_one(place, tmp_path):
    pytest.importorskip("jax")
    histories = []
    for count in (1, 2):
        processes = start(count, 1, {}, ["-c", FIT, str(place), str(tmp_path / str(count))])
        outs = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0] * count, outs
        histories.append(json.loads(outs[0][0].splitlines()[-1]))
    assert histories[1].keys() == histories[0].keys() >= {"val_loss", "val_r1_i2t"}
    for name, values in histories[0].items():
        assert histories[1][name] == pytest.approx(values, abs=1e-5), name
    one, two = (
        safetensors.numpy.load_file(tmp_path / name / "checkpoint-6" / "training_state.safetensors")
        for name in ("1", "2")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-5, err_msg=name)
    saved = keras.saving.load_model(tmp_path / "2.keras")
    read = AlignModel(saved.config)
    read.load_weights(tmp_path / "2.weights.h5")
    expected = AlignModel.from_pretrained(tmp_path / "2" / "checkpoint-6")
    assert_equal(expected, saved, read)


@pytest.mark.slow
def test_after_a_kill_of_one_all_go_on_to_the_weights_of_an_unbroken_run(
    settings, of_two, tmp_path
):
    given = {key: value for key, value in settings.items() if value is not None}
    given |= {"output": str(tmp_path / "out")}
    processes = start(2, 1, given)
    for line in processes[0].stderr:
        if line.startswith("step 10/"):
            break
    processes[1].send_signal(signal.SIGKILL)
    for process in processes:
        process.kill()  # as who runs a pod starts all anew
        process.communicate()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    said = run(settings, tmp_path / "out", 2)
    assert "Going on from step 6, " in said[0]
    assert apart(tmp_path / "out", of_two, "$^") == 0.0
    assert figures(tmp_path / "out") == figures(of_two)


OTHERS = (
    ({"seed": "2"}, ["--seed 0: not so in ev", "--seed 2: not so in ev"]),
    ({"output": "y"}, ["another process has ended in an error", "y: not where the first pr"]),
    ({"data": "gone"}, ["another process has ended in an error", "gone: no such file or fo"]),
    ({"data": "fewer"}, ["data: pairs: 20, 24 in the processes; expected one"] * 2),
)


@pytest.mark.slow
def test_processes_of_different_recipes_are_told(settings, place, tmp_path):
    shutil.copytree(place / "pairs", tmp_path / "fewer", ignore=shutil.ignore_patterns("2*"))
    commands = ([], [])
    for number, (other, _) in enumerate(OTHERS):
        given = {key: value for key, value in settings.items() if value is not None}
        given |= {"output": str(tmp_path / f"out{number}")}
        if "seed" not in other:
            other = {key: str(tmp_path / value) for key, value in other.items()}
        for of_one, changes in zip(commands, ({}, other), strict=True):
            of_one.append(({}, ["train", *flags(given | changes)]))
    processes = start(2, 1, {}, ["-c", IN_TURN, json.dumps(commands)])
    for place_of, said in enumerate(map(last_words, processes)):
        for (line, code), (_, expected) in zip(said, OTHERS, strict=True):
            assert code == "2", line
            assert re.match(rf"align-tf: error: (\S*/)?{expected[place_of]}", line), line


# --- what the environment says -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),  # as Colab has it
        ({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "t1v-0"}, True),
    ],
)
def test_several_processes_are_told_by_the_environment(monkeypatch, environment, expected):
    for name in (*hosts.NUMBERS, *hosts.NAMES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._several() is expected


@pytest.mark.parametrize("name", ["KERAS_DISTRIBUTION_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="of the other backends")
def test_several_processes_on_another_backend_are_told(monkeypatch, name):
    """Each would write the same output."""
    monkeypatch.setenv("SLURM_NTASKS", "2")  # of an allocation, in which this may be the only one
    hosts.join()
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=rf"^{name}=2: several processes .* KERAS_BACKEND=jax"):
        hosts.join()


ALONE = (
    ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2: several processes, which .* expected srun"),
    ({"_JOB_ADDRESSES": "nohost"}, "KERAS_DISTRIBUTION_JOB_ADDRESSES=nohost, KERAS.*port, "),
    ({"_NUM_PROCESSES": "x"}, "KERAS_.*_NUM_PROCESSES=x, .* find each other: .*this one's pl"),
)


@pytest.mark.slow
def test_processes_that_cannot_find_each_other_are_told():
    pytest.importorskip("jax")
    whole = {"_JOB_ADDRESSES": "127.0.0.1:9", "_NUM_PROCESSES": "2", "_PROCESS_ID": "0"}
    given = ["train", "--model", "align-tiny", "--data", "x", "--output", "y", "--steps", "1"]
    commands = []
    for environment, _ in ALONE:
        if "SLURM_NTASKS" not in environment:
            environment = {f"KERAS_DISTRIBUTION{k}": v for k, v in {**whole, **environment}.items()}
        commands.append((environment, given))
    (process,) = start(1, 1, {}, ["-c", IN_TURN, json.dumps([commands])])
    for (line, code), (_, expected) in zip(last_words(process), ALONE, strict=True):
        assert code == "2", line
        assert re.match(f"align-tf: error: {expected}", line), line


@pytest.mark.parametrize(("workers", "expected"), [("10.0.0.1", False), ("10.0.0.1,b", True)])
def test_a_tpu_without_an_environment_asks_its_metadata(monkeypatch, tmp_path, workers, expected):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fine = self.headers["Metadata-Flavor"] == "Google"
            fine &= self.path == "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
            self.send_response(200 if fine else 404)
            self.end_headers()
            self.wfile.write(workers.encode())

        def log_message(self, *arguments):
            pass

    for name in (*hosts.NUMBERS, *hosts.NAMES, "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "TPU_FILES", (str(tmp_path),))
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert hosts._several() is expected
        thread.join()
