"""Rematerialisation: a block's activations are computed again instead of kept for the gradient."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers, ops

from align_tf.models.sharded_state import whole
from align_tf.models.step_state import step_variables


def rematerialize(layer: layers.Layer) -> Callable:
    """Wraps a built layer so that its gradient starts from its inputs alone.

    The second run draws the dropout of the first and moves BatchNorm's averages no further:
    variables go in as values and come out as values, which `keras.remat` around a layer does not
    do.

    Args:
        layer: a block of a tower.

    Returns:
        What is called as the layer is: with a tensor, then with what no gradient flows to.
    """

    def call(x: Any, *constants: Any, training: bool = False) -> Any:
        weights, moving = layer.trainable_variables, step_variables(layer)
        # As tensors: TensorFlow would read a variable when the second run does. What moves is
        # copied, since in TensorFlow a tensor that was read may share the variable's memory.
        before = [(v, ops.convert_to_tensor(v.value)) for v in layer.variables]
        before += [(v, v.value * 1) for v in moving]

        def run(values: list, x: Any) -> tuple[Any, list]:
            mapping = [*before, *zip(weights, values, strict=True)]
            with keras.StatelessScope(state_mapping=mapping) as scope:
                outputs = whole(layer)(x, *constants, training=training)
            return outputs, [scope.get_current_value(variable) for variable in moving]

        outputs, after = keras.remat(run)([ops.convert_to_tensor(w.value) for w in weights], x)
        for variable, value in zip(moving, after, strict=True):
            variable.assign(value)
        return outputs

    return call
