"""An error from inside a graph says in one line what was wrong."""

import pytest
import tensorflow as tf

from align_tf.graph_errors import plain_errors


def told(call):
    with pytest.raises(tf.errors.InvalidArgumentError) as error, plain_errors():
        call()
    assert error.value.__suppress_context__  # the long one is not printed above it
    return str(error.value)


def asserting(value):
    with tf.control_dependencies(
        [tf.debugging.Assert(value < 0, ['it\'s "a" ö\nb: expected less, found', value])]
    ):
        return tf.identity(value)


def test_an_assertion_says_what_it_says():
    said = 'it\'s "a" ö\nb: expected less, found 3'
    assert told(lambda: tf.function(asserting, autograph=False)(tf.constant(3))) == said
    dataset = tf.data.Dataset.range(3, 4).map(asserting)
    assert told(lambda: list(dataset)) == said
    assert told(lambda: tf.function(lambda: next(iter(dataset)))()) == said


def test_the_assertion_of_a_call_without_a_graph_is_told():
    message = "image_bytes[0]: 'a' is none"
    assert told(lambda: tf.debugging.Assert(tf.constant(False), [message])) == message


def test_another_operation_is_told_with_its_node():
    table, ids = tf.zeros([3, 2]), tf.constant([[7]])
    said = "indices[0,0] = 7 is not in [0, 3)"
    lookup = tf.function(lambda ids: tf.gather(table, ids, name="words"), autograph=False)
    assert told(lambda: lookup(ids)) == f"{said} (in words)"
    assert told(lambda: tf.gather(table, ids)) == said


def test_other_errors_are_let_through():
    with pytest.raises(ValueError, match="as it is"), plain_errors():
        raise ValueError("as it is")
