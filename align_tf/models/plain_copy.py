"""A copy of a model with its effective weights, in a dtype, or one line on why there is none."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from keras import layers, ops

from align_tf.models.align import AlignModel
from align_tf.models.effective_weights import effective_weights
from align_tf.models.initialization import no_init_weights
from align_tf.models.pretrained import SETTINGS

# What gives the embeddings: a subclass that changes one computes what no copy does.
METHODS = ("call", "get_text_features", "get_image_features", "_project_text", "_project_image")


def plain_copy(model: AlignModel, dtype: str) -> AlignModel:
    """Copies a model into another dtype, without LoRA and quantization.

    Args:
        model: the model; it stays as it is.
        dtype: of weights and activations; what is float32 whatever the policy stays so.

    Returns:
        The copy.

    Raises:
        ValueError: as `unfilled_copy` and `assign`.
    """
    copy, values = unfilled_copy(model, dtype)
    weights = copy._relative_weights()
    for path, value in values.items():
        assign(weights[path], value, path)
    return copy


def unfilled_copy(model: AlignModel, dtype: str) -> tuple[AlignModel, dict[str, Any]]:
    """Makes a copy whose weights are still to be assigned.

    Args:
        model: the model; it stays as it is.
        dtype: of weights and activations.

    Returns:
        The copy, with the activations and epsilons of the model's layers; and a value for each
        of its weights by path.

    Raises:
        ValueError: the model computes what its configuration does not say, by a layer or a
            method of the caller's own; or has no weights in floating point.
    """
    copy = _from_config(model, dtype)
    for _, source, target in _pairs(model, copy):
        for name in _changed(source, target):
            setattr(target, name, getattr(source, name))
    values = effective_weights(model)
    expected = {path: tuple(weight.shape) for path, weight in copy._relative_weights().items()}
    found = {path: tuple(value.shape) for path, value in values.items()}
    for path in {**found, **expected}:
        if found.get(path) != expected.get(path):
            raise ValueError(
                f"{path}: {found.get(path, 'no weight')} in the model, "
                f"{expected.get(path, 'no weight')} by its configuration"
            )
    return copy, values


def check_configured(model: AlignModel) -> None:
    """Checks that a checkpoint, which is a configuration and weights, says all that a model does.

    Raises:
        ValueError: a layer, a method or an activation is not what the configuration says.
    """
    for path, source, target in _pairs(model, _from_config(model, "float32")):
        for name in _changed(source, target):
            raise ValueError(
                f"{path}: {name} {getattr(source, name)!r} is not what the configuration says"
            )


def assign(weight: Any, value: Any, path: str) -> None:
    """Assigns a value, rounded to the weight's dtype.

    Raises:
        ValueError: the value holds NaN or infinity, of which nothing comes but NaN, or is more
            than the dtype can hold.
    """
    rounded = ops.cast(value, weight.dtype)
    if not bool(ops.all(ops.isfinite(rounded))):
        largest = np.abs(ops.convert_to_numpy(value).astype("float64")).max()
        if not np.isfinite(largest):
            raise ValueError(f"{path} holds NaN or infinity: the embeddings would be NaN")
        limit = float(ml_dtypes.finfo(weight.dtype).max)
        raise ValueError(
            f"{path} reaches {largest:.6g}, {weight.dtype} only {limit:.6g}: choose another dtype"
        )
    weight.assign(rounded)


def _from_config(model: AlignModel, dtype: str) -> AlignModel:
    if not isinstance(model, AlignModel):
        raise ValueError(f"a model of {type(model).__name__}: expected an AlignModel")
    config = {**AlignModel._make_config(model), "dtype": dtype, "quantized": {}}
    with no_init_weights():
        return AlignModel.from_config(config)


def _pairs(model: AlignModel, copy: AlignModel) -> Iterator[tuple[str, layers.Layer, layers.Layer]]:
    """Yields the layers of both that are at one place, where all of them are of one type."""
    for method in METHODS:
        if getattr(type(model), method) is not getattr(AlignModel, method):
            raise ValueError(
                f"{type(model).__name__}.{method} is its own: only AlignModel's is exported"
            )
    sources, targets = dict(_layers(model)), dict(_layers(copy))
    for path in {**sources, **targets}:
        source, target = sources.get(path), targets.get(path)
        if type(source) is not type(target) or "call" in vars(source):
            raise ValueError(
                f"{path}: {_described(source)} in the model, {_described(target)} by its "
                "configuration: only what the configuration says is exported"
            )
        yield path, source, target


def _layers(owner: layers.Layer, prefix: str = "") -> Iterator[tuple[str, layers.Layer]]:
    """Yields each layer below another by the attributes that lead to it."""
    for name, value in vars(owner).items():
        if name.startswith("_"):
            continue
        rows = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        for index, layer in rows:
            if isinstance(layer, layers.Layer):
                path = f"{prefix}{name}" if index is None else f"{prefix}{name}[{index}]"
                yield path, layer
                yield from _layers(layer, f"{path}.")


def _changed(source: layers.Layer, target: layers.Layer) -> list[str]:
    return [name for name in SETTINGS if getattr(source, name, None) != getattr(target, name, None)]


def _described(layer: layers.Layer | None) -> str:
    if layer is None:
        return "no layer"
    return type(layer).__name__ + (" with its own call" if "call" in vars(layer) else "")
