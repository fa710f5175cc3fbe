"""TensorFlow Serving's JSON: request bodies to arrays, arrays to response bodies.

The behavior is that of tensorflow_serving/util/json_tensor.cc, whose reader and writer are
rapidjson's: what it accepts, what it says of an error, how it lays out an answer.
"""

import base64
import binascii
import contextlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from align_tf.server.rapidjson import INDENT, decimals, encode, quote, render, stringify
from align_tf.server.status_codes import RequestError, invalid_argument

MAX_RANK = 64  # numpy's
BYTES_A_NUMBER, BYTES_A_STRING = 200, 300  # that a value of an answer takes while it is written
BYTES_SUFFIX = "_bytes"  # string outputs whose name ends so are written as {"b64": ...}

# dtype: (name in errors, JSON types it takes, lowest and highest number it takes); what a float
# cannot hold is rounded, or infinite.
_DTYPES = {
    tf.float32: ("float", {int, float}, None, None),
    tf.float64: ("double", {int, float}, None, None),
    tf.int8: ("int8", {int}, -(2**31), 2**31 - 1),  # wider than the type, as in the original
    tf.uint8: ("uint8", {int}, -(2**31), 2**31 - 1),
    tf.int16: ("int16", {int}, -(2**31), 2**31 - 1),
    tf.int32: ("int32", {int}, -(2**31), 2**31 - 1),
    tf.int64: ("int64", {int}, -(2**63), 2**63 - 1),
    tf.uint32: ("uint32", {int}, 0, 2**32 - 1),
    tf.uint64: ("uint64", {int}, 0, 2**64 - 1),
    tf.string: ("string", {str}, None, None),
    tf.bool: ("bool", {bool}, None, None),
}


# --- requests ------------------------------------------------------------------------------


def signature_name(document: Mapping[str, Any]) -> str:
    """Returns the signature that a request names, or "".

    Raises:
        RequestError: it is not a string.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise _format_error(
            document, "not formatted correctly. 'signature_name' key must be a string value."
        )
    return name


def check_examples(document: Mapping[str, Any]) -> None:
    """Checks the list that a classify or regress request holds.

    Raises:
        RequestError: there is none, or it is not one of objects.
    """
    if "examples" not in document:
        raise _format_error(
            document, "When method is classify, key 'examples' is expected and was not found"
        )
    examples = document["examples"]
    if not isinstance(examples, list):
        raise _format_error(document, "Expecting 'examples' value to be an list/array")
    if not examples:
        raise _format_error(document, "'examples' value is an empty array")
    for example in examples:
        if not isinstance(example, dict):
            raise invalid_argument(
                f"Example must be JSON object but got JSON {_type_name(example)}"
            )


def predict_inputs(
    document: Mapping[str, Any], dtypes: Mapping[str, tf.DType]
) -> tuple[dict[str, np.ndarray], bool]:
    """Converts a predict request to arrays.

    Args:
        document: the request, with "instances" (row form) or "inputs" (column form).
        dtypes: the signature's inputs.

    Returns:
        The inputs by name, and whether the request was in row form.

    Raises:
        RequestError: the request does not fit the signature.
    """
    if "instances" in document and "inputs" in document:
        raise _format_error(
            document,
            "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist ",
        )
    if "instances" in document:
        instances = document["instances"]
        if not isinstance(instances, list):
            raise _format_error(document, "Expecting 'instances' to be an list/array")
        if not instances:
            raise _format_error(document, "No values in 'instances' array")
        return _from_rows(instances, dtypes), True
    if "inputs" in document:
        return _from_columns(document["inputs"], dtypes), False
    raise invalid_argument("Missing 'inputs' or 'instances' key")


def _from_rows(instances: list, dtypes: Mapping[str, tf.DType]) -> dict[str, np.ndarray]:
    if not isinstance(instances[0], dict) and len(dtypes) > 1:
        raise invalid_argument(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    if (arrays := _rows_at_once(instances, dtypes)) is not None:
        return arrays
    objects = _is_plain_object(instances[0])
    names = sorted(dtypes)
    values: dict[str, list] = {name: [] for name in names}
    shapes: dict[str, list[int]] = {}
    for number, element in enumerate(instances):
        if _is_plain_object(element) != objects:
            kinds = ("object", "list") if objects else ("value/list", "object")
            raise invalid_argument(
                f"Expecting {kinds[0]} but got {kinds[1]} at item {number} of input list"
            )
        for name, item in element.items() if objects else [(names[0], element)]:
            try:
                _add_row(item, name, dtypes, values, shapes)
            except RequestError as error:
                key = f" key: {name}" if objects else ""
                raise invalid_argument(
                    f"Failed to process element: {number}{key} of 'instances' list. Error: {error}"
                ) from None
        if objects and sorted(element) != names:
            raise invalid_argument(
                f"Failed to process element: {number} of 'instances' list. JSON object: "
                f"{stringify(element)} keys must be equal to: {','.join(names)}"
            )
    return {
        name: _array(name, values[name], [len(instances), *shapes[name]], dtypes[name])
        for name in names
    }


def _rows_at_once(instances: list, dtypes: Mapping[str, tf.DType]) -> dict[str, np.ndarray] | None:
    """Converts rows that all fit without a look at each in turn; None leaves them to be told."""
    columns = {next(iter(dtypes)): instances}
    if set(map(type, instances)) == {dict} and not _is_base64(instances[0]):
        if any(row.keys() != dtypes.keys() for row in instances):
            return None
        columns = {name: [row[name] for row in instances] for name in dtypes}
    arrays = {}
    for name in sorted(columns):
        shape = _shape(columns[name])
        values = _leaves(columns[name], shape, dtypes[name])
        if values is None:
            return None
        arrays[name] = _array(name, values, shape, dtypes[name])
    return arrays


def _add_row(
    item: Any,
    name: str,
    dtypes: Mapping[str, tf.DType],
    values: dict[str, list],
    shapes: dict[str, list[int]],
) -> None:
    if name not in dtypes:
        raise invalid_argument(f"JSON object: does not have named input: {name}")
    shape = _shape(item)
    before = len(values[name])
    _fill(item, 0, shape, dtypes[name], values[name])
    size = len(values[name]) - before
    expected = shapes.setdefault(name, shape)
    if size != math.prod(expected):
        raise invalid_argument(f"Expecting tensor size: {math.prod(expected)} but got: {size}")
    if shape != expected:
        shown = [f"[{','.join(map(str, s))}]" for s in (expected, shape)]
        raise invalid_argument(f"Expecting shape {shown[0]} but got: {shown[1]}")


def _from_columns(inputs: Any, dtypes: Mapping[str, tf.DType]) -> dict[str, np.ndarray]:
    if not _is_plain_object(inputs):
        if len(dtypes) > 1:
            raise invalid_argument(
                "inputs is a plain value/list, but expecting an object as multiple input tensors "
                "required as per tensorinfo_map"
            )
        inputs = dict.fromkeys(dtypes, inputs)
    arrays = {}
    for name in sorted(dtypes):
        if name not in inputs:
            raise invalid_argument(f"Missing named input: {name} in 'inputs' object.")
        shape = _shape(inputs[name])
        values = _leaves(inputs[name], shape, dtypes[name])
        if values is None:
            values = []
            try:
                _fill(inputs[name], 0, shape, dtypes[name], values)
            except RequestError as error:
                raise RequestError(error.code, f"{error.message}, in input: {name}") from None
        arrays[name] = _array(name, values, shape, dtypes[name])
    return arrays


def _is_plain_object(value: Any) -> bool:
    return isinstance(value, dict) and not _is_base64(value)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def _shape(value: Any) -> list[int]:
    """Returns the shape that the first elements, level by level, announce."""
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return shape


def _leaves(value: Any, shape: list[int], dtype: tf.DType) -> list | None:
    """Returns a nested list's leaves, level by level; None if one does not fit as it is."""
    items = [value]
    for size in shape:
        if set(map(type, items)) != {list} or set(map(len, items)) != {size}:
            return None
        items = list(itertools.chain.from_iterable(items))
    if dtype == tf.string:
        found = set(map(type, items))
        if found == {str}:
            return [item.encode("utf-8", "surrogateescape") for item in items]
        if found == {dict} and all(map(_is_base64, items)):
            with contextlib.suppress(RequestError):  # it is told with its place
                return list(map(_decode_base64, items))
        return None
    return items if _all_plain(items, dtype) else None


def _fill(value: Any, level: int, shape: list[int], dtype: tf.DType, values: list) -> None:
    """Appends a (nested) value's leaves, checked against shape and dtype."""
    rank = len(shape)
    if not isinstance(value, list):
        if level != rank:
            raise invalid_argument(
                f"JSON Value: {stringify(value)} found at incorrect level: {level + 1} in the "
                f"JSON DOM. Expected at level: {rank}"
            )
        values.append(_leaf(value, dtype))
        return
    if level >= rank:
        raise invalid_argument(f"Encountered list at unexpected level: {level} expected < {rank}")
    if len(value) != shape[level]:
        raise invalid_argument(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: "
            f"{shape[level]}"
        )
    if level == rank - 1 and dtype != tf.string and _all_plain(value, dtype):
        values.extend(value)
        return
    for item in value:
        _fill(item, level + 1, shape, dtype, values)


def _all_plain(items: list, dtype: tf.DType) -> bool:
    """Tells whether a list's items all fit, without a look at each of them in Python."""
    _, types, low, high = _DTYPES.get(dtype, ("", set(), None, None))
    if not items or not set(map(type, items)) <= types:
        return False
    return low is None or (low <= min(items) and max(items) <= high)


def _leaf(value: Any, dtype: tf.DType) -> Any:
    if dtype not in _DTYPES:
        raise RequestError(
            "UNIMPLEMENTED", f"Conversion of JSON Value: {stringify(value)} to type: {_name(dtype)}"
        )
    name, types, low, high = _DTYPES[dtype]
    if dtype == tf.string and isinstance(value, dict):
        return _decode_base64(value)
    if type(value) is int and not -(2**63) <= value < 2**64:
        value = float(value)  # rapidjson's numbers beyond 64 bits are doubles
    taken = type(value) in types and (types != {int} or low <= value <= high)
    if not taken:
        raise invalid_argument(
            f"JSON Value: {stringify(value)} Type: {_type_name(value)} is not of expected type: "
            f"{name}"
        )
    return value.encode("utf-8", "surrogateescape") if dtype == tf.string else value


def _decode_base64(value: dict) -> bytes:
    if not _is_base64(value):
        raise _format_error(value, "not formatted correctly for base64 data")
    text = "".join(value["b64"].split()).replace(".", "=")  # both are read as padding
    bare = text.rstrip("=")
    padding = "=" * (-len(bare) % 4)
    try:
        if text not in (bare, bare + padding):
            raise ValueError
        return base64.b64decode(bare + padding, validate=True)
    except (ValueError, binascii.Error):
        raise invalid_argument("Unable to base64 decode") from None


def _array(name: str, values: list, shape: list[int], dtype: tf.DType) -> np.ndarray:
    if len(shape) > MAX_RANK:
        raise invalid_argument(f"tensor parsing error: {name}")
    if dtype == tf.string:
        array = np.empty(len(values), object)
        array[:] = values
        return array.reshape(shape)
    wide = np.float64 if dtype.is_floating else np.uint64 if dtype == tf.uint64 else np.int64
    with np.errstate(over="ignore"):  # beyond float's range is infinite
        return np.array(values, wide).astype(dtype.as_numpy_dtype).reshape(shape)


# --- responses -----------------------------------------------------------------------------


def memory(array: np.ndarray) -> int:
    """Returns about how many bytes an output takes at most while it is written."""
    if array.dtype == object:
        return BYTES_A_STRING * array.size + 16 * sum(map(len, array.ravel().tolist()))
    return BYTES_A_NUMBER * array.size


def predict_body(outputs: Mapping[str, np.ndarray], row_form: bool) -> bytes:
    """Writes a predict response.

    Args:
        outputs: the outputs by name; strings as arrays of bytes objects.
        row_form: "predictions", an item for each row, or "outputs".

    Raises:
        RequestError: the outputs cannot be split into rows, or have a dtype
            that JSON has no form for.
    """
    trees = {name: _tree(name, outputs[name]) for name in sorted(outputs)}
    if not row_form:
        tree = trees if len(trees) > 1 else next(iter(trees.values()))
        return encode(render({"outputs": tree}))
    sizes = {}
    for name, array in outputs.items():
        if array.ndim == 0:
            raise invalid_argument(f"Tensor name: {name} has no shape information ")
        sizes[name] = len(array)
        expected = next(iter(sizes.values()))
        if sizes[name] != expected:
            raise invalid_argument(
                f"Tensor name: {name} has inconsistent batch size: {sizes[name]} expecting: "
                f"{expected}"
            )
    if len(trees) > 1:
        rows = [dict(zip(trees, row, strict=True)) for row in zip(*trees.values(), strict=True)]
        items = [f"\n{INDENT * 2}{render(row, 2, one_line=True)}" for row in rows]
        predictions = ",".join(items)
    else:
        predictions = ", ".join(render(row, 2, one_line=True) for row in next(iter(trees.values())))
    end = f"\n{INDENT}]" if sizes and expected else "]"
    return encode(f'{{\n{INDENT}"predictions": [{predictions}{end}\n}}')


def error_body(message: str) -> bytes:
    """Writes an error's response."""
    return encode(render({"error": quote(message)}))


def _tree(name: str, array: np.ndarray) -> Any:
    """Returns an array as nested lists of JSON tokens."""
    tree = np.empty(array.size, object)
    tree[:] = _tokens(name, array)
    return tree.reshape(array.shape).tolist()


def _tokens(name: str, array: np.ndarray) -> list:
    values = array.ravel().tolist()
    if array.dtype == object and name.endswith(BYTES_SUFFIX):
        return [{"b64": f'"{base64.b64encode(value).decode()}"'} for value in values]
    if array.dtype == object:
        return [quote(value.decode("utf-8", "surrogateescape")) for value in values]
    if array.dtype == bool:
        return ["true" if value else "false" for value in values]
    if array.dtype.kind in "iu":
        return list(map(str, values))
    if array.dtype == np.float16:
        return decimals(array.ravel().astype(np.float32))
    if array.dtype in (np.float32, np.float64):
        return decimals(array.ravel())
    dtype = _name(tf.as_dtype(array.dtype))
    raise invalid_argument(f"Failed to write JSON value for tensor type: {dtype}")


# --- values inside error messages ----------------------------------------------------------


def _format_error(value: Any, message: str) -> RequestError:
    return invalid_argument(f"JSON Value: {stringify(value)} {message}")


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    names = {dict: "Object", list: "Array", str: "String", int: "Number", float: "Number"}
    return names.get(type(value), "Null")


def _name(dtype: tf.DType) -> str:
    return (
        _DTYPES[dtype][0] if dtype in _DTYPES else {"float16": "half"}.get(dtype.name, dtype.name)
    )
