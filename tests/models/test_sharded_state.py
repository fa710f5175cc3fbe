"""Where the parts of a variable lie; that a training takes them: test_distribution.py."""

import math

import pytest

from align_tf.models.sharded_state import spread_axes

MESH = {f"batch_{index}": 2 for index in range(8)}  # 256 chips


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), []),
        ((1024,), [1]),  # too small to be cut
        ((30522, 1024), [1, 256]),  # one dimension where it can be
        ((1024, 4096), [1, 256]),
        ((1, 1, 2064, 344), [1, 1, 16, 8]),  # of EfficientNet-L2, in 128 parts, each there twice
        ((1, 1, 480, 2880), [1, 1, 4, 64]),
        ((333, 333), [1, 1]),
    ],
)
def test_a_variable_is_cut_where_its_dimensions_can_be(shape, expected):
    axes = spread_axes(shape, MESH)
    assert [math.prod(MESH[name] for name in names) for names in axes] == expected
    used = [name for names in axes for name in names]
    assert len(set(used)) == len(used)


def test_other_numbers_of_devices_cut_too():
    assert spread_axes((512, 600), {"a": 2, "b": 3}) == [(), ("a", "b")]
    assert spread_axes((512, 700), {"a": 2, "b": 3}) == [(), ("a",)]
