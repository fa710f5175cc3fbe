"""Keras's own LoRA on a layer: put on and taken off; and the rest of a model frozen beside it."""

from typing import Any

import keras
from keras import layers

# A layer, and the weight that LoRA's product is added to.
ADAPTABLE = {layers.Dense: "kernel", layers.Conv2D: "kernel", layers.Embedding: "embeddings"}


def adapted_weight(layer: layers.Layer) -> str | None:
    """The name of the weight that LoRA adapts; None for a layer that has no such."""
    return ADAPTABLE.get(type(layer))


def adapted_shape(layer: layers.Layer) -> tuple[int, ...]:
    """The shape of that weight, (..., in, out), however it is quantized."""
    if isinstance(layer, layers.Embedding):
        return layer.input_dim, layer.output_dim
    if isinstance(layer, layers.Dense):
        return layer.input_spec.axes[-1], layer.units
    return tuple(layer._kernel.shape)


def attach(layer: layers.Layer, rank: int) -> None:
    """Puts LoRA on a layer, which computes what it did as long as the second matrix is zero.

    Args:
        layer: a built one of `ADAPTABLE`.
        rank: of the two matrices.
    """
    # Uniform up to 1 / sqrt(inputs), as PEFT draws it.
    first = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
    layer.enable_lora(rank, a_initializer=first)


def sides(layer: layers.Layer) -> tuple[Any, Any]:
    """The two matrices of a layer that has LoRA, (..., in, rank) and (rank, out)."""
    name = adapted_weight(layer)
    return getattr(layer, f"lora_{name}_a"), getattr(layer, f"lora_{name}_b")


def detach(layer: layers.Layer) -> None:
    """Takes LoRA off a layer, and leaves its weight as it is without it."""
    name = adapted_weight(layer)
    for side in "ab":
        # Not by `del`, for which Keras collects garbage each time.
        layer._untrack_variable(vars(layer).pop(f"lora_{name}_{side}"))
    layer.lora_enabled = False
    layer.lora_rank = layer.lora_alpha = None


def freeze_base(owner: layers.Layer) -> None:
    """Freezes all below a layer but LoRA's matrices, and of layers that do not train these too.

    A layer that can be adapted stays as it is but for its weights: another adapter may be of it.
    """
    for layer in owner._flatten_layers():
        for weight in layer._trainable_variables:
            weight.trainable = is_side(weight) and layer._trainable
        if not layer._layers and adapted_weight(layer) is None:
            layer._trainable = False  # of a BatchNorm, its averages stay too


def is_side(weight: Any) -> bool:
    """Says whether a weight is one of LoRA's matrices."""
    return weight.name.startswith("lora_")


class Flags:
    """What trains of a model, to be put back."""

    def __init__(self, owner: layers.Layer) -> None:
        self._of_layers = {layer: layer._trainable for layer in owner._flatten_layers()}
        weights = (weight for layer in self._of_layers for weight in layer._trainable_variables)
        self._of_weights = [(weight, weight.trainable) for weight in weights]

    def trained(self, layer: layers.Layer) -> bool:
        """Says whether a layer trained."""
        return self._of_layers.get(layer, layer.trainable)

    def restore(self) -> None:
        """Has the layers and weights train as they did."""
        for layer, trainable in self._of_layers.items():
            layer._trainable = trainable
        for weight, trainable in self._of_weights:
            weight.trainable = trainable
