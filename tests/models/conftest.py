"""A model that a test may change, and configurations whose step is traced in less time."""

import dataclasses

import keras
import pytest

from align_tf import AlignConfig, AlignModel


@pytest.fixture
def changeable(tiny_config, pairs):
    """A model of the test's own; called, as Keras quantizes none that was not."""
    keras.utils.set_random_seed(0)
    model = AlignModel(tiny_config)
    model(pairs)
    return model


@pytest.fixture(scope="session")
def short_config(tiny_config) -> AlignConfig:
    """One layer, and two blocks: one that expands, and one that drop-connect may skip."""
    vision = {
        "out_channels": [16, 16],
        "strides": [2, 1],
        "num_block_repeats": [1, 1],
        "expand_ratios": [2, 1],
    }
    return dataclasses.replace(
        tiny_config,
        text_config=dataclasses.replace(tiny_config.text_config, num_hidden_layers=1),
        vision_config=dataclasses.replace(tiny_config.vision_config, **vision),
    )


@pytest.fixture(scope="session")
def steady_config(short_config) -> AlignConfig:
    """Without dropout, with BatchNorm frozen: a step depends on the batch alone."""
    text = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision = {"drop_connect_rate": 0.0, "freeze_batch_norm": True}
    return dataclasses.replace(
        short_config,
        text_config=dataclasses.replace(short_config.text_config, **text),
        vision_config=dataclasses.replace(short_config.vision_config, **vision),
    )
