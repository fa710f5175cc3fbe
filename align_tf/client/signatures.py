"""What a server tells of its model: signatures, their tensors, versions."""

from typing import Any, NamedTuple

import numpy as np

# Name in a signature: numpy's
_DTYPES = {
    "DT_HALF": "float16",
    "DT_FLOAT": "float32",
    "DT_DOUBLE": "float64",
    "DT_INT8": "int8",
    "DT_UINT8": "uint8",
    "DT_INT16": "int16",
    "DT_INT32": "int32",
    "DT_INT64": "int64",
    "DT_UINT32": "uint32",
    "DT_UINT64": "uint64",
    "DT_BOOL": "bool",
    "DT_STRING": "object",
}


class TensorSpec(NamedTuple):
    """dtype in numpy's name ("object" for strings), shape with None for a free dimension."""

    dtype: str
    shape: tuple[int | None, ...] | None


class Signature(NamedTuple):
    """A signature's inputs and outputs by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


def specs(infos: dict[str, Any]) -> dict[str, TensorSpec]:
    """Reads the tensors of a signature, as the server's JSON has them."""
    found = {}
    for name, info in infos.items():
        shape = None
        if not info["tensor_shape"]["unknown_rank"]:
            sizes = [int(dim["size"]) for dim in info["tensor_shape"]["dim"]]
            shape = tuple(size if size >= 0 else None for size in sizes)
        found[name] = TensorSpec(_DTYPES.get(info["dtype"], info["dtype"]), shape)
    return found


def fitting(name: str, value: Any, spec: TensorSpec | None) -> Any:
    """Returns an array in its input's dtype; lists are left to who writes the request.

    Raises:
        ValueError: a number would become another one.
    """
    if not hasattr(value, "__array__"):
        return value
    array = np.asarray(value)
    if spec is None or spec.dtype not in _DTYPES.values() or spec.dtype == "object":
        return array
    if array.dtype.kind not in "biuf":
        raise ValueError(f"inputs[{name!r}]: expected {spec.dtype}, got an array of {array.dtype}")
    with np.errstate(invalid="ignore", over="ignore"):
        taken = array.astype(spec.dtype)
    if taken.dtype.kind != "f" and (lost := array[taken != array]).size:
        raise ValueError(f"inputs[{name!r}]: expected {spec.dtype}, got {lost.flat[0]}")
    return taken


class VersionStatus(NamedTuple):
    """A version of the model; `state` is AVAILABLE when it answers."""

    version: int
    state: str
    error_message: str


def version_statuses(answer: dict[str, Any]) -> list[VersionStatus]:
    return [
        VersionStatus(int(item["version"]), item["state"], item["status"]["error_message"])
        for item in answer["model_version_status"]
    ]


def read_signatures(definitions: dict[str, Any]) -> dict[str, Signature]:
    return {
        name: Signature(specs(entry["inputs"]), specs(entry["outputs"]))
        for name, entry in definitions.items()
        if entry["method_name"]  # the initializer has none
    }
