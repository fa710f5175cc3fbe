"""The server's gRPC half: prediction, model status and health."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from grpc_health.v1 import health_pb2
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    predict_pb2,
)

from align_tf.server import message_memory
from align_tf.server.grpc_calls import Calls, aborting, parsed
from align_tf.server.limits import Gate, Share
from align_tf.server.prometheus import Metrics
from align_tf.server.servable import DEFAULT_SIGNATURE
from align_tf.server.servables import Servables
from align_tf.server.status_codes import Overloaded, RequestError, invalid_argument

MAX_WATCHES = 1000  # of health, at once: each stays open
BYTES_A_NUMBER, BYTES_A_STRING = 64, 128  # that a value takes while an answer is written
ANSWER_COPIES = 2  # of an answer, while it is sent
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
_FIELD_NAMES = {dtype.as_datatype_enum: name for dtype, name in _PROTO_FIELDS.items()}


class PredictionService:
    """tensorflow.serving.PredictionService, but for what runs over tf.Example."""

    def __init__(self, servables: Servables, gate: Gate, metrics: Metrics, calls: Calls):
        self.servables, self.gate, self.metrics, self.calls = servables, gate, metrics, calls

    def handlers(self) -> grpc.GenericRpcHandler:
        """Returns what a server is given of it."""
        metadata = get_model_metadata_pb2.GetModelMetadataRequest
        methods = {
            "Predict": grpc.stream_unary_rpc_method_handler(aborting(self.Predict)),
            "GetModelMetadata": self.calls.small_call(self.GetModelMetadata, metadata),
        }
        return grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", methods)

    def Predict(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with contextlib.ExitStack() as held:
            share = held.enter_context(self.gate.memory.request())
            try:
                self.gate.check_place()  # a message that comes takes none yet
                request = self._receive(messages, context, share)
            except RequestError as error:  # of which model nobody knows yet
                self.metrics.count("request_count", "", error.code)
                raise
            answer = self._answer(request, context, share)
            del request
            share.keep(ANSWER_COPIES * len(answer))
            self.calls.keep_until_taken(context, len(answer), held.pop_all().close)
            return answer

    def _receive(
        self, messages: Iterator[bytes], context: grpc.ServicerContext, share: Share
    ) -> predict_pb2.PredictRequest:
        with self.calls.message(messages, context) as data:
            share.take(message_memory.memory(data))
            return parsed(data, predict_pb2.PredictRequest)

    def _answer(
        self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext, share: Share
    ) -> bytes:
        model = self.servables.label(request.model_spec.name)
        with self.metrics.request(model, "Predict", "GRPC"), self.gate.place(), self.gate.turn:
            if not context.is_active():  # its deadline has passed while it waited
                raise RequestError("CANCELLED", "The caller has gone")
            return self._predict(request, share).SerializeToString()

    def _predict(
        self, request: predict_pb2.PredictRequest, share: Share
    ) -> predict_pb2.PredictResponse:
        _require_model_spec(request)
        servable = self.servables.find(request.model_spec)
        outputs = servable.predict(
            request.model_spec.signature_name,
            {name: self._from_proto(name, tensor) for name, tensor in request.inputs.items()},
            request.output_filter,
        )
        share.take(sum(map(_answer_memory, outputs.values())))
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


class ModelService:
    """tensorflow.serving.ModelService, but for the reload of its configuration."""

    def __init__(self, servables: Servables, calls: Calls):
        self.servables, self.calls = servables, calls

    def handlers(self) -> grpc.GenericRpcHandler:
        """Returns what a server is given of it."""
        status = get_model_status_pb2.GetModelStatusRequest
        methods = {"GetModelStatus": self.calls.small_call(self.GetModelStatus, status)}
        return grpc.method_handlers_generic_handler("tensorflow.serving.ModelService", methods)

    def GetModelStatus(
        self,
        request: get_model_status_pb2.GetModelStatusRequest,
        context: grpc.ServicerContext,
    ) -> get_model_status_pb2.GetModelStatusResponse:
        _require_model_spec(request)
        return self.servables.status(request.model_spec)


class HealthService:
    """grpc.health.v1, whose streams of Watch end in the drain: an open one holds a stop up.

    What streams send is sent by one thread: their beginnings and the drain come one by one.
    """

    thread = futures.ThreadPoolExecutor(1, "health")

    def __init__(self, calls: Calls):
        self.calls = calls
        self.draining = False
        self.streams: dict[Callable, str] = {}  # what each sends by -> the service it watches

    def handlers(self) -> grpc.GenericRpcHandler:
        """Returns what a server is given of it."""
        methods = {
            "Check": self.calls.small_call(self.Check, health_pb2.HealthCheckRequest),
            "Watch": grpc.stream_stream_rpc_method_handler(
                self.Watch, response_serializer=health_pb2.HealthCheckResponse.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods)

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in HEALTH_SERVICES:
            raise RequestError("NOT_FOUND", f'unknown service "{request.service}"')
        return self._status(request.service)

    def Watch(
        self,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
        send_response_callback: Callable,
    ) -> None:
        self.calls.small.submit(self._receive, messages, context, send_response_callback)

    # gRPC's own way of a stream that keeps no thread.
    Watch.experimental_non_blocking, Watch.experimental_thread_pool = True, thread

    def _receive(
        self, messages: Iterator[bytes], context: grpc.ServicerContext, send: Callable
    ) -> None:
        try:
            request = self.calls.small_message(messages, context, health_pb2.HealthCheckRequest)
            if len(self.streams) >= MAX_WATCHES:
                raise Overloaded(f"{MAX_WATCHES} watch the health already: try again later")
        except RequestError as error:
            context.set_code(grpc.StatusCode[error.code])
            context.set_details(error.message)
            send(None)
        except grpc.RpcError:  # the call has ended
            pass
        else:
            self.thread.submit(self._watch, request.service, context, send)

    def _watch(self, service: str, context: grpc.ServicerContext, send: Callable) -> None:
        self.streams[send] = service
        forget = functools.partial(self.streams.pop, send, None)
        if not context.add_callback(forget):  # it has been cancelled already
            forget()
            return
        send(self._status(service))
        if self.draining:
            send(None)

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
        lists = {field.name: value for field, value in tensor.ListFields()}
        names = [name for name in lists if name.endswith("_val")]
        # A tensor has all its values in one field, its dtype's: of another it would be filled up.
        own = len(names) == 1 and _FIELD_NAMES.get(tensor.dtype, names[0]) == names[0]
        held = len(lists[names[0]]) if own else 0
        if math.prod(sizes) > held:  # it would be filled up with the last one
            raise invalid_argument(
                f"tensor parsing error: {name}: {math.prod(sizes)} elements declared, {held} held"
            )
    try:
        return tf.make_ndarray(tensor)
    except (TypeError, ValueError, OverflowError, KeyError):  # of a dtype without values
        raise invalid_argument(f"tensor parsing error: {name}") from None


def _answer_memory(array: np.ndarray) -> int:
    """Returns about how many bytes an output takes at most while it is written."""
    if array.dtype == object:
        return BYTES_A_STRING * array.size + 3 * sum(map(len, array.ravel().tolist()))
    return BYTES_A_NUMBER * array.size


def _to_proto(array: np.ndarray) -> tensor_pb2.TensorProto:
    dtype = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
    if dtype not in _PROTO_FIELDS:
        return tf.make_tensor_proto(array)
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum)
    proto.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
    getattr(proto, _PROTO_FIELDS[dtype]).extend(array.ravel().tolist())
    return proto
