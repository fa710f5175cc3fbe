"""Functions that a data set calls as they are: each of its iterators would optimise them anew.

An iterator of tf.data takes the graph of its map in, all that it calls included, and has Grappler
optimise it, which of one that reads images takes over a second, each time that a data set is gone
through. A function behind `RemoteCall` is left as it is, and its branches are made when they are
first taken.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

HERE = "/device:CPU:0"  # of whatever machine reads the data
COPY = "_apart"

_is_apart = contextvars.ContextVar("is_apart", default=False)


@contextlib.contextmanager
def functions_apart() -> Iterator[None]:
    """Within it, `call` puts functions apart: where a graph of tf.data is traced."""
    token = _is_apart.set(True)
    try:
        yield
    finally:
        _is_apart.reset(token)


def call(function: Callable, *inputs: Any) -> Any:
    """Calls a function, apart from the graph around it within `functions_apart`.

    Args:
        function: a `tf.function`, or what has only TensorFlow operations; what it returns consists
            of tensors.
        *inputs: tensors, or what becomes one.

    Returns:
        What it returns.
    """
    if not _is_apart.get():
        return function(*inputs)
    given = [tf.convert_to_tensor(value) for value in inputs]
    traced = _copy(function).get_concrete_function(*given)
    outputs = tf.raw_ops.RemoteCall(
        target=HERE,
        args=[*given, *traced.captured_inputs],
        Tout=[output.dtype for output in traced.outputs],
        f=traced,
    )
    for output, known in zip(outputs, traced.outputs, strict=True):
        output.set_shape(known.shape)
    return tf.nest.pack_sequence_as(traced.structured_outputs, outputs, expand_composites=True)


def _copy(function: Callable) -> Callable:
    """Returns the same function with the attribute by which Grappler passes it by."""
    if COPY not in vars(function):  # in the function itself, so that it goes with it
        vars(function)[COPY] = tf.function(
            getattr(function, "python_function", function),
            input_signature=getattr(function, "input_signature", None),
            autograph=False,
            experimental_attributes={"_tf_data_function": True},
        )
    return vars(function)[COPY]
