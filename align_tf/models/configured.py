"""Layers that a configuration makes: what Keras writes of one, and how it is made again."""

from typing import Any, ClassVar, TypeVar

Made = TypeVar("Made", bound="Configured")


class Configured:
    """A layer whose first argument is a tower's configuration, kept as `config`."""

    config_class: ClassVar[type]
    arguments: ClassVar[tuple[str, ...]] = ()  # those beside it, by the attributes that keep them

    def get_config(self) -> dict[str, Any]:
        arguments = {name: getattr(self, name) for name in self.arguments}
        return {**super().get_config(), "config": self.config.to_dict(), **arguments}

    @classmethod
    def from_config(cls: type[Made], config: dict[str, Any]) -> Made:
        config = dict(config)
        trainable = config.pop("trainable")
        layer = super().from_config(
            {**config, "config": cls.config_class.from_dict(config["config"])}
        )
        layer.trainable = trainable
        return layer
