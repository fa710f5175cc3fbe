"""What is served: the versions that are loaded, kept in step with the folders."""

import dataclasses
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterable

import tensorflow as tf
from tensorflow.core.protobuf.error_codes_pb2 import Code
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_pb2,
)

from align_tf.server.batching import Batcher
from align_tf.server.model_config import ModelConfig
from align_tf.server.prometheus import Metrics
from align_tf.server.servable import Servable
from align_tf.server.status_codes import RequestError, invalid_argument

VersionStatus = get_model_status_pb2.ModelVersionStatus

POLL_SECONDS = 1.0
# A version that failed is tried again when its folder has changed; and as TensorFlow Serving does
# (--max_num_load_retries, --load_retry_interval_micros) without that, as memory may come free.
LOAD_RETRIES = 5
LOAD_RETRY_SECONDS = 60.0


@dataclasses.dataclass
class _Failure:
    """A version that did not load."""

    folder: frozenset  # as it was then
    retries: int
    due: float  # when it is tried again though the folder is the same

    def is_due(self, folder: pathlib.Path) -> bool:
        """Tells whether it is time to load the folder again."""
        retried = self.retries < LOAD_RETRIES and time.monotonic() >= self.due
        return retried or _state_of(folder) != self.folder


def _state_of(folder: pathlib.Path) -> frozenset:
    """Returns what tells whether files of a folder have changed."""
    found = set()
    for path, _, names in os.walk(folder, followlinks=True):
        for file in (os.path.join(path, name) for name in names):
            try:
                stat = os.stat(file)
            except OSError:  # it has just gone
                continue
            found.add((file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return frozenset(found)


def _version_status(version: int, state: int, code: int = 0, message: str = "") -> VersionStatus:
    status = VersionStatus(version=version, state=state)
    status.status.error_code, status.status.error_message = code, message
    return status


def _told(error: Exception) -> tuple[int, str]:
    """Returns the status code and the message of what a load fails with."""
    if isinstance(error, tf.errors.OpError):
        return error.error_code, error.message
    if isinstance(error, RequestError):
        return Code.Value(error.code), error.message
    return tf.errors.UNKNOWN, str(error) or type(error).__name__


def _in_one_line(message: str) -> str:
    return " ".join(message.split())


class Servables:
    """The versions that are served, kept in step with the folders."""

    def __init__(
        self, configs: Iterable[ModelConfig], metrics: Metrics, batcher: Batcher | None = None
    ):
        self.metrics, self.batcher = metrics, batcher
        self.configs = {config.name: config for config in configs}
        self._available: dict[str, dict[int, Servable]] = {name: {} for name in self.configs}
        self._statuses: dict[str, dict[int, VersionStatus]] = {name: {} for name in self.configs}
        self._failures: dict[str, dict[int, _Failure]] = {name: {} for name in self.configs}
        self._stopped = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="poll-versions", daemon=True)

    def start(self) -> None:
        """Loads every model, then watches the folders.

        Raises:
            FileNotFoundError: a folder has no version to serve.
            ValueError: a version cannot be loaded, or a label points at one that is not served.
        """
        for config in self.configs.values():
            if not config.folders() and (there := config.versions_there()):
                raise FileNotFoundError(
                    f"{config.base_path}: no version of {sorted(config.specific)} to serve as "
                    f"{config.name}; there are {sorted(there)}"
                )
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
                        f"{_in_one_line(status.status.error_message)}"
                    )
            for label, version in config.labels.items():
                if version not in self._available[config.name]:
                    raise ValueError(
                        f"model {config.name}: label {label} points at version {version}, which "
                        f"is not served; served are {sorted(self._available[config.name])}"
                    )
        self._poller.start()

    def stop(self, seconds: float | None = None) -> None:
        """Stops watching and lets go of the models; calls in flight keep theirs to the end.

        Args:
            seconds: that a version which is being loaded has at most.
        """
        self._stopped.set()
        if self._poller.is_alive():
            self._poller.join(seconds)
        self._available = {name: {} for name in self.configs}

    @property
    def loads(self) -> bool:
        """Whether a version is still being loaded after the stop."""
        return self._poller.is_alive()

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
        told: dict[str, str] = {}  # model: what it fails with
        while not self._stopped.wait(POLL_SECONDS):
            for config in self.configs.values():
                try:
                    self._update(config)
                    told.pop(config.name, None)
                except Exception as error:  # the folder may be out of reach for now
                    _, message = _told(error)
                    if told.get(config.name) != message:
                        told[config.name] = message
                        line = f"align-tf: {config.base_path}: {_in_one_line(message)}"
                        print(line, file=sys.stderr)

    def _update(self, config: ModelConfig) -> None:
        """Loads the versions that are missing, then lets go of those no longer wanted.

        A version that fails fails alone, and is tried again once it is due. As long as nothing
        that is wanted is available, what was served before stays, while its folder does.
        """
        folders, failures = config.folders(), self._failures[config.name]
        for version, folder in folders.items():
            failed = failures.get(version)
            if version not in self._available[config.name] and (
                failed is None or failed.is_due(folder)
            ):
                self._load(config.name, version, folder)
        served, statuses = self._available[config.name], self._statuses[config.name]
        wanted = {version: served[version] for version in folders if version in served}
        there = config.versions_there()
        if not wanted and there is not None:
            wanted = {version: served[version] for version in served if version in there}
        if wanted or there is not None:
            self._available[config.name] = wanted
            for version in served.keys() - wanted.keys():
                statuses[version] = _version_status(version, VersionStatus.END)
        for version in failures.keys() - folders.keys():  # it never loaded, and has gone
            del failures[version], statuses[version]

    def _load(self, name: str, version: int, folder: pathlib.Path) -> None:
        statuses, failures = self._statuses[name], self._failures[name]
        failed, state = failures.get(version), _state_of(folder)
        if failed is None:
            statuses[version] = _version_status(version, VersionStatus.LOADING)
        try:
            servable = Servable(folder, name, version, self.metrics, self.batcher)
        except Exception as error:  # a broken SavedModel may raise anything
            code, message = _told(error)
            statuses[version] = _version_status(version, VersionStatus.END, code, message)
            same = failed is not None and failed.folder == state
            retries = failed.retries + 1 if same else 0
            failures[version] = _Failure(state, retries, time.monotonic() + LOAD_RETRY_SECONDS)
            if failed is None and self._poller.is_alive():
                line = f"align-tf: {folder} does not load: {_in_one_line(message)}"
                print(line, file=sys.stderr)
            return
        failures.pop(version, None)
        # A new dict each time, so that a request sees one or the other.
        self._available[name] = {**self._available[name], version: servable}
        statuses[version] = _version_status(version, VersionStatus.AVAILABLE)
