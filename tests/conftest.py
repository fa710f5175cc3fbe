"""Fixtures that several tests share: a tiny ALIGN, a batch of pairs for it, the goldens."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from align_tf import AlignConfig

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
