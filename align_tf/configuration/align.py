"""The configuration of the joint model, over those of its two towers."""

import copy
import dataclasses
from typing import Any, ClassVar

from align_tf.configuration.checks import (
    is_finite,
    require,
    require_positive_integers,
    require_positive_numbers,
)
from align_tf.configuration.config_file import ConfigFile
from align_tf.configuration.presets import PRESETS
from align_tf.configuration.text import AlignTextConfig
from align_tf.configuration.vision import AlignVisionConfig


@dataclasses.dataclass(kw_only=True)
class AlignConfig(ConfigFile):
    """Configuration of the joint model.

    Arguments and defaults are those of Hugging Face's `AlignConfig`, and two more.

    Args:
        text_config: configuration of the text tower, or its dict.
        vision_config: configuration of the image tower, or its dict.
        projection_dim: width of the joint embedding space.
        temperature_init_value: initial value of the learned temperature.
        initializer_range: standard deviation of the initializers.
        image_projection: ends the image tower in a dense layer of `projection_dim`, as the
            original implementation does for towers other than B7. Hugging Face has none.
        logit_bias_init_value: initial value of the learned bias of the logits, which goes with
            the pairwise sigmoid loss; None for the contrastive loss. Hugging Face has none.
        extra: the keys this package does not know.
    """

    model_type: ClassVar[str] = "align"

    text_config: AlignTextConfig | dict | None = None
    vision_config: AlignVisionConfig | dict | None = None
    projection_dim: int = 640
    temperature_init_value: float = 1.0
    initializer_range: float = 0.02
    image_projection: bool = False
    logit_bias_init_value: float | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text_config, AlignTextConfig):
            self.text_config = AlignTextConfig.from_dict(self.text_config or {})
        if not isinstance(self.vision_config, AlignVisionConfig):
            self.vision_config = AlignVisionConfig.from_dict(self.vision_config or {})
        require_positive_integers(self, ("projection_dim",))
        require_positive_numbers(self, ("temperature_init_value",))
        bias = self.logit_bias_init_value
        require(
            bias is None or is_finite(bias),
            "logit_bias_init_value",
            bias,
            "a number, or nothing for the contrastive loss",
        )
        require(
            self.image_projection or self.projection_dim == self.vision_config.embed_dim,
            "projection_dim",
            self.projection_dim,
            f"{self.vision_config.embed_dim}, the channels that the image tower ends in, "
            "or image_projection=True",
        )

    @classmethod
    def from_text_vision_configs(
        cls, text_config: AlignTextConfig, vision_config: AlignVisionConfig, **kwargs: Any
    ) -> "AlignConfig":
        """Builds a joint configuration from those of the two towers.

        Args:
            text_config: configuration of the text tower.
            vision_config: configuration of the image tower.
            **kwargs: the other arguments of `AlignConfig`.

        Returns:
            A joint configuration.
        """
        return cls(text_config=text_config, vision_config=vision_config, **kwargs)

    @classmethod
    def from_preset(cls, name: str) -> "AlignConfig":
        """Returns the configuration of a named architecture, for training from scratch.

        Args:
            name: one of the keys of `PRESETS`.

        Returns:
            A new joint configuration.

        Raises:
            ValueError: there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
        text, vision, joint = copy.deepcopy(PRESETS[name])
        return cls(text_config=text, vision_config=vision, **joint)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as config.json holds it, unknown keys included."""
        values = super().to_dict()
        values["text_config"] = self.text_config.to_dict()
        values["vision_config"] = self.vision_config.to_dict()
        if not self.image_projection:
            del values["image_projection"]
        if self.logit_bias_init_value is None:
            del values["logit_bias_init_value"]
        return values
