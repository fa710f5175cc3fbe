"""Training by a recipe: resumes to the same weights after a kill, a signal, a broken file."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import fsspec
import keras
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from align_tf import AlignConfig, AlignImageProcessor, AlignModel, AlignProcessor, AlignTokenizer
from align_tf.cli.main import main
from align_tf.configuration import presets
from align_tf.data import make_dataset
from align_tf.files import CheckpointError
from align_tf.training import (
    Recipe,
    RetrievalEvaluation,
    devices,
    hosts,
    read_recipe,
    resume,
    run,
    train,
)
from align_tf.training.run import _take_best
from align_tf.training.validation import Best

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["a", "dark", "bright", "red", "green", "blue"]
STEPS = 20
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


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_config):
    """A folder with the checkpoint `tiny` and 24 pairs in `pairs`."""
    folder = tmp_path_factory.mktemp("training")
    values = small_config.to_dict()
    values["text_config"] |= {"vocab_size": len(WORDS)}
    keras.utils.set_random_seed(3)
    AlignModel(AlignConfig.from_dict(values)).save_pretrained(folder / "tiny")
    image_processor = AlignImageProcessor(size=20, crop_size=16)
    AlignProcessor(image_processor, AlignTokenizer(WORDS)).save_pretrained(folder / "tiny")
    (folder / "pairs").mkdir()
    rng = np.random.default_rng(0)
    for index in range(24):
        pixels = rng.integers(0, 100, (20, 24, 3), np.uint8)
        pixels[..., index % 3] += 60 + 70 * (index % 2)
        caption = f"a {('dark', 'bright')[index % 2]} {('red', 'green', 'blue')[index % 3]}"
        Image.fromarray(pixels).save(folder / "pairs" / f"{index:02}.png")
        (folder / "pairs" / f"{index:02}.txt").write_text(caption)
    return folder


def settings_of(place, output):
    """Dropout, drop-connect, BatchNorm's statistics and a moving average are at work."""
    return {
        "model": str(place / "tiny"),
        "data": str(place / "pairs"),
        "output": str(output),
        "batch_size": 8,
        "steps": STEPS,
        "optimizer": "lamb",
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "ema_momentum": 0.5,
        "batch_norm": "trained",
        "save_every": 6,
        "log_every": 5,
    }


@pytest.fixture
def settings(place, tmp_path):
    return settings_of(place, tmp_path / "out")


@pytest.fixture(scope="module")
def traced_once():
    """Trainings of one model by one recipe share it, and so its traced step.

    All that a step depends on is set to what it was when the model was made.
    """
    make_model, made = run.make_model, {}
    irrelevant = {*run.FREE_SETTINGS, "data"}
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in irrelevant]

    def make_once(recipe, *arguments):
        key = repr([getattr(recipe, name) for name in names])
        if key not in made:
            model = make_model(recipe, *arguments)
            state = resume._variables(model)
            made[key] = (
                model,
                {k: np.array(keras.ops.convert_to_numpy(v)) for k, v in state.items()},
            )
        model, values = made[key]
        for name, variable in resume._variables(model).items():
            variable.assign(values[name])
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_model", make_once)
        yield


@pytest.fixture(scope="module")
def unbroken(place, traced_once):
    """The folder of a training that ran through."""
    return train(Recipe(**settings_of(place, place / "unbroken")))


def assert_same_end(output, unbroken):
    """Weights, and the whole state of the last step, are equal bit for bit."""
    last = f"checkpoint-{STEPS}"
    for name in (
        "model.safetensors",
        f"{last}/model.safetensors",
        f"{last}/training_state.safetensors",
    ):
        found = safetensors.numpy.load_file(output / name)
        expected = safetensors.numpy.load_file(unbroken / name)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            np.testing.assert_array_equal(value, expected[key], err_msg=f"{name}: {key}")


def flags(settings):
    return [
        part
        for key, value in settings.items()
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]


@pytest.fixture
def when(monkeypatch):
    """The beginning of a line -> what is done when the training has said such a line."""

    say, actions = hosts.say, {}

    def say_and_act(message):
        say(message)
        for beginning, action in actions.items():
            if message.startswith(beginning):
                action()

    monkeypatch.setattr(hosts, "say", say_and_act)
    return actions


def test_training_leaves_what_from_pretrained_reads(unbroken):
    folders = sorted(path.name for path in unbroken.iterdir() if path.is_dir())
    assert folders == ["checkpoint-18", "checkpoint-20"]
    for folder in (unbroken, unbroken / "checkpoint-18"):
        AlignModel.from_pretrained(folder)
        assert AlignProcessor.from_pretrained(folder).tokenizer.vocab_size == len(WORDS)
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[0]["learning_rate"] == pytest.approx(0.01 * 15 / 17)
    assert lines[-1]["learning_rate"] == 0.0
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"temperature", "images_per_second", "gradient_norm"} <= lines[1].keys()
    assert all(line["gradient_norm"] > 0 for line in lines)
    name = "model.safetensors"
    assert (unbroken / name).read_bytes() == (unbroken / "checkpoint-20" / name).read_bytes()


def test_the_state_holds_what_a_step_changes(unbroken):
    state = safetensors.numpy.load_file(unbroken / "checkpoint-18" / "training_state.safetensors")
    assert state["optimizer/0/iteration"] == 18
    # Each dropout and drop-connect has drawn once a step; that of an encoder layer twice.
    draws = [value[1] for key, value in state.items() if key.startswith("seed/")]
    assert set(draws) == {18, 36}
    moving = state["model/vision_model/stem_bn/moving_mean"]
    assert np.abs(moving).max() > 0
    # The checkpoint that users load holds the averages, not the weights that train.
    model = safetensors.numpy.load_file(unbroken / "checkpoint-18" / "model.safetensors")
    found = model["text_projection.bias"]
    (key,) = [key for key in state if key.endswith("text_projection_bias_average")]
    np.testing.assert_array_equal(found, state[key])
    assert not np.array_equal(found, state["model/align/text_projection/bias"])


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
    settings, place, unbroken, when, capsys
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
    bucket.get("/bucket/out", str(place / "fetched"), recursive=True)
    (output,) = (path.parent for path in place.glob("fetched/**/recipe.yaml"))
    assert_same_end(output, unbroken)
    whole = {path.parent.name for path in output.glob("checkpoint-*/training_state.json")}
    assert whole == {"checkpoint-18", "checkpoint-20"}
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]
    model = AlignModel.from_pretrained("memory://bucket/out/checkpoint-20")
    assert model.config.projection_dim == 8
    bucket.store.clear()


@pytest.mark.slow  # the import and the first step of another process
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
    with pytest.raises(ValueError, match="batch_size=8: expected a multiple of devices=3"):
        train(Recipe(**settings, devices=3))


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


def test_a_folder_of_another_training_is_refused(settings, unbroken, tmp_path):
    other = {**settings, "output": str(unbroken), "learning_rate": 0.02}
    with pytest.raises(ValueError, match=r"belongs to a training with learning_rate=0\.01, this"):
        train(Recipe(**other))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not of a training"):
        train(Recipe(**{**settings, "output": str(tmp_path)}))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_loss_that_is_not_finite_leaves_no_checkpoint(settings, traced_once, monkeypatch):
    make_model = run.make_model

    def make_broken_model(*arguments):
        model = make_model(*arguments)
        model.temperature.assign(np.nan)
        return model

    monkeypatch.setattr(run, "make_model", make_broken_model)
    message = r"step 1: the loss is nan, so no .* unless it is one of its pairs: "
    with pytest.raises(ValueError, match=message) as error:
        train(Recipe(**settings))
    output = pathlib.Path(settings["output"])
    assert not list(output.glob("*checkpoint-*"))
    keys = (output / "not_finite.txt").read_text().splitlines()
    assert len(set(keys)) == 8
    assert {f"{index:02}" for index in range(24)} >= {pathlib.Path(key).stem for key in keys}
    said = f"{', '.join(keys[:4])} and 4 more, listed in {output / 'not_finite.txt'}"
    assert str(error.value).endswith(said)


@pytest.mark.slow  # of another shape than the others, so all is traced anew, validation too
def test_from_scratch_by_epochs_with_validation(settings, place, monkeypatch, capsys, small_config):
    """A preset, epochs for steps, a smaller image, frozen blocks, an average, TensorBoard."""
    pytest.importorskip("tensorboard")
    text = {**small_config.text_config.to_dict(), "num_hidden_layers": 2}
    towers = (text, small_config.vision_config.to_dict())
    monkeypatch.setitem(presets.PRESETS, "mine", (*towers, {"projection_dim": 8}))
    del settings["model"], settings["steps"]
    settings |= {"preset": "mine", "processor": str(place / "tiny"), "epochs": 2, "seed": 5}
    settings |= {"validation_data": settings["data"], "tensorboard": True, "log_every": 2}
    settings |= {"image_size": 12, "freeze": {"text": [0], "vision": [0]}}
    settings |= {"loss": "sigmoid", "accumulation": 2}
    del settings["batch_norm"]
    output = train(Recipe(**settings))

    err = capsys.readouterr().err
    assert "step 6/6  epoch 2/2  loss " in err  # 24 pairs twice, 8 at a time
    assert "step 6/6  epoch 2/2  val_loss " in err
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    model = AlignModel.from_pretrained(output)
    model.compile()
    validation = make_dataset(
        settings["data"], AlignProcessor.from_pretrained(output), batch_size=8
    )
    measured = model.evaluate(validation, verbose=0, return_dict=True)
    retrieved = RetrievalEvaluation(validation)
    retrieved.set_model(model)
    measured |= retrieved.evaluate()
    assert {"val_loss", "val_r1_i2t"} <= lines[-1].keys()
    for key, value in measured.items():  # of the average, which is what is saved
        assert lines[-1][f"val_{key}"] == pytest.approx(value, rel=1e-5), key
    assert model.config.vision_config.image_size == 12
    assert model.config.text_config.vocab_size == len(WORDS)
    assert float(model.logit_bias) == pytest.approx(-np.log(7), abs=0.1)
    processor = AlignProcessor.from_pretrained(output).image_processor
    assert processor.size == {"height": 15, "width": 15}
    assert processor.crop_size == {"height": 12, "width": 12}
    state = safetensors.numpy.load_file(output / "checkpoint-6" / "training_state.safetensors")
    assert not state["model/text_model/layer_0/output/bias"].any()  # as it began
    assert state["model/text_model/layer_1/output/bias"].any()
    assert list((output / "tensorboard").glob("events.*"))


def test_a_training_on_nothing_is_an_error(settings, place, tmp_path, traced_once):
    """Each picture is there, and no caption beside it."""
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    for file in (tmp_path / "pairs").glob("*.txt"):
        file.write_text(" ")
    settings |= {"data": str(tmp_path / "pairs"), "max_errors": 24}
    with pytest.raises(ValueError, match=r"no caption|no usable pair"):
        train(Recipe(**settings))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_recipe_of_the_readme_runs(settings, tmp_path):
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (tmp_path / "finetune.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    small = {key: settings[key] for key in ("model", "data", "output", "batch_size")}
    flags = {**small, "epochs": 1, "warmup_steps": 1}
    recipe = read_recipe(tmp_path / "finetune.yaml", flags)
    assert (recipe.optimizer, recipe.freeze) == ("adamw", "vision")
    before = AlignModel.from_pretrained(settings["model"])
    after = AlignModel.from_pretrained(train(recipe))
    for tower, same in (
        (lambda m: m.vision_model, True),
        (lambda m: m.text_model.blocks[0], False),
    ):
        pairs = zip(tower(before).get_weights(), tower(after).get_weights(), strict=True)
        assert all(np.array_equal(old, new) for old, new in pairs) is same


def test_broken_data_end_the_training_in_one_line(settings, place, tmp_path, traced_once, capsys):
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    (tmp_path / "pairs" / "07.png").rename(tmp_path / "pairs" / "it's [7] ö.png")
    (tmp_path / "pairs" / "it's [7] ö.png").write_bytes(b"no picture")
    settings |= {"data": str(tmp_path / "pairs"), "max_errors": 0}
    assert main(["train", *flags(settings)]) == 2
    err = capsys.readouterr().err
    expected = r"align-tf: error: .*/pairs: it's \[7\] ö: not a decodable image .* max_errors=0.*"
    *said, last = err.splitlines()
    assert re.fullmatch(expected, last)
    assert not any("error" in line or "Traceback" in line for line in said)


def test_data_that_changed_are_refused(settings, place, tmp_path, traced_once):
    """A step is a place in the data: others would be read twice or never."""
    pairs = tmp_path / "pairs"
    shutil.copytree(place / "pairs", pairs)
    settings["data"] = str(pairs)
    train(Recipe(**settings))
    train(Recipe(**settings))
    (pairs / "03.png").rename(pairs / "30.png")
    shutil.copy(pairs / "05.png", pairs / "04.png")
    message = (
        rf"{pairs}: changed since .*out was begun: 03\.png gone, 03\.txt gone, 04\.png replaced"
    )
    with pytest.raises(ValueError, match=f"{message}.*expected the same files, or another output"):
        train(Recipe(**settings))


def test_a_best_that_was_not_kept_is_told(tmp_path):
    recipe = Recipe(
        model="align-tiny",
        data="pairs",
        output=str(tmp_path),
        steps=2,
        validation_data="pairs",
        keep_best="val_loss",
    )
    figures = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match="keep_best='val_loss': no validation has found it; expe"):
        _take_best(tmp_path, None, Best(recipe, figures, 2))
    figures.write_text('{"step": 1, "val_loss": 0.5}\n{"step": 2, "val_loss": 0.6}\n')
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(
        ValueError, match=r"keep_best='val_loss': .*/checkpoint-1 is gone; expected"
    ):
        _take_best(tmp_path, None, Best(recipe, figures, 2))
