"""Writes align.protoset: TensorFlow Serving's messages, which grpcurl cannot ask the server for."""

import pathlib
import sys

from google.protobuf import descriptor_pb2
from tensorflow_serving.apis import model_service_pb2, prediction_service_pb2


def protoset() -> descriptor_pb2.FileDescriptorSet:
    """Returns both services' files with all that they import, each after its imports."""
    files = {}

    def add(file):
        for dependency in file.dependencies:
            add(dependency)
        files.setdefault(file.name, file.serialized_pb)

    add(prediction_service_pb2.DESCRIPTOR)
    add(model_service_pb2.DESCRIPTOR)
    made = descriptor_pb2.FileDescriptorSet()
    for content in files.values():
        made.file.append(descriptor_pb2.FileDescriptorProto.FromString(content))
    return made


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "align.protoset")
    path.write_bytes(protoset().SerializeToString())
