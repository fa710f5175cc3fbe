"""Functions that a data set calls as they are."""

import numpy as np
import pytest
import tensorflow as tf

from align_tf.data import make_dataset
from align_tf.preprocessing import apart


@tf.function(autograph=False)
def scaled(x, factor):
    return {
        "scaled": tf.cond(x[0] > 0, lambda: x * factor, lambda: x),
        "words": tf.strings.split([""]),
    }


def test_a_function_apart_gives_what_it_gives():
    @tf.function(autograph=False)
    def graph(x):
        with apart.functions_apart():
            return apart.call(scaled, x, 3.0)

    given = tf.constant([1.0, 2.0])
    outputs = graph(given)
    np.testing.assert_array_equal(outputs["scaled"], [3.0, 6.0])
    assert outputs["words"].to_list() == [[]]  # ragged tensors too
    assert outputs["scaled"].shape == [2]


def operations(function, *inputs):
    return {op.type for op in function.get_concrete_function(*inputs).graph.get_operations()}


def test_only_where_it_is_asked_for():
    def graph(x):
        return apart.call(scaled, x, 3.0)["scaled"]

    def asked(x):
        with apart.functions_apart():
            return graph(x)

    spec = tf.TensorSpec([2])
    assert "RemoteCall" in operations(tf.function(asked), spec)
    assert "RemoteCall" not in operations(tf.function(graph), spec)  # as in an export


def test_images_and_texts_of_a_data_set_are_apart(processor):
    def graph(images, texts):
        with apart.functions_apart():
            pixels = processor.image_processor.try_pixel_values(images)
            return pixels, processor.tokenizer.encode(texts)

    spec = tf.TensorSpec([None], tf.string)
    found = tf.function(graph, autograph=False).get_concrete_function(spec, spec).graph
    functions = found.as_graph_def().library.function
    calls = [node for f in functions for node in f.node_def if node.op == "RemoteCall"]
    calls += [op.node_def for op in found.get_operations() if op.type == "RemoteCall"]
    assert len(calls) == 3  # reading and preparing an image, a batch of texts
    marked = {f.signature.name for f in functions if f.attr["_tf_data_function"].b}
    assert {call.attr["f"].func.name for call in calls} <= marked


def test_an_error_within_is_the_function_s_own():
    @tf.function(autograph=False)
    def broken(x):
        with tf.control_dependencies([tf.debugging.Assert(x > 0, ["x is", x])]):
            return tf.identity(x)

    def load(x):
        with apart.functions_apart():
            return apart.call(broken, x)

    dataset = tf.data.Dataset.from_tensors(-1).map(load)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"x is.*-1"):
        list(dataset)


def test_a_data_set_has_its_functions_apart(processor):
    pairs = tf.data.Dataset.from_tensors({"image": b"", "caption": b""})
    dataset = make_dataset(pairs, processor, batch_size=2)
    graph = tf.compat.v1.GraphDef.FromString(
        tf.raw_ops.DatasetToGraphV2(input_dataset=dataset._variant_tensor).numpy()
    )
    calls = [node for f in graph.library.function for node in f.node_def if node.op == "RemoteCall"]
    assert len(calls) == 3
