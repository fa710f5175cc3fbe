"""The state beside the weights that a training step's forward pass moves."""

import keras
from keras import layers


def step_variables(layer: layers.Layer) -> list[keras.Variable]:
    """Lists the averages of the BatchNorms that train, and the seeds of dropout.

    Args:
        layer: built; a block, a tower or the joint model.
    """
    weights = {id(weight) for weight in layer.weights}
    seeds = [variable for variable in layer.variables if id(variable) not in weights]
    averages = [
        average
        for part in layer._flatten_layers()
        if isinstance(part, layers.BatchNormalization) and part.trainable
        for average in (part.moving_mean, part.moving_variance)
    ]
    return averages + seeds
