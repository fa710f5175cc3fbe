"""Fixtures that several tests share: a tiny ALIGN and its checkpoint, pairs for it, the goldens."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The same kernels on every processor, as the command line takes them: TensorFlow's own name other
# nodes in their errors than those that were recorded.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import pathlib
from collections.abc import Callable

import keras
import numpy as np
import pytest
import safetensors.numpy

from align_tf import AlignConfig, AlignImageProcessor, AlignModel, AlignProcessor, AlignTokenizer

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "model"


@pytest.fixture(scope="session")
def tiny_config() -> AlignConfig:
    """Three blocks, two layers, 8 dimensions, weights of a trained model's size: not to be set."""
    return AlignConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 20,
            "max_position_embeddings": 16,
            "initializer_range": 0.3,
        },
        vision_config={
            "image_size": 16,
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3, 5],
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "strides": [1, 2],
            "num_block_repeats": [1, 2],
            "expand_ratios": [1, 2],
            "hidden_dim": 8,
            "initializer_range": 0.3,
        },
        projection_dim=8,
    )


@pytest.fixture(scope="session")
def processor() -> AlignProcessor:
    """For `tiny_config`: images of 16 pixels, and five words."""
    images = AlignImageProcessor(size=20, crop_size=16, max_image_pixels=1_000_000)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["red", "green", "blue", "a", "picture"]
    return AlignProcessor(images, AlignTokenizer([*special, *words]))


@pytest.fixture(scope="session")
def checkpoint(tiny_config, processor, tmp_path_factory) -> pathlib.Path:
    """A folder with a model of `tiny_config` and its processor: not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoint")
    keras.utils.set_random_seed(1)
    AlignModel(tiny_config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint) -> AlignModel:
    """The model of `checkpoint`: not to be trained."""
    return AlignModel.from_pretrained(checkpoint)


@pytest.fixture
def pairs() -> dict[str, np.ndarray]:
    """Four images and four texts; the last two texts are padded."""
    rng = np.random.default_rng(0)
    attention_mask = np.ones((4, 6), "int32")
    attention_mask[2:, 4:] = 0
    return {
        "pixel_values": rng.random((4, 16, 16, 3), "float32"),
        "input_ids": rng.integers(1, 40, (4, 6), "int32") * attention_mask,
        "attention_mask": attention_mask,
    }


@pytest.fixture
def golden(tmp_path: pathlib.Path) -> Callable:
    """Reads a golden: its arrays by name, and its model as a checkpoint folder."""

    def read(name: str) -> tuple[dict[str, np.ndarray], pathlib.Path]:
        with np.load(GOLDENS / f"{name}.npz") as file:
            arrays = dict(file)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(arrays["config"].item())
        prefix = "weights/"
        weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        return arrays, folder

    return read
