"""Reading and writing of config.json, which the three configurations share."""

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from align_tf import addresses, files, hub
from align_tf.configuration.checks import require

CONFIG_NAME = "config.json"

Config = TypeVar("Config", bound="ConfigFile")


def jsonable_activation(value: str | Callable) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"hidden_act={value!r}: a callable cannot be written to {CONFIG_NAME}; "
            "expected the name of an activation"
        )
    return value


class ConfigFile:
    """Reading and writing of config.json, shared by the three configurations."""

    model_type: ClassVar[str]
    # The key under which a joint config.json holds this tower; None for the joint one.
    joint_key: ClassVar[str | None] = None
    # Keys that are computed here, so a value read from a file is dropped.
    derived_keys: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as config.json holds it, unknown keys included."""
        fields = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        extra = fields.pop("extra")
        derived = {key: getattr(self, key) for key in self.derived_keys}
        return {**extra, **fields, **derived, "model_type": self.model_type}

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Builds the configuration from a dict as `config.json` holds it.

        Args:
            values: the keys of `config.json`. A tower also accepts the dict of a joint
                configuration. Unknown keys are kept and written back by `to_dict`.

        Returns:
            A configuration.

        Raises:
            ValueError: a value is out of range, or the dict is of another model.
        """
        values = copy.deepcopy(values)
        with files.values_of(CONFIG_NAME):
            if cls.joint_key is not None and cls.joint_key in values:
                values = values[cls.joint_key] or {}
            found = values.pop("model_type", None) or cls.model_type
            require(found == cls.model_type, "model_type", found, repr(cls.model_type))
            known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
            fields = {key: value for key, value in values.items() if key in known}
            kept = values.keys() - known - set(cls.derived_keys)
            return cls(**fields, extra={key: values[key] for key in values if key in kept})

    @classmethod
    @hub.names_options
    def from_pretrained(
        cls: type[Config],
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> Config:
        """Reads the configuration of a checkpoint.

        Args:
            name_or_path: a checkpoint folder, a Hugging Face id such as `kakaobrain/align-base`,
                or `align-tiny`, which comes with this package.
            revision: branch, tag or commit on the hub.
            token: access token of the hub.
            cache_dir: the hub's cache folder.
            local_files_only: never ask the hub, use its cache.

        Returns:
            A configuration.

        Raises:
            FileNotFoundError: there is no such checkpoint, or it has no config.json.
            TypeError: an option is not known; the message says what to use in its place.
            ValueError: config.json is not valid.
        """
        folder = hub.resolve_settings(
            name_or_path,
            (CONFIG_NAME,),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls.from_dict(files.read_json(folder / CONFIG_NAME))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `config.json` into `folder`, which is made if it is not there."""
        files.write_text(addresses.place(folder) / CONFIG_NAME, self.to_json_string())

    def to_json_string(self) -> str:
        """Returns the configuration as the text of `config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
