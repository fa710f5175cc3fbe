"""Inputs as Keras's and Hugging Face's callers give them: together, by name, or the first alone."""

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from align_tf.models.sharded_state import check_not_gathered

# What a batch may hold beside the inputs of the towers; the loss reads it.
PAIR_INPUTS = ("image_ids", "text_ids", "sample_weight")

ID_INPUTS = ("input_ids", "token_type_ids", "position_ids")  # rows of an embedding

BATCH_RANKS = {"pixel_values": 4, "input_ids": 2, "attention_mask": 2, "token_type_ids": 2}
LARGEST_PIXEL = 32.0  # more than any processor gives; the levels of an image reach 255
LOOKED_AT = 64  # images: an array may be larger than memory, and all of it is of one kind


class TakesNames:
    """A model that is called as `model(inputs)` and as `model(**inputs)`."""

    input_names: tuple[str, ...]

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        check_not_gathered(self)
        named = {name: kwargs.pop(name) for name in self.input_names if name in kwargs}
        inputs = _as_arrays(self.input_names, gather(self.input_names, inputs, named))
        self._check_inputs(inputs)  # here, since Keras adds all arguments to an error of `call`
        return super().__call__(inputs, *args, **kwargs)

    def _check_inputs(self, inputs: Any) -> None:
        raise NotImplementedError


def gather(names: tuple[str, ...], inputs: Any, named: Mapping[str, Any]) -> Any:
    """Joins the inputs that come together and those that come by name.

    Args:
        names: the names of all inputs; what is given alone is the first.
        inputs: a mapping, or the first input, or None.
        named: the others.

    Returns:
        The first input, where it came alone; otherwise a dict without those that are None.
    """
    named = {name: value for name, value in named.items() if value is not None}
    if inputs is None or isinstance(inputs, Mapping):
        return {**(inputs or {}), **named}
    return {names[0]: inputs, **named} if named else inputs


def _as_arrays(names: tuple[str, ...], inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: _as_array(name, of) for name, of in inputs.items()}
    joint = "input_ids" in names[1:]  # which takes no input alone
    return inputs if joint else _as_array(names[0], inputs)


def _as_array(name: str, value: Any) -> Any:
    """Takes lists of numbers to arrays, and ids to whole numbers."""
    if isinstance(value, list):
        try:
            value = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: a list of {_kinds(value)}: expected rows alike") from error
        if value.dtype.kind not in "biuf":
            raise ValueError(
                f"{name}: a list of {_kinds(value.flat)}: expected numbers, as the processor gives "
                "them"
            )
        value = value.astype("int32" if value.dtype.kind == "i" else "float32")
    if hasattr(value, "row_splits"):
        raise ValueError(f"{name}: ragged; expected rows of one length, padding='longest'")
    return _whole(name, value) if name in ID_INPUTS else value


def _kinds(values: Iterable) -> str:
    return " and ".join(dict.fromkeys(type(value).__name__ for value in values))


def _whole(name: str, ids: Any) -> Any:
    """Takes ids that are floats, as a keras.Input's are unless it is told, to whole numbers.

    Here, since Keras casts floats to the dtype of a layer, and few ids are in bfloat16.
    """
    dtype = str(getattr(ids, "dtype", ""))
    if "float" not in dtype:
        return ids
    if "float16" in dtype or (_has_values(ids) and (np.asarray(ids) % 1).any()):
        dtype = keras.backend.standardize_dtype(ids.dtype)
        raise ValueError(f"{name} of {dtype}: expected whole numbers, dtype='int32'")
    return ids.astype("int32") if isinstance(ids, np.ndarray) else ops.cast(ids, "int32")


def check_known(names: Iterable[str], known: tuple[str, ...]) -> None:
    """Checks that inputs are known, since a misspelled one would be left out without a word.

    Raises:
        ValueError: one is not.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown inputs {', '.join(unknown)}: expected {', '.join(known)}")


def check_pixels(pixel_values: Any, channels: int, least_side: int) -> None:
    """Checks what an image tower takes, as far as it can be seen.

    Raises:
        ValueError: it is no batch of images with channels last and sides of least_side or more,
            or holds levels of 0..255.
    """
    shape = tuple(getattr(pixel_values, "shape", ()))
    expected = f"float (n, height, width, {channels}), as the processor gives them"
    if len(shape) != 4:
        raise ValueError(f"pixel_values of shape {shape}: expected {expected}")
    if shape[-1] not in (channels, None):
        first = ", channels first" if shape[1] == channels else ""
        raise ValueError(f"pixel_values of shape {shape}{first}: expected {expected}")
    if any(isinstance(side, int) and side < least_side for side in shape[1:3]):
        raise ValueError(
            f"pixel_values of shape {shape}: expected images of {least_side} x {least_side} pixels "
            "or more"
        )
    if "int" in str(pixel_values.dtype):
        dtype = keras.backend.standardize_dtype(pixel_values.dtype)
        raise ValueError(f"pixel_values of {dtype}: expected {expected}")
    if _has_values(pixel_values) and 0 not in shape:
        # By NumPy: within a function that is being traced, an operation gives no number.
        looked_at = np.asarray(pixel_values[:LOOKED_AT])
        extreme = max(float(np.min(looked_at)), float(np.max(looked_at)), key=abs)
        if not abs(extreme) <= LARGEST_PIXEL:  # nor NaN, which both are where one value is
            raise ValueError(f"pixel_values that reach {extreme:.6g}: expected {expected}")


def check_batches(x: Any) -> dict[str, Any]:
    """Checks that a data set gives batches, as far as it says what it gives.

    Args:
        x: what `fit` is given.

    Returns:
        What stands for the inputs of a batch, by name; none where nothing says what they are.

    Raises:
        ValueError: it gives single pairs.
    """
    spec = getattr(x, "element_spec", None)  # of a tf.data.Dataset
    spec = spec[0] if isinstance(spec, tuple) and spec else spec
    specs = spec if isinstance(spec, Mapping) else {}
    inputs = {}
    for name, spec in specs.items():
        rank = getattr(getattr(spec, "shape", None), "rank", None)
        if not hasattr(spec, "dtype") or rank is None:
            return {}  # distributed, or of an unknown shape
        if rank == BATCH_RANKS.get(name, -1) - 1:
            raise ValueError(
                f"the data set gives {name} of shape {tuple(spec.shape)}, one pair at a time: "
                "expected batches, dataset.batch(n)"
            )
        inputs[name] = keras.KerasTensor(tuple(spec.shape), spec.dtype.name)
    return inputs


def check_ids(name: str, ids: Any, size: int) -> None:
    """Checks the rows of an embedding that are asked for, as far as they can be seen.

    A graph fails on others on a CPU; other devices, and JAX, take rows that are not those.

    Raises:
        ValueError: one is below 0, or size or more.
    """
    if ids is None or not _has_values(ids) or 0 in ids.shape:
        return
    values = np.asarray(ids)
    least, largest = values.min(), values.max()
    if least < 0 or largest >= size:
        wrong = least if least < 0 else largest
        raise ValueError(f"{name} that hold {wrong}: expected 0 to {size - 1}")


def _has_values(tensor: Any) -> bool:
    """Whether a tensor holds numbers, and does not stand for those of a graph."""
    if isinstance(tensor, np.ndarray):
        return True
    if isinstance(tensor, keras.KerasTensor):
        return False
    if keras.backend.backend() == "tensorflow":
        return hasattr(tensor, "numpy")
    import jax

    return not isinstance(tensor, jax.core.Tracer)
