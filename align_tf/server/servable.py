"""One version of a model: a SavedModel in memory, run as TensorFlow Serving runs it."""

import functools
import os
import pathlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers its ops, which a SavedModel may use
from google.protobuf.message import DecodeError
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf.error_codes_pb2 import Code
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    prediction_log_pb2,
)

from align_tf.server.batching import Batcher
from align_tf.server.prometheus import Metrics
from align_tf.server.status_codes import RequestError, invalid_argument

DEFAULT_SIGNATURE = "serving_default"
WARMUP_REQUESTS = "assets.extra/tf_serving_warmup_requests"


class Servable:
    """One version of a model, run as TensorFlow Serving runs it: loaded into one v1 session.

    A session checks no static shape in Python, so errors are the kernels' own. It is safe to
    call from several threads, and is closed when the last call in flight has let go of it.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        name: str,
        version: int,
        metrics: Metrics,
        batcher: Batcher | None = None,
    ):
        """Loads a SavedModel and runs its recorded warmup requests.

        Args:
            folder: holds saved_model.pb.
            name: of the model.
            version: of the model.
            metrics: is told how long runs take.
            batcher: runs the requests; None runs each as it comes.

        Raises:
            tf.errors.OpError, RuntimeError, OSError, ValueError: the folder holds no SavedModel
                that can be loaded, or warmup requests that cannot be read.
            RequestError: a warmup request fails.
        """
        self.name, self.version = name, version
        self.metrics, self.batcher = metrics, batcher
        config = tf.compat.v1.ConfigProto()
        config.gpu_options.allow_growth = True
        self.graph = tf.Graph()
        self.session = tf.compat.v1.Session(graph=self.graph, config=config)
        logger = tf.get_logger()
        level = logger.level
        logger.setLevel("ERROR")  # the loader announces itself as deprecated
        try:
            with self.graph.as_default():
                meta_graph = tf.compat.v1.saved_model.load(
                    self.session, [tf.saved_model.SERVING], os.fspath(folder)
                )
        finally:
            logger.setLevel(level)
        self.signatures = dict(meta_graph.signature_def)
        self._warm_up(folder / WARMUP_REQUESTS)

    def _warm_up(self, path: pathlib.Path) -> None:
        if path.is_file():
            for name, *request in _read_warmup(path):
                self.predict(*request, named=name)

    def predict(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_filter: Iterable[str] = (),
        named: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs a signature.

        Args:
            signature_name: "" for serving_default.
            inputs: the inputs by name; strings as arrays of bytes objects.
            output_filter: the outputs to answer with, all of them if empty.
            named: the model's name in the metrics; None is the name it is served by.

        Returns:
            The outputs by name.

        Raises:
            RequestError: the request does not fit the signature, or an op failed.
        """
        key = signature_name or DEFAULT_SIGNATURE
        if key not in self.signatures:
            raise RequestError("FAILED_PRECONDITION", f'Serving signature key "{key}" not found.')
        signature = self.signatures[key]
        _check_inputs(signature, inputs)
        names = tuple(_checked_filter(signature, output_filter))
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        for name, array in arrays.items():
            _check_dtype(name, array, signature.inputs[name].dtype)
        fetched = self._fetched(signature, names)
        run = functools.partial(self._run, signature, fetched)
        started = time.monotonic()
        if self.batcher is None:
            outputs = run(arrays)
        else:
            open_dims = {name: _open_dims(info) for name, info in signature.inputs.items()}
            outputs = self.batcher.run((self, key, fetched), run, arrays, open_dims)
        seconds = time.monotonic() - started
        model = self.name if named is None else named
        self.metrics.observe("runtime_latency", seconds, model, "Predict", "TF1")
        return {name: outputs[name] for name in names}

    def _fetched(self, signature: Any, names: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the outputs to compute for some of them.

        A session compiles each choice anew, for seconds: where one op gives all, as in what Keras
        and TensorFlow 2 write, all are computed, which a warmup request has compiled.
        """
        ops = {info.name.rpartition(":")[0] for info in signature.outputs.values()}
        return tuple(sorted(signature.outputs)) if len(ops) == 1 else names

    def _run(
        self, signature, names: Iterable[str], inputs: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        feeds = {
            self._tensor(signature.inputs[name].name): value
            for name, value in sorted(inputs.items())
        }
        fetches = [self._tensor(signature.outputs[name].name) for name in names]
        # What Session.run calls once it has checked the static shapes.
        try:
            values = self.session._call_tf_sessionrun(None, feeds, fetches, [], None)
        except tf.errors.OpError as error:
            raise RequestError(Code.Name(error.error_code), error.message) from None
        return {name: _as_array(value) for name, value in zip(names, values, strict=True)}

    def metadata(self) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Returns the signatures, as GetModelMetadata answers."""
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = self.name
        response.model_spec.version.value = self.version
        signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=self.signatures)
        response.metadata["signature_def"].Pack(signatures)
        return response

    def _tensor(self, name: str):
        try:
            return self.graph.get_tensor_by_name(name)._as_tf_output()
        except (KeyError, ValueError) as error:  # the signature of an initializer names an op
            raise invalid_argument(str(error)) from None


def _as_array(value) -> np.ndarray:
    return np.array(value, object) if isinstance(value, bytes) else np.asarray(value)


def _open_dims(info) -> list[int]:
    return [number for number, dim in enumerate(info.tensor_shape.dim) if number and dim.size < 0]


def _check_inputs(signature, inputs: Mapping[str, np.ndarray]) -> None:
    sent, expected = set(inputs), set(signature.inputs)

    def listed(names):
        return "{" + ",".join(sorted(names)) + "}"

    if len(sent) != len(expected):
        raise invalid_argument(
            f"input size does not match signature: {len(sent)}!={len(expected)} "
            f"len({listed(sent)}) != len({listed(expected)}). "
            f"Sent extra: {listed(sent - expected)}. "
            f"Missing but required: {listed(expected - sent)}."
        )
    for name in sorted(expected - sent):
        raise invalid_argument(
            f"Signature input alias: {name}(feed name: {signature.inputs[name].name}) not found in "
            "request and no default value provided. Inputs expected to be in the request "
            f"{listed(sent)}, or default input alias set: "
        )


def _check_dtype(name: str, array: np.ndarray, expected: int) -> None:
    """Refuses what the graph would refuse too, without the name of the input."""
    dtype = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
    if dtype.as_datatype_enum != expected:
        expected, provided = (
            types_pb2.DataType.Name(number).removeprefix("DT_").lower()
            for number in (expected, dtype.as_datatype_enum)
        )
        raise invalid_argument(f"{name}: expected {expected}, but {provided} is provided")


def _checked_filter(signature, output_filter: Iterable[str]) -> list[str]:
    names = list(output_filter)
    for position, name in enumerate(names):
        if name not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {name} Outputs expected to be in "
                f"the set {{{','.join(sorted(signature.outputs))}}}."
            )
        if name in names[:position]:
            raise invalid_argument(f"duplicate output tensor alias: {name}")
    return names or sorted(signature.outputs)


def _read_warmup(
    path: pathlib.Path,
) -> Iterator[tuple[str, str, dict[str, np.ndarray], Iterable[str]]]:
    """Yields the model that each request of a warmup file names, and what `predict` takes of it."""
    try:
        for record in tf.data.TFRecordDataset(os.fspath(path)).as_numpy_iterator():
            log = prediction_log_pb2.PredictionLog.FromString(record)
            request = log.predict_log.request
            inputs = {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
            if log.HasField("predict_log"):
                spec = request.model_spec
                yield spec.name, spec.signature_name, inputs, request.output_filter
    except tf.errors.DataLossError as error:  # what a request raises does not come by here
        reason = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", error.message)
        raise RequestError("DATA_LOSS", f"{path}: not warmup requests: {reason}") from None
    except (DecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not warmup requests: {error}") from None
