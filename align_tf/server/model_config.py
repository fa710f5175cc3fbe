"""What to serve: TensorFlow Serving's model_config_list, version policy and labels."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from tensorflow_serving.config import model_server_config_pb2

from align_tf.server.protos import read_text_proto


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
        found = self._found() or {}
        if list(found.values()) == [self.base_path]:
            return found
        versions = sorted(found, reverse=True)
        if self.policy == "latest":
            versions = versions[: self.latest]
        elif self.policy == "specific":
            versions = [version for version in versions if version in self.specific]
        return {version: found[version] for version in versions}

    def versions_there(self) -> set[int] | None:
        """Returns the versions whose folders are there, served or not; None without base_path."""
        found = self._found()
        return None if found is None else set(found)

    def _found(self) -> dict[int, pathlib.Path] | None:
        path = self.base_path
        if (path / "saved_model.pb").is_file():
            return {1 if (version := _version(path.name)) is None else version: path}
        if not path.is_dir():
            return None
        return {
            version: entry
            for entry in sorted(path.iterdir())  # 1 comes after 0001
            if (version := _version(entry.name)) is not None and entry.is_dir()
        }


def _version(name: str) -> int | None:
    """Returns the version that a folder's name stands for, as in 3, 0 or 0003; None if none."""
    is_number = name.isascii() and name.isdecimal()
    return int(name) if is_number and int(name) < 2**63 else None


def read_model_config_file(path: str | os.PathLike) -> list[ModelConfig]:
    """Reads TensorFlow Serving's model_config_list.

    A base_path that is not absolute is taken from the file's own folder.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: the file does not parse, lists no model, one without a base_path, or one that is
            not TensorFlow's.
    """
    path = pathlib.Path(path)
    proto = read_text_proto(path, model_server_config_pb2.ModelServerConfig(), "model config")
    entries = proto.model_config_list.config
    configs = [_model_config(entry, path) for entry in entries]
    names = [config.name for config in configs]
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError(f"{path}: expected models with a name of their own each, got {names}")
    for entry in entries:
        if not entry.base_path:
            raise ValueError(f"{path}: model {entry.name}: expected a base_path")
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
