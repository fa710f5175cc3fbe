"""Requests over gRPC, waiting or under asyncio."""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from align_tf.client.endpoint import (
    FIRST_PAUSE,
    AlignServerError,
    Endpoint,
    ServerUnavailable,
    Tls,
)
from align_tf.client.signatures import Signature, fitting
from align_tf.extras import extra
from align_tf.server.status_codes import HTTP_STATUS


class _GrpcMessages:
    """What both kinds of gRPC have in common: the channel's arguments, requests and answers."""

    def __init__(self, endpoint: Endpoint):
        with extra("serve", "the gRPC client needs extra packages"):
            import grpc  # noqa: F401
            import tensorflow_serving  # noqa: F401
        self.endpoint, self.address = endpoint, endpoint.address
        self.call_metadata = ()
        if endpoint.token is not None:
            self.call_metadata = (("authorization", f"Bearer {endpoint.token}"),)

    def open(self, module: Any) -> Any:
        """Opens a channel of grpc or grpc.aio."""
        options = [
            # Without these gRPC takes messages of up to 4 MB.
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # A server that comes back is found again as fast as a request is repeated.
            ("grpc.initial_reconnect_backoff_ms", round(FIRST_PAUSE * 1000)),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if self.endpoint.on_this_machine:  # else gRPC asks http_proxy for it
            options.append(("grpc.enable_http_proxy", 0))
        tls = self.endpoint.tls
        if tls is None:
            return module.insecure_channel(self.address, options)
        if tls.server_name:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        return module.secure_channel(self.address, self._credentials(tls), options)

    def _credentials(self, tls: Tls) -> Any:
        import grpc

        files = (tls.root_certificates, tls.private_key, tls.certificate)
        return grpc.ssl_channel_credentials(
            *(None if file is None else pathlib.Path(file).read_bytes() for file in files)
        )

    def address_model(self, request: Any, labelled: bool = True) -> Any:
        request.model_spec.name = self.endpoint.model_name
        if labelled and self.endpoint.version_label is not None:
            request.model_spec.version_label = self.endpoint.version_label
        return request

    def predict_request(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature
    ) -> Any:
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        request = self.address_model(predict_pb2.PredictRequest())
        request.model_spec.signature_name = signature_name
        for name, value in inputs.items():
            spec = signature.inputs.get(name)
            dtype = None if spec is None else tf.as_dtype(spec.dtype.replace("object", "string"))
            value = fitting(name, value, spec)
            try:
                tensor = tf.make_tensor_proto(value, dtype)
            except (TypeError, ValueError) as error:
                raise ValueError(f"inputs[{name!r}]: {error}") from None
            request.inputs[name].CopyFrom(tensor)
        return request

    def outputs(self, response: Any) -> dict[str, np.ndarray]:
        import tensorflow as tf

        return {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}

    def status_request(self) -> Any:
        from tensorflow_serving.apis import get_model_status_pb2

        return self.address_model(get_model_status_pb2.GetModelStatusRequest(), labelled=False)

    def metadata_request(self) -> Any:
        from tensorflow_serving.apis import get_model_metadata_pb2

        return self.address_model(
            get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        )

    def signatures(self, response: Any) -> dict[str, Any]:
        from tensorflow_serving.apis import get_model_metadata_pb2

        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return proto_dict(signatures)["signature_def"]

    def error(self, error: Any) -> Exception:
        """Returns what a failed call means to the caller."""
        code, details = error.code().name, error.details()
        # The code of a server that cannot be reached, too; this is TensorFlow Serving's own word.
        if code == "UNAVAILABLE" and re.search(r"\bfull\b", details):
            return AlignServerError(details, HTTP_STATUS[code])
        if code == "UNAVAILABLE" and "http1.x server" in details:
            return ConnectionError(
                f"{self.address}: speaks HTTP: expected the port of gRPC, or protocol='rest'"
            )
        # Nobody cancels a call here, so that it is a server that stops who did.
        if code in ("UNAVAILABLE", "CANCELLED"):
            return ServerUnavailable(f"{self.address}: cannot reach the server: {details}")
        if code == "DEADLINE_EXCEEDED":
            return TimeoutError(f"{self.address}: no answer in time")
        return AlignServerError(details, HTTP_STATUS[code])


class Grpc:
    """Requests through tensorflow-serving-api's stubs."""

    def __init__(self, endpoint: Endpoint):
        self.messages = _GrpcMessages(endpoint)
        import grpc

        self.channel = self.messages.open(grpc)
        self.stubs = _Stubs(self.channel)

    def predict(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature, timeout: float
    ) -> dict[str, np.ndarray]:
        request = self.messages.predict_request(inputs, signature_name, signature)
        return self.messages.outputs(self._ask(self.stubs.predict, request, timeout))

    def status(self, timeout: float) -> dict[str, Any]:
        return proto_dict(self._ask(self.stubs.status, self.messages.status_request(), timeout))

    def metadata(self, timeout: float) -> dict[str, Any]:
        request = self.messages.metadata_request()
        return self.messages.signatures(self._ask(self.stubs.metadata, request, timeout))

    def close(self) -> None:
        self.channel.close()

    def _ask(self, method: Callable, request: Any, timeout: float) -> Any:
        import grpc

        try:
            return method(request, timeout=timeout, metadata=self.messages.call_metadata)
        except grpc.RpcError as error:
            raise self.messages.error(error) from None


class AsyncGrpc:
    """The same under asyncio."""

    def __init__(self, endpoint: Endpoint):
        self.messages = _GrpcMessages(endpoint)
        import grpc.aio

        self.channel = self.messages.open(grpc.aio)
        self.stubs = _Stubs(self.channel)

    async def predict(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature, timeout: float
    ) -> dict[str, np.ndarray]:
        request = self.messages.predict_request(inputs, signature_name, signature)
        return self.messages.outputs(await self._ask(self.stubs.predict, request, timeout))

    async def status(self, timeout: float) -> dict[str, Any]:
        request = self.messages.status_request()
        return proto_dict(await self._ask(self.stubs.status, request, timeout))

    async def metadata(self, timeout: float) -> dict[str, Any]:
        request = self.messages.metadata_request()
        return self.messages.signatures(await self._ask(self.stubs.metadata, request, timeout))

    async def close(self) -> None:
        await self.channel.close()

    async def _ask(self, method: Callable, request: Any, timeout: float) -> Any:
        import grpc

        try:
            return await method(request, timeout=timeout, metadata=self.messages.call_metadata)
        except grpc.RpcError as error:
            raise self.messages.error(error) from None


class _Stubs:
    """The methods of a channel that the clients call."""

    def __init__(self, channel: Any):
        from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

        prediction = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self.predict, self.metadata = prediction.Predict, prediction.GetModelMetadata
        self.status = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus


def proto_dict(message: Any) -> dict[str, Any]:
    """Returns a message as the server's JSON has it."""
    from google.protobuf import json_format

    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
