"""TensorFlow Serving's settings files: text protos, read by messages its pip package leaves out."""

import os
import pathlib
from typing import Any

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)
from google.protobuf.message import Message

_PACKAGE = "tensorflow.serving"
# message: (field, type): a scalar, a wrapper of google.protobuf, or a message above; "*" repeats.
# From session_bundle_config.proto and monitoring_config.proto. The numbers are not theirs: a text
# has none.
_MESSAGES = {
    "BatchingParameters": (
        ("max_batch_size", "Int64Value"),
        ("batch_timeout_micros", "Int64Value"),
        ("max_enqueued_batches", "Int64Value"),
        ("num_batch_threads", "Int64Value"),
        ("thread_pool_name", "StringValue"),
        ("allowed_batch_sizes", "int64*"),
        ("pad_variable_length_inputs", "bool"),
        ("enable_large_batch_splitting", "BoolValue"),
        ("max_execution_batch_size", "Int64Value"),
    ),
    "PrometheusConfig": (("enable", "bool"), ("path", "string")),
    "MonitoringConfig": (("prometheus_config", "PrometheusConfig"),),
}
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {"int64": _Field.TYPE_INT64, "bool": _Field.TYPE_BOOL, "string": _Field.TYPE_STRING}


def _message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="align_tf/serving_protos.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            made = message.field.add(name=field, number=number)
            made.label = _Field.LABEL_REPEATED if kind.endswith("*") else _Field.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            if kind in _SCALARS:
                made.type = _SCALARS[kind]
            else:
                package = _PACKAGE if kind in _MESSAGES else "google.protobuf"
                made.type, made.type_name = _Field.TYPE_MESSAGE, f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()  # of its own: the package may bring them one day
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _message_classes()
BatchingParameters = _CLASSES["BatchingParameters"]
MonitoringConfig = _CLASSES["MonitoringConfig"]

LONGEST_ERROR = 400  # characters of a parser's


def read_text_proto(path: str | os.PathLike, message: Message, kind: str) -> Any:
    """Fills a message from a text proto file and returns it.

    Args:
        path: the file.
        message: an empty one.
        kind: what the file is, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: the file does not parse.
    """
    path = pathlib.Path(path)
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), message)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such {kind} file") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path}: a folder; expected a {kind} file") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        name, said = message.DESCRIPTOR.name, str(error)
        if len(said) > LONGEST_ERROR:  # it holds what was met in its place
            said = f"{said[: LONGEST_ERROR // 2]} ... {said[-LONGEST_ERROR // 2 :]}"
        raise ValueError(f"{path}: not a {kind} file, a {name} in text: {said}") from None
