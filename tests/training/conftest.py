"""An ALIGN as small as a training needs it, pairs for it, and a training that ran through."""

import contextlib
import dataclasses
import shutil

import keras
import numpy as np
import pytest
from PIL import Image
from png_reading import ImagesOfPng
from small_training import COLORS, WORDS, settings_of

from align_tf import AlignConfig, AlignImageProcessor, AlignModel, AlignProcessor, AlignTokenizer
from align_tf.training import Recipe, hosts, resume, run, train


@pytest.fixture(scope="session")
def small_config() -> AlignConfig:
    """One layer, two blocks of which the second drops out, 8 dimensions: not to be set."""
    return AlignConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 20,
            "max_position_embeddings": 16,
            "initializer_range": 0.3,
        },
        vision_config={
            "image_size": 16,
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3],
            "in_channels": [16],
            "out_channels": [16],
            "strides": [1],
            "num_block_repeats": [2],
            "expand_ratios": [1],
            "hidden_dim": 8,
            "initializer_range": 0.3,
        },
        projection_dim=8,
    )


@pytest.fixture(scope="session")
def place(tmp_path_factory, small_config):
    """A folder with the checkpoint `tiny`, 24 pairs in `pairs`, and `classes` of them.

    Not to be written to.
    """
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
        name, color = f"{index:02}.png", COLORS[index % 3]
        pixels = rng.integers(0, 100, (20, 24, 3), np.uint8)
        pixels[..., index % 3] += 60 + 70 * (index % 2)
        Image.fromarray(pixels).save(folder / "pairs" / name)
        caption = f"a {('dark', 'bright')[index % 2]} {color}"
        (folder / "pairs" / name).with_suffix(".txt").write_text(caption)
        (folder / "classes" / color).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "pairs" / name, folder / "classes" / color)
    return folder


@pytest.fixture(scope="session")
def reading_png():
    """Within it trainings read PNG files alone, so that their data are ready in less time."""

    @contextlib.contextmanager
    def within():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AlignImageProcessor, "_read", ImagesOfPng._read)
            yield

    return within


@pytest.fixture
def settings(place, tmp_path):
    return settings_of(place, tmp_path / "out")


@pytest.fixture(scope="session")
def making_once(reading_png):
    """Within it trainings of one model by one recipe share it, and so its traced step.

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

    @contextlib.contextmanager
    def within():
        with reading_png(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "make_model", make_once)
            yield

    return within


@pytest.fixture(scope="module")
def png_alone(reading_png):
    """The trainings of a module read PNG files alone."""
    with reading_png():
        yield


@pytest.fixture(scope="module")
def traced_once(making_once):
    """The trainings of a module share their models."""
    with making_once():
        yield


@pytest.fixture(scope="session")
def unbroken(place, making_once, tmp_path_factory):
    """The folder of a training that ran through."""
    with making_once():
        return train(Recipe(**settings_of(place, tmp_path_factory.mktemp("unbroken") / "out")))


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
