"""The configuration of the image tower, an EfficientNet."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

from align_tf.configuration.checks import (
    is_positive_integer,
    require,
    require_activation,
    require_positive_integers,
    require_positive_numbers,
    require_rates,
)
from align_tf.configuration.config_file import ConfigFile, jsonable_activation

VISION_ACTIVATIONS = ("swish", "gelu", "relu", "selu", "gelu_new", "silu", "mish")
POOLING_TYPES = ("mean", "max")

# The vision lists that state one value for each stage.
STAGE_LISTS = (
    "kernel_sizes",
    "in_channels",
    "out_channels",
    "strides",
    "num_block_repeats",
    "expand_ratios",
)


@dataclasses.dataclass(kw_only=True)
class AlignVisionConfig(ConfigFile):
    """Configuration of the image tower, an EfficientNet.

    Arguments and defaults are those of Hugging Face's `AlignVisionConfig`, and three more:
    `freeze_batch_norm` says whether BatchNorm trains; None leaves it to train in a new model and
    not in one from a checkpoint. `first_block_residual` gives the first block of a stage a
    residual too where its stride is 1 and its channels stay as many, as the original
    implementation does. It makes no difference to EfficientNet-B0 to B7, only to much narrower
    towers. `virtual_batch_size` has BatchNorm train by the statistics of so many images of a
    device's at a time (`GhostBatchNormalization`), 16 in the original. The lists hold one value
    for each stage, before scaling by width and depth. `extra` holds the keys this package does
    not know.
    """

    model_type: ClassVar[str] = "align_vision_model"
    joint_key: ClassVar[str] = "vision_config"
    derived_keys: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)

    num_channels: int = 3
    image_size: int = 600
    width_coefficient: float = 2.0
    depth_coefficient: float = 3.1
    depth_divisor: int = 8
    kernel_sizes: list[int] = dataclasses.field(default_factory=lambda: [3, 3, 5, 3, 5, 5, 3])
    in_channels: list[int] = dataclasses.field(
        default_factory=lambda: [32, 16, 24, 40, 80, 112, 192]
    )
    out_channels: list[int] = dataclasses.field(
        default_factory=lambda: [16, 24, 40, 80, 112, 192, 320]
    )
    depthwise_padding: list[int] = dataclasses.field(default_factory=list)
    strides: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 2, 2, 1, 2, 1])
    num_block_repeats: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 2, 3, 3, 4, 1])
    expand_ratios: list[int] = dataclasses.field(default_factory=lambda: [1, 6, 6, 6, 6, 6, 6])
    squeeze_expansion_ratio: float = 0.25
    hidden_act: str | Callable = "swish"
    hidden_dim: int = 2560
    pooling_type: str = "mean"
    initializer_range: float = 0.02
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.99
    drop_connect_rate: float = 0.2
    first_block_residual: bool = False
    freeze_batch_norm: bool | None = None
    virtual_batch_size: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for key in (*STAGE_LISTS, "depthwise_padding"):
            setattr(self, key, list(getattr(self, key)))
        require_positive_integers(self, ("num_channels", "depth_divisor", "hidden_dim"))
        require_rates(self, ("drop_connect_rate",))
        valid = self.freeze_batch_norm in (None, True, False)
        require(valid, "freeze_batch_norm", self.freeze_batch_norm, "true, false or nothing")
        size = self.virtual_batch_size
        require(
            size is None or is_positive_integer(size),
            "virtual_batch_size",
            size,
            "a positive integer or nothing",
        )
        require_activation(self.hidden_act, VISION_ACTIVATIONS)
        require(
            self.pooling_type in POOLING_TYPES,
            "pooling_type",
            self.pooling_type,
            f"one of {', '.join(POOLING_TYPES)}",
        )
        require_positive_numbers(
            self, ("width_coefficient", "depth_coefficient", "squeeze_expansion_ratio")
        )
        self._check_stages()

    def _check_stages(self) -> None:
        stages = len(self.in_channels)
        for key in STAGE_LISTS:
            values = getattr(self, key)
            require(len(values) == stages, key, values, f"{stages} values, one for each stage")
            require(all(map(is_positive_integer, values)), key, values, "positive integers")
        require(stages > 0, "in_channels", self.in_channels, "at least one stage")
        # The reference pads before a stride of 2 and cannot take a longer one.
        require(set(self.strides) <= {1, 2}, "strides", self.strides, "1 or 2 for each stage")
        previous = ("the stem's output", self.stem_channels)
        for stage in range(stages):
            require(
                self.round_filters(self.in_channels[stage]) == previous[1],
                f"in_channels[{stage}]",
                self.in_channels[stage],
                f"a stage that chains: {previous[0]} has {previous[1]} channels after scaling",
            )
            scaled = self.round_filters(self.out_channels[stage])
            previous = (f"out_channels[{stage}]", scaled)
        require(
            not isinstance(self.image_size, int) or self.image_size >= self.least_side,
            "image_size",
            self.image_size,
            f"{self.least_side} or more, of which a pixel is left after the last block",
        )

    def round_filters(self, channels: int) -> int:
        """Scales a channel count by the width and rounds it to the divisor.

        Args:
            channels: channels before scaling.

        Returns:
            A multiple of `depth_divisor` that is not under 90 % of the scaled count
            (EfficientNet, arXiv 1905.11946; TPU reference `round_filters`).
        """
        divisor = self.depth_divisor
        scaled = channels * self.width_coefficient
        rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
        if rounded < 0.9 * scaled:
            rounded += divisor
        return int(rounded)

    def round_repeats(self, repeats: int) -> int:
        """Scales the number of blocks of a stage by the depth."""
        return math.ceil(self.depth_coefficient * repeats)

    @property
    def stem_channels(self) -> int:
        """Channels after the stem."""
        return self.round_filters(32)

    @property
    def embed_dim(self) -> int:
        """Channels after the last stage: the width of the image embedding."""
        return self.round_filters(self.out_channels[-1])

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of all stages after scaling by the depth."""
        return sum(self.round_repeats(n) for n in self.num_block_repeats)

    @property
    def least_side(self) -> int:
        """The least height and width of an image: one pixel of it is left after the last block."""
        margins, block = [2], 0  # of each stride of 2: what its kernel is larger than its padding
        stages = zip(self.kernel_sizes, self.strides, self.num_block_repeats, strict=True)
        for kernel_size, stride, repeats in stages:
            if stride == 2:
                square = block in self.depthwise_padding
                margins.append(kernel_size - 2 * (kernel_size // 2) + (not square))
            block += self.round_repeats(repeats)
        side = 1
        for margin in reversed(margins):
            side = max(1, 2 * (side - 1) + margin)
        return side

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as config.json holds it, unknown keys included."""
        values = super().to_dict()
        values["hidden_act"] = jsonable_activation(self.hidden_act)
        if not self.first_block_residual:
            del values["first_block_residual"]
        if self.freeze_batch_norm is None:
            del values["freeze_batch_norm"]
        if self.virtual_batch_size is None:
            del values["virtual_batch_size"]
        return values
