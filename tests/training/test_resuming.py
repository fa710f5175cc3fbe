"""A training that goes on: to the same weights after a kill, a signal, a broken file."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import fsspec
import keras
import pytest
from small_training import STEPS, apart, assert_same_end, flags

from align_tf import AlignModel
from align_tf.cli.main import main
from align_tf.files import CheckpointError
from align_tf.training import Recipe, devices, read_recipe, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("traced_once")]

# Stops for good where the second checkpoint is written, but for its processor.
HANGS = """
import sys, time
from align_tf import AlignProcessor
from align_tf.cli.main import main

save_pretrained = AlignProcessor.save_pretrained

def save_or_hang(self, folder):
    if "checkpoint-12" in str(folder):
        print("here", flush=True)
        time.sleep(3600)
    save_pretrained(self, folder)

AlignProcessor.save_pretrained = save_or_hang
sys.exit(main())
"""


def test_a_training_that_breaks_off_goes_on_to_the_same_weights(settings, unbroken, when, capsys):
    """It breaks off between two checkpoints, and leaves what a kill can leave."""
    output = pathlib.Path(settings["output"])

    def break_off():
        raise RuntimeError("broken off")

    when["step 10/"] = break_off
    with pytest.raises(RuntimeError, match="broken off"):
        train(Recipe(**settings))
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-6"]
    assert not (output / "model.safetensors").exists()
    for name in (".checkpoint-12", ".old-checkpoint-0"):  # half written, half removed
        (output / name).mkdir()
        (output / name / "config.json").write_text("{")
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')

    capsys.readouterr()
    when.clear()
    assert main(["train", *flags(settings)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == settings["output"]
    assert "Going on from step 6, " in err
    assert_same_end(output, unbroken)
    assert not list(output.glob(".*checkpoint*"))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]


def test_a_training_whose_pace_follows_its_steps_keeps_it_where_it_goes_on(
    settings, unbroken, when, capsys
):
    del settings["save_every"], settings["log_every"]
    given = flags(settings)
    when["step 5/"] = lambda: signal.raise_signal(signal.SIGINT)
    assert main(["train", *given]) == 130
    said = capsys.readouterr().err.splitlines()
    when.clear()
    assert main(["train", *given]) == 0
    again = capsys.readouterr().err.splitlines()
    header = [
        f"Training {settings['model']} on {settings['data']}: loading TensorFlow ...",
        f"Data: {settings['data']}, 24 pairs, 8 in a batch",
        f"Devices: {devices.describe_devices()}, float32",
        "Training: 3,113 of 3,465 weights",
        "Optimizer: lamb, learning_rate 0.01, warmup_steps 3, schedule linear",
        "Steps: 20, 3 an epoch; a line every 1, a checkpoint every 2",
    ]
    assert said[:6] == again[:6] == header
    assert any(line.startswith("step 5/20  epoch 2/7  loss ") for line in said)
    assert f"Next: align-tf export --model {settings['output']} --output models/align" in again
    assert_same_end(pathlib.Path(settings["output"]), unbroken)
    lines = (pathlib.Path(settings["output"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def test_a_training_in_a_bucket_goes_on_from_its_last_whole_checkpoint(
    settings, place, unbroken, when, capsys, tmp_path
):
    bucket = fsspec.filesystem("memory")
    bucket.store.clear()
    for file in (place / "pairs").iterdir():
        bucket.pipe_file(f"/bucket/pairs/{file.name}", file.read_bytes())
    for file in (place / "tiny").iterdir():
        bucket.pipe_file(f"/bucket/tiny/{file.name}", file.read_bytes())
    places = ("model", "tiny"), ("data", "pairs"), ("output", "out")
    settings |= {key: f"memory://bucket/{name}" for key, name in places}

    def break_off():
        raise RuntimeError("broken off")

    when["step 15/"] = break_off
    with pytest.raises(RuntimeError, match="broken off"):
        train(Recipe(**settings))
    found = sorted(path.split("/")[3] for path in bucket.find("/bucket/out"))
    assert sorted(set(found)) == [
        *("checkpoint-12", "checkpoint-6", "data_listing.npz", "metrics.jsonl", "recipe.yaml"),
    ]
    # As if it had been killed before the last file was sent.
    bucket.rm_file("/bucket/out/checkpoint-12/training_state.json")
    when.clear()
    capsys.readouterr()
    assert main(["train", *flags(settings)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == settings["output"]
    assert "Going on from step 6, memory://bucket/out/checkpoint-6" in err
    bucket.get("/bucket/out", str(tmp_path / "fetched"), recursive=True)
    (output,) = (path.parent for path in tmp_path.glob("fetched/**/recipe.yaml"))
    assert_same_end(output, unbroken)
    whole = {path.parent.name for path in output.glob("checkpoint-*/training_state.json")}
    assert whole == {"checkpoint-18", "checkpoint-20"}
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]
    model = AlignModel.from_pretrained("memory://bucket/out/checkpoint-20")
    assert model.config.projection_dim == 8
    bucket.store.clear()


def test_a_training_killed_in_a_checkpoint_reaches_the_same_weights(settings, unbroken, capsys):
    output = pathlib.Path(settings["output"])
    command = [sys.executable, "-c", HANGS, "train", *flags(settings)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        said = process.stdout.readline()
        process.kill()
        assert said == "here\n", process.communicate()[1]
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in output.glob("*checkpoint*")} == {".checkpoint-12", "checkpoint-6"}
    assert not (output / "model.safetensors").exists()

    capsys.readouterr()
    assert main(["train", *flags(settings)]) == 0
    assert "Going on from step 6, " in capsys.readouterr().err
    assert_same_end(output, unbroken)
    assert not list(output.glob(".*checkpoint*"))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]


def test_signals_save_and_the_same_command_goes_on(settings, unbroken, when, capsys):
    """Ctrl-C, then SIGTERM, then none."""
    settings["save_every"] = STEPS  # so that a checkpoint before the end is the signal's
    output = pathlib.Path(settings["output"])
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    before = 0
    for step, number in zip((5, 10), numbers, strict=True):
        when[f"step {step}/"] = lambda number=number: signal.raise_signal(number)
        assert main(["train", *flags(settings)]) == 130
        err = capsys.readouterr().err
        assert f"Stopped at step {step}; the same command goes on from there" in err
        assert (f"Going on from step {before}, " in err) == (before > 0)
        assert [signal.getsignal(number) for number in numbers] == handlers
        assert (output / f"checkpoint-{step}").is_dir()
        before = step

    assert main(["train", *flags(settings)]) == 0
    assert "Going on from step 10, " in capsys.readouterr().err
    assert_same_end(output, unbroken)


def test_a_broken_checkpoint_falls_back_to_the_one_before(settings, unbroken, capsys):
    output = pathlib.Path(settings["output"])
    shutil.copytree(unbroken, output)
    state = output / "checkpoint-20" / "training_state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    train(Recipe(**settings))
    err = capsys.readouterr().err
    assert "checkpoint-20 is broken, so the one before it is taken" in err
    assert "Going on from step 18" in err
    assert_same_end(output, unbroken)


def test_no_whole_checkpoint_is_an_error_not_a_new_start(settings, unbroken):
    output = pathlib.Path(settings["output"])
    shutil.copytree(unbroken, output)
    for folder in output.glob("checkpoint-*"):
        os.truncate(folder / "training_state.safetensors", 1000)
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        train(Recipe(**settings))


def test_a_training_goes_on_with_another_memory(settings, unbroken, capsys):
    output = pathlib.Path(settings["output"])
    shutil.copytree(unbroken, output)
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    train(Recipe(**settings, remat=True))
    assert "Going on from step 18" in capsys.readouterr().err
    assert read_recipe(output / "recipe.yaml").remat
    # Of a key's bias the gradient is rounding, which LAMB makes large.
    assert apart(output, unbroken, r"key.bias") < 1e-5


def test_a_folder_of_another_training_is_refused(settings, unbroken, tmp_path):
    others = {
        "learning_rate": (0.02, r"learning_rate=0\.01, this recipe has 0\.02; expected the same"),
        "accumulation": (2, "accumulation=1, .* whose parts draw masks of dropout of their own"),
    }
    if keras.backend.backend() == "tensorflow":
        said = "devices=None, .* on tensorflow each device draws masks of dropout of its own; exp"
        others["devices"] = (1, said)
    for key, (value, said) in others.items():
        other = {**settings, "output": str(unbroken), key: value}
        with pytest.raises(ValueError, match=f"belongs to a training with {said}"):
            train(Recipe(**other))
    # By the command line one setting brings another's default.
    other = {**settings, "output": str(unbroken), "learning_rate": 0.02, "weight_decay": 0.5}
    said = r"learning_rate=0\.01 and weight_decay=.*, this recipe has 0\.02 and 0\.5; expected"
    with pytest.raises(ValueError, match=said):
        train(Recipe(**other))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not of a training"):
        train(Recipe(**{**settings, "output": str(tmp_path)}))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_checkpoint_of_another_number_of_devices_than_are_found_is_told(settings, unbroken):
    output = pathlib.Path(settings["output"])
    shutil.copytree(unbroken, output)
    for folder in output.glob("checkpoint-*"):
        summary = json.loads((folder / "training_state.json").read_text())
        assert summary["devices"] == 1
        (folder / "training_state.json").write_text(json.dumps(summary | {"devices": 2}))
    if keras.backend.backend() == "jax":
        train(Recipe(**settings))
        return
    with pytest.raises(ValueError, match=r"on 2 devices, and here it is 1, and on tensorflow each"):
        train(Recipe(**settings))


def test_parts_of_a_devices_images_are_of_as_many_devices(settings):
    output = pathlib.Path(settings["output"])
    (output / "checkpoint-6").mkdir(parents=True)
    settings |= {"virtual_batch_size": 4}
    Recipe(**settings, devices=2).save(output / "recipe.yaml")
    with pytest.raises(ValueError, match=r"devices=2, .* has 1, and virtual_batch_size takes"):
        train(Recipe(**settings, devices=1))
