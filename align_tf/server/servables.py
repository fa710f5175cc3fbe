"""SavedModels in memory: loading, version policy and labels, new versions found while serving."""

import dataclasses
import functools
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers its ops, which a SavedModel may use
from tensorflow.core.protobuf.error_codes_pb2 import Code
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    prediction_log_pb2,
)
from tensorflow_serving.config import model_server_config_pb2

from align_tf.server.batching import Batcher
from align_tf.server.prometheus import Metrics
from align_tf.server.protos import read_text_proto
from align_tf.server.status_codes import RequestError, invalid_argument

VersionStatus = get_model_status_pb2.ModelVersionStatus

POLL_SECONDS = 1.0
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
                that can be loaded.
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
        if not path.is_file():
            return
        for record in tf.data.TFRecordDataset(os.fspath(path)).as_numpy_iterator():
            log = prediction_log_pb2.PredictionLog.FromString(record)
            if not log.HasField("predict_log"):
                continue
            request = log.predict_log.request
            inputs = {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
            self.predict(request.model_spec.signature_name, inputs, request.output_filter)

    def predict(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_filter: Iterable[str] = (),
    ) -> dict[str, np.ndarray]:
        """Runs a signature.

        Args:
            signature_name: "" for serving_default.
            inputs: the inputs by name; strings as arrays of bytes objects.
            output_filter: the outputs to compute, all of them if empty.

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
        run = functools.partial(self._run, signature, names)
        started = time.monotonic()
        if self.batcher is None:
            outputs = run(arrays)
        else:
            open_dims = {name: _open_dims(info) for name, info in signature.inputs.items()}
            outputs = self.batcher.run((self, key, names), run, arrays, open_dims)
        seconds = time.monotonic() - started
        self.metrics.observe("runtime_latency", seconds, self.name, "Predict", "TF1")
        return outputs

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


# --- what to serve -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's folder and the versions of it that are served."""

    name: str
    base_path: pathlib.Path
    policy: str = "latest"  # or "all", or "specific"
    latest: int = 1  # how many, under "latest"
    specific: tuple[int, ...] = ()
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def folders(self) -> dict[int, pathlib.Path]:
        """Returns the folders of the versions to serve, newest first.

        base_path holds numbered folders, or is a SavedModel itself.
        """
        path = self.base_path
        if (path / "saved_model.pb").is_file():
            return {int(path.name) if path.name.isdecimal() else 1: path}
        found = {
            int(entry.name): entry
            for entry in (path.iterdir() if path.is_dir() else ())
            if entry.name.isdecimal() and entry.is_dir()
        }
        versions = sorted(found, reverse=True)
        if self.policy == "latest":
            versions = versions[: self.latest]
        elif self.policy == "specific":
            versions = [version for version in versions if version in self.specific]
        return {version: found[version] for version in versions}


def read_model_config_file(path: str | os.PathLike) -> list[ModelConfig]:
    """Reads TensorFlow Serving's model_config_list.

    A base_path that is not absolute is taken from the file's own folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not parse, lists no model, or one that is not TensorFlow's.
    """
    path = pathlib.Path(path)
    proto = read_text_proto(path, model_server_config_pb2.ModelServerConfig(), "model config")
    configs = [_model_config(entry, path) for entry in proto.model_config_list.config]
    names = [config.name for config in configs]
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError(f"{path}: expected models with a name of their own each, got {names}")
    return configs


def _model_config(entry, path: pathlib.Path) -> ModelConfig:
    if entry.model_platform not in ("", "tensorflow"):
        raise ValueError(
            f'{path}: model {entry.name}: model_platform is "{entry.model_platform}", '
            'expected "tensorflow"'
        )
    policy = entry.model_version_policy
    return ModelConfig(
        name=entry.name,
        base_path=path.parent / entry.base_path,
        policy=policy.WhichOneof("policy_choice") or "latest",
        latest=policy.latest.num_versions or 1,
        specific=tuple(policy.specific.versions),
        labels=dict(entry.version_labels),
    )


# --- what is served ------------------------------------------------------------------------


def _version_status(version: int, state: int, code: int = 0, message: str = "") -> VersionStatus:
    status = VersionStatus(version=version, state=state)
    status.status.error_code, status.status.error_message = code, message
    return status


class Servables:
    """The versions that are served, kept in step with the folders."""

    def __init__(
        self, configs: Iterable[ModelConfig], metrics: Metrics, batcher: Batcher | None = None
    ):
        self.metrics, self.batcher = metrics, batcher
        self.configs = {config.name: config for config in configs}
        self._available: dict[str, dict[int, Servable]] = {name: {} for name in self.configs}
        self._statuses: dict[str, dict[int, VersionStatus]] = {name: {} for name in self.configs}
        self._stopped = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="poll-versions", daemon=True)

    def start(self) -> None:
        """Loads every model, then watches the folders.

        Raises:
            FileNotFoundError: a folder has no version to serve.
            ValueError: a version cannot be loaded, or a label points at one that is not served.
        """
        for config in self.configs.values():
            if not config.folders():
                raise FileNotFoundError(
                    f"{config.base_path}: no SavedModel to serve as {config.name}: expected "
                    "numbered version folders, or a folder with saved_model.pb"
                )
            self._update(config)
            for status in self._statuses[config.name].values():
                if status.state != VersionStatus.AVAILABLE:
                    raise ValueError(
                        f"{config.base_path}: version {status.version} does not load: "
                        f"{status.status.error_message}"
                    )
            for label, version in config.labels.items():
                if version not in self._available[config.name]:
                    raise ValueError(
                        f"model {config.name}: label {label} points at version {version}, which "
                        f"is not served; served are {sorted(self._available[config.name])}"
                    )
        self._poller.start()

    def stop(self) -> None:
        """Stops watching and lets go of the models; calls in flight keep theirs to the end."""
        self._stopped.set()
        if self._poller.is_alive():
            self._poller.join()
        self._available = {name: {} for name in self.configs}

    def versions(self, name: str) -> list[int]:
        """Returns the served versions of a model."""
        return sorted(self._available[name])

    def label(self, name: str) -> str:
        """Returns a model's name as metrics tell it: "" for one that is not served at all."""
        return name if name in self.configs else ""

    def find(self, spec: model_pb2.ModelSpec) -> Servable:
        """Returns the servable that a request's model_spec names; the newest if no version.

        Raises:
            RequestError: no such model, version or label is served, or no name is given.
        """
        if not spec.name:
            raise invalid_argument("ModelSpec has no name specified.")
        available = self._available.get(spec.name, {})
        choice = spec.WhichOneof("version_choice")
        if choice is None:
            if not available:
                raise RequestError(
                    "NOT_FOUND", f"Servable not found for request: Latest({spec.name})"
                )
            return available[max(available)]
        version = spec.version.value
        if choice == "version_label":
            labels = self.configs[spec.name].labels if spec.name in self.configs else {}
            if spec.version_label not in labels:
                raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
            version = labels[spec.version_label]
        if version not in available:
            raise RequestError(
                "NOT_FOUND", f"Servable not found for request: Specific({spec.name}, {version})"
            )
        return available[version]

    def status(self, spec: model_pb2.ModelSpec) -> get_model_status_pb2.GetModelStatusResponse:
        """Returns the states of a model's versions, or of the one named; newest first.

        Raises:
            RequestError: no such model or version.
        """
        known = dict(self._statuses.get(spec.name, {}))
        if spec.HasField("version"):
            version = spec.version.value
            if version not in known:
                raise RequestError(
                    "NOT_FOUND", f"Could not find version {version} of model {spec.name}"
                )
            known = {version: known[version]}
        if not known:
            raise RequestError("NOT_FOUND", f"Could not find any versions of model {spec.name}")
        newest_first = [known[version] for version in sorted(known, reverse=True)]
        return get_model_status_pb2.GetModelStatusResponse(model_version_status=newest_first)

    def _poll(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            for config in self.configs.values():
                try:
                    self._update(config)
                except OSError as error:  # the folder is out of reach for now
                    print(f"align-tf: {config.base_path}: {error}", file=sys.stderr)

    def _update(self, config: ModelConfig) -> None:
        """Loads the versions that are missing, then lets go of those no longer wanted.

        A version that fails is tried again at the next poll: it may be half copied. As long as
        nothing that is wanted is available, what was served before stays.
        """
        folders = config.folders()
        for version, folder in folders.items():
            if version not in self._available[config.name]:
                self._load(config.name, version, folder)
        served, statuses = self._available[config.name], self._statuses[config.name]
        wanted = {version: served[version] for version in folders if version in served}
        if wanted:
            self._available[config.name] = wanted
            for version in served.keys() - wanted.keys():
                statuses[version] = _version_status(version, VersionStatus.END)
        for version in statuses.keys() - folders.keys():
            if statuses[version].state == VersionStatus.LOADING:
                del statuses[version]  # it never loaded, and its folder is gone

    def _load(self, name: str, version: int, folder: pathlib.Path) -> None:
        statuses = self._statuses[name]
        failed_before = statuses.get(version)
        if failed_before is None or failed_before.state == VersionStatus.END:
            statuses[version] = _version_status(version, VersionStatus.LOADING)
        try:
            servable = Servable(folder, name, version, self.metrics, self.batcher)
        except (tf.errors.OpError, RequestError, RuntimeError, OSError, ValueError) as error:
            code = error.error_code if isinstance(error, tf.errors.OpError) else tf.errors.UNKNOWN
            message = str(getattr(error, "message", error))
            statuses[version] = _version_status(version, VersionStatus.LOADING, code, message)
            if failed_before is None and self._poller.is_alive():
                print(f"align-tf: {folder} does not load: {message}", file=sys.stderr)
            return
        # A new dict each time, so that a request sees one or the other.
        self._available[name] = {**self._available[name], version: servable}
        statuses[version] = _version_status(version, VersionStatus.AVAILABLE)
