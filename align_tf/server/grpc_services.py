"""The server's gRPC half: prediction, model status and health."""

import functools
import math
import traceback
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from align_tf.server.limits import Gate
from align_tf.server.prometheus import Metrics
from align_tf.server.servable import DEFAULT_SIGNATURE
from align_tf.server.servables import Servables
from align_tf.server.status_codes import RequestError, invalid_argument

MAX_MESSAGE_LENGTH = 1024  # characters of a gRPC error
COPIES = 3  # of a request, at most: the message, its arrays, and those of its batch
HEALTH_SERVICES = (  # of grpc.health.v1; "" is the server as a whole
    "",
    "tensorflow.serving.PredictionService",
    "tensorflow.serving.ModelService",
)

# The field of TensorProto that holds a dtype's values, as TensorFlow Serving fills it.
_PROTO_FIELDS = {
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.int8: "int_val",
    tf.uint8: "int_val",
    tf.int16: "int_val",
    tf.uint16: "int_val",
    tf.int32: "int_val",
    tf.int64: "int64_val",
    tf.uint32: "uint32_val",
    tf.uint64: "uint64_val",
    tf.bool: "bool_val",
    tf.string: "string_val",
}


def _aborting(method: Callable) -> Callable:
    """Turns a method's errors into the call's status."""

    @functools.wraps(method)
    def wrapped(self, request, context):
        try:
            return method(self, request, context)
        except RequestError as error:
            context.abort(grpc.StatusCode[error.code], _shortened(error.message))
        except MemoryError:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Out of memory")
        except Exception as error:
            traceback.print_exc()
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

    return wrapped


def _shortened(message: str) -> str:
    """Keeps a message within what fits into a call's trailers, as TensorFlow Serving does."""
    if len(message) <= MAX_MESSAGE_LENGTH:
        return message
    return message[:MAX_MESSAGE_LENGTH] + "...TRUNCATED"


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, servables: Servables, gate: Gate, metrics: Metrics):
        self.servables, self.gate, self.metrics = servables, gate, metrics

    @_aborting
    def Predict(
        self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext
    ) -> predict_pb2.PredictResponse:
        model = self.servables.label(request.model_spec.name)
        with self.metrics.request(model, "Predict", "GRPC"), self.gate.memory.request() as take:
            take(COPIES * request.ByteSize())
            with self.gate:
                return self._predict_in_turn(request, context)

    def _predict_in_turn(
        self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext
    ) -> predict_pb2.PredictResponse:
        if not context.is_active():  # its deadline has passed while it waited
            raise RequestError("CANCELLED", "The caller has gone")
        return self._predict(request)

    def _predict(self, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
        _require_model_spec(request)
        servable = self.servables.find(request.model_spec)
        outputs = servable.predict(
            request.model_spec.signature_name,
            {name: self._from_proto(name, tensor) for name, tensor in request.inputs.items()},
            request.output_filter,
        )
        response = predict_pb2.PredictResponse(
            outputs={name: _to_proto(array) for name, array in outputs.items()}
        )
        response.model_spec.name = servable.name
        response.model_spec.version.value = servable.version
        response.model_spec.signature_name = request.model_spec.signature_name or DEFAULT_SIGNATURE
        return response

    def _from_proto(self, name: str, tensor: tensor_pb2.TensorProto) -> np.ndarray:
        self.gate.check_rows(name, tuple(dim.size for dim in tensor.tensor_shape.dim))
        return _from_proto(name, tensor)

    @_aborting
    def GetModelMetadata(
        self,
        request: get_model_metadata_pb2.GetModelMetadataRequest,
        context: grpc.ServicerContext,
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        _require_model_spec(request)
        if not request.metadata_field:
            raise invalid_argument(
                "GetModelMetadataRequest must specify at least one metadata_field"
            )
        for field in request.metadata_field:
            if field != "signature_def":
                raise invalid_argument(f"Metadata field {field} is not supported")
        return self.servables.find(request.model_spec).metadata()


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, servables: Servables):
        self.servables = servables

    @_aborting
    def GetModelStatus(
        self,
        request: get_model_status_pb2.GetModelStatusRequest,
        context: grpc.ServicerContext,
    ) -> get_model_status_pb2.GetModelStatusResponse:
        _require_model_spec(request)
        return self.servables.status(request.model_spec)


class HealthService(health_pb2_grpc.HealthServicer):
    """grpc.health.v1, whose streams of Watch end in the drain: an open one holds a stop up.

    What streams send is sent by one thread: their beginnings and the drain come one by one.
    """

    thread = futures.ThreadPoolExecutor(1, "health")

    def __init__(self):
        self.draining = False
        self.streams: dict[Callable, str] = {}  # what each sends by -> the service it watches

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in HEALTH_SERVICES:
            context.abort(grpc.StatusCode.NOT_FOUND, f'unknown service "{request.service}"')
        return self._status(request.service)

    def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.ServicerContext,
        send_response_callback: Callable,
    ) -> None:
        self.streams[send_response_callback] = request.service
        forget = functools.partial(self.streams.pop, send_response_callback, None)
        if not context.add_callback(forget):  # it has been cancelled already
            forget()
            return
        send_response_callback(self._status(request.service))
        if self.draining:
            send_response_callback(None)

    # gRPC's own way of a stream that keeps no thread.
    Watch.experimental_non_blocking, Watch.experimental_thread_pool = True, thread

    def drain(self) -> None:
        """Tells who watches that the services stop, and ends the streams."""
        self.thread.submit(self._drain)

    def _drain(self) -> None:
        self.draining = True
        for send, service in list(self.streams.items()):
            if service in HEALTH_SERVICES:
                send(self._status(service))
            send(None)

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in HEALTH_SERVICES:
            return health_pb2.HealthCheckResponse(status="SERVICE_UNKNOWN")
        return health_pb2.HealthCheckResponse(status="NOT_SERVING" if self.draining else "SERVING")


def _require_model_spec(request: Any) -> None:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")


def _from_proto(name: str, tensor: tensor_pb2.TensorProto) -> np.ndarray:
    sizes = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        raise invalid_argument(f"tensor parsing error: {name}: not a whole shape")
    if not tensor.tensor_content:  # which has to be as long as the shape says
        lists = [value for field, value in tensor.ListFields() if field.name.endswith("_val")]
        held = len(lists[0]) if len(lists) == 1 else 0  # a tensor has all its values in one field
        if math.prod(sizes) > held:  # it would be filled up with the last one
            raise invalid_argument(
                f"tensor parsing error: {name}: {math.prod(sizes)} elements declared, {held} held"
            )
    try:
        return tf.make_ndarray(tensor)
    except (TypeError, ValueError, OverflowError, KeyError):  # of a dtype without values
        raise invalid_argument(f"tensor parsing error: {name}") from None


def _to_proto(array: np.ndarray) -> tensor_pb2.TensorProto:
    dtype = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
    if dtype not in _PROTO_FIELDS:
        return tf.make_tensor_proto(array)
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum)
    proto.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
    getattr(proto, _PROTO_FIELDS[dtype]).extend(array.ravel().tolist())
    return proto
