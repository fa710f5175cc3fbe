"""The passes of a validation over its data set."""

import tensorflow as tf

from align_tf.training.validation import Passes


def batches(passes):
    return [batch.numpy().tolist() for batch in passes]


def test_they_share_an_iterator():
    passes = Passes(tf.data.Dataset.range(4).batch(3))
    assert batches(passes) == [[0, 1, 2], [3]]
    kept = passes._iterator
    assert batches(passes) == [[0, 1, 2], [3]]
    assert passes._iterator is kept


def test_a_pass_that_breaks_off_leaves_none_behind():
    passes = Passes(tf.data.Dataset.range(4).batch(3))
    next(iter(passes))
    assert batches(passes) == [[0, 1, 2], [3]]


def test_a_data_set_of_unknown_length():
    passes = Passes(tf.data.Dataset.range(4).filter(lambda x: x > 1))
    assert batches(passes) == batches(passes) == [2, 3]
