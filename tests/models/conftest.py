"""A model that a test may change."""

import keras
import pytest

from align_tf import AlignModel


@pytest.fixture
def changeable(tiny_config, pairs):
    """A model of the test's own; called, as Keras quantizes none that was not."""
    keras.utils.set_random_seed(0)
    model = AlignModel(tiny_config)
    model(pairs)
    return model
