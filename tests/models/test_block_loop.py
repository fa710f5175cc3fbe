"""What a block keeps for its gradient: what a TPU computes again in more time than it reads it."""

import types

import numpy as np
import pytest

from align_tf.models.block_loop import worth_keeping

PRODUCT = {"dimension_numbers": (((2,), (0,)), ((), ()))}
WHOLE, EACH = {"feature_group_count": 1}, {"feature_group_count": 288}


@pytest.mark.parametrize(
    ("name", "shapes", "options", "kept"),
    [
        ("conv_general_dilated", ((2, 73, 73, 48), (1, 1, 48, 288)), WHOLE, False),
        ("conv_general_dilated", ((2, 10, 10, 640), (1, 1, 640, 3840)), WHOLE, True),
        ("conv_general_dilated", ((2, 73, 73, 288), (3, 3, 1, 288)), EACH, False),
        ("conv_general_dilated", ((2, 73, 73, 288), (5, 5, 1, 288)), EACH, True),
        ("dot_general", ((2, 64, 768), (768, 3072)), PRODUCT, True),
        ("dot_general", ((2, 64, 64), (64, 64)), PRODUCT, False),
        ("reduce_sum", ((2, 73, 73, 288),), {}, True),
        ("mul", ((2, 73, 73, 288), (288,)), {}, False),
    ],
)
def test_what_is_dear_is_kept(name, shapes, options, kept):
    arrays = [np.empty(shape, np.uint8) for shape in shapes]
    assert worth_keeping(types.SimpleNamespace(name=name), *arrays, **options) is kept
