"""The weights that a model computes with: LoRA merged, and what Keras quantized as floats."""

import collections
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from align_tf.models.quantization import QUANTIZABLE
from align_tf.models.sharded_state import check_gathered

# Of Keras's quantizations those that leave the inputs of a layer as they are, or round them alone.
DEQUANTIZED = ("int8", "int4")


def effective_weights(model: Any) -> dict[str, Any]:
    """Collects the weights under the names that they have without LoRA and quantization.

    Args:
        model: an AlignModel or a tower.

    Returns:
        The weight's path without the model's name -> the variable itself, or an array where
        LoRA's product was added to it or Keras had quantized it.

    Raises:
        ValueError: a layer is quantized to another thing than int8 or int4, a weight holds no
            floating-point numbers, or it lies in parts in several processes.
    """
    check_gathered(model.weights)
    owners = {
        layer.path.removeprefix(f"{model.path}/"): layer
        for layer in model._flatten_layers(include_self=False)
        if layer.path
    }
    by_owner = collections.defaultdict(dict)
    for path, weight in model._relative_weights().items():
        owner, _, name = path.rpartition("/")
        by_owner[owner][name] = weight
    effective = {}
    for owner, weights in by_owner.items():
        if owner in owners:
            weights = _of_layer(owners[owner], weights)
        effective.update({f"{owner}/{name}".lstrip("/"): w for name, w in weights.items()})
    for path, weight in effective.items():
        dtype = keras.backend.standardize_dtype(weight.dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise ValueError(f"{path}: of {dtype}, expected floating-point numbers")
    return effective


def _of_layer(layer: layers.Layer, weights: dict[str, Any]) -> dict[str, Any]:
    lora = {name: weight for name, weight in weights.items() if name.startswith("lora_")}
    weights = {name: weight for name, weight in weights.items() if name not in lora}
    if layer.quantization_mode and isinstance(layer, QUANTIZABLE):
        weights = _dequantized(layer, weights)
    for name in ("kernel", "embeddings"):
        if f"lora_{name}_a" in lora:
            a, b = (ops.convert_to_numpy(lora.pop(f"lora_{name}_{side}")) for side in "ab")
            # In numpy, as the layer's own property would round the sum to what it computes in.
            base = ops.convert_to_numpy(weights[name]).astype("float32")
            merged = base + layer.lora_alpha / layer.lora_rank * np.matmul(a, b, dtype="float32")
            weights[name] = merged.astype(layer.variable_dtype)
    return {**weights, **lora}


def _dequantized(layer: layers.Layer, weights: dict[str, Any]) -> dict[str, Any]:
    """Has a twin of the layer say what it multiplies by, or looks up.

    The layouts of packed numbers, groups and zero points differ between versions of Keras; what
    comes out for the identity does not. A row of it holds 0 and 1 alone, which stay what they are
    where the inputs are rounded too.
    """
    mode, _, _ = layer.dtype_policy.name.partition("_from_")
    if layer.quantization_mode not in DEQUANTIZED:
        raise ValueError(
            f"{layer.path}: quantized to {mode}, of which there are no weights in floating point: "
            f"expected {' or '.join(DEQUANTIZED)}"
        )
    policy = f"{mode}_from_float32"
    if isinstance(layer, layers.Embedding):
        name, inputs = "embeddings", ops.arange(layer.input_dim)
        twin = layers.Embedding(layer.input_dim, layer.output_dim, dtype=policy)
    else:
        name, inputs = "kernel", ops.eye(layer.input_spec.axes[-1])
        twin = layers.Dense(layer.units, use_bias=False, dtype=policy)
    twin.build(inputs.shape)
    for weight in twin.weights:
        weight.assign(weights[weight.name])
    value = ops.convert_to_numpy(twin(inputs)).astype(layer.variable_dtype)
    return {name: value, **{key: weights[key] for key in ("bias",) if key in weights}}
