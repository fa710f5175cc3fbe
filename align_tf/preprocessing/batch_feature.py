"""What a processor returns: a dict whose values are also attributes."""

import warnings
from typing import Any

import keras

RETURN_TENSORS = ("tf", "np")


class BatchFeature(dict):
    """A model's inputs by name, as `inputs["input_ids"]` and as `inputs.input_ids`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"these inputs have no {name!r}, but {', '.join(self)}") from None

    def to(self, *device_or_dtype: Any) -> "BatchFeature":
        """Returns the inputs as they are, and warns that the call is not needed."""
        warnings.warn(
            "inputs.to(...) is not needed: TensorFlow and JAX move what a model takes, and the "
            "model casts it",
            stacklevel=2,
        )
        return self


def as_tensors(values: dict[str, Any], return_tensors: str | None) -> BatchFeature:
    """Gives TensorFlow tensors the form that is asked for.

    Args:
        values: tensors by name.
        return_tensors: `tf` or `np`; None is what Keras's backend takes, TensorFlow tensors on
            TensorFlow and NumPy arrays elsewhere, but within a graph.

    Raises:
        ValueError: it is none of these.
    """
    in_graph = not all(hasattr(value, "numpy") for value in values.values())
    if return_tensors is None:
        on_tensorflow = keras.backend.backend() == "tensorflow"
        return_tensors = "tf" if on_tensorflow or in_graph else "np"
    if return_tensors not in RETURN_TENSORS:
        torch = "; PyTorch's are made of 'np' by torch.from_numpy" if return_tensors == "pt" else ""
        raise ValueError(
            f"return_tensors={return_tensors!r}: expected one of {', '.join(RETURN_TENSORS)}{torch}"
        )
    if return_tensors == "np" and in_graph:
        raise ValueError("return_tensors='np': within a graph there are no arrays; expected 'tf'")
    if return_tensors == "np":
        values = {name: value.numpy() for name, value in values.items()}
    return BatchFeature(values)
