"""Configurations of the ALIGN towers and of the joint model, and the presets."""

import copy
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

from align_tf import files, hub

CONFIG_NAME = "config.json"

TEXT_ACTIVATIONS = ("gelu", "relu", "silu", "swish", "gelu_new")
VISION_ACTIVATIONS = ("swish", "gelu", "relu", "selu", "gelu_new", "silu", "mish")
POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")
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


def _require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {expected}")


def _require_activation(value: Any, known: tuple[str, ...]) -> None:
    valid = value in known if isinstance(value, str) else callable(value)
    _require(valid, "hidden_act", value, f"one of {', '.join(known)}, or a callable")


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require_positive_integers(config: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(_is_positive_integer(value), key, value, "a positive integer")


def _require_positive_numbers(config: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(config, key)
        valid = isinstance(value, (int, float)) and value > 0
        _require(valid, key, value, "a positive number")


def _require_rates(config: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(config, key)
        valid = isinstance(value, (int, float)) and 0 <= value < 1
        _require(valid, key, value, "a rate in [0, 1)")


def _jsonable_activation(value: str | Callable) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"hidden_act={value!r}: a callable cannot be written to {CONFIG_NAME}; "
            "expected the name of an activation"
        )
    return value


class _ConfigFile:
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
    def from_dict(cls, values: dict[str, Any]) -> "_ConfigFile":
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
        if cls.joint_key is not None and cls.joint_key in values:
            values = values[cls.joint_key] or {}
        found = values.pop("model_type", None) or cls.model_type
        _require(found == cls.model_type, "model_type", found, repr(cls.model_type))
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields = {key: value for key, value in values.items() if key in known}
        extra = {k: v for k, v in values.items() if k not in known and k not in cls.derived_keys}
        return cls(**fields, extra=extra)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "_ConfigFile":
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
            ValueError: config.json is not valid.
        """
        folder = hub.resolve_folder(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls.from_dict(files.read_json(folder / CONFIG_NAME))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `config.json` into `folder`, which is made if it is not there."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        files.write_text(pathlib.Path(folder) / CONFIG_NAME, text)


@dataclasses.dataclass(kw_only=True)
class AlignTextConfig(_ConfigFile):
    """Configuration of the text tower, a BERT encoder.

    Arguments and defaults are those of Hugging Face's `AlignTextConfig`; `use_cache` is kept
    and has no effect in an encoder. `pruned_heads` maps a layer's index to the heads that
    were taken out of it. `extra` holds the keys this package does not know.
    """

    model_type: ClassVar[str] = "align_text_model"
    joint_key: ClassVar[str] = "text_config"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str | Callable = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    use_cache: bool = True
    pruned_heads: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # JSON has no integer keys.
        self.pruned_heads = {int(k): sorted(set(v)) for k, v in (self.pruned_heads or {}).items()}
        _require_positive_integers(
            self,
            (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
                "type_vocab_size",
            ),
        )
        _require_rates(self, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
        _require_activation(self.hidden_act, TEXT_ACTIVATIONS)
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_attention_heads={self.num_attention_heads}",
        )
        _require(
            self.position_embedding_type in POSITION_EMBEDDING_TYPES,
            "position_embedding_type",
            self.position_embedding_type,
            f"one of {', '.join(POSITION_EMBEDDING_TYPES)}",
        )
        for layer, heads in self.pruned_heads.items():
            valid = layer in range(self.num_hidden_layers)
            valid = valid and set(heads) < set(range(self.num_attention_heads))
            _require(
                valid,
                f"pruned_heads[{layer}]",
                heads,
                f"a layer below {self.num_hidden_layers} and some, not all, of its "
                f"{self.num_attention_heads} heads",
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as config.json holds it, unknown keys included."""
        values = super().to_dict()
        values["hidden_act"] = _jsonable_activation(self.hidden_act)
        return values


@dataclasses.dataclass(kw_only=True)
class AlignVisionConfig(_ConfigFile):
    """Configuration of the image tower, an EfficientNet.

    Arguments and defaults are those of Hugging Face's `AlignVisionConfig`, and two more:
    `freeze_batch_norm` says whether BatchNorm trains; None leaves it to train in a new model and
    not in one from a checkpoint. `first_block_residual` gives the first block of a stage a
    residual too where its stride is 1 and its channels stay as many, as the original
    implementation does. It makes no difference to EfficientNet-B0 to B7, only to much narrower
    towers. The lists hold one value for each stage, before scaling by width and depth. `extra`
    holds the keys this package does not know.
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
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for key in (*STAGE_LISTS, "depthwise_padding"):
            setattr(self, key, list(getattr(self, key)))
        _require_positive_integers(self, ("num_channels", "depth_divisor", "hidden_dim"))
        _require_rates(self, ("drop_connect_rate",))
        valid = self.freeze_batch_norm in (None, True, False)
        _require(valid, "freeze_batch_norm", self.freeze_batch_norm, "true, false or nothing")
        _require_activation(self.hidden_act, VISION_ACTIVATIONS)
        _require(
            self.pooling_type in POOLING_TYPES,
            "pooling_type",
            self.pooling_type,
            f"one of {', '.join(POOLING_TYPES)}",
        )
        _require_positive_numbers(
            self, ("width_coefficient", "depth_coefficient", "squeeze_expansion_ratio")
        )
        self._check_stages()

    def _check_stages(self) -> None:
        stages = len(self.in_channels)
        for key in STAGE_LISTS:
            values = getattr(self, key)
            _require(len(values) == stages, key, values, f"{stages} values, one for each stage")
            _require(all(map(_is_positive_integer, values)), key, values, "positive integers")
        _require(stages > 0, "in_channels", self.in_channels, "at least one stage")
        # The reference pads before a stride of 2 and cannot take a longer one.
        _require(set(self.strides) <= {1, 2}, "strides", self.strides, "1 or 2 for each stage")
        previous = ("the stem's output", self.stem_channels)
        for stage in range(stages):
            _require(
                self.round_filters(self.in_channels[stage]) == previous[1],
                f"in_channels[{stage}]",
                self.in_channels[stage],
                f"a stage that chains: {previous[0]} has {previous[1]} channels after scaling",
            )
            scaled = self.round_filters(self.out_channels[stage])
            previous = (f"out_channels[{stage}]", scaled)

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

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as config.json holds it, unknown keys included."""
        values = super().to_dict()
        values["hidden_act"] = _jsonable_activation(self.hidden_act)
        if not self.first_block_residual:
            del values["first_block_residual"]
        if self.freeze_batch_norm is None:
            del values["freeze_batch_norm"]
        return values


@dataclasses.dataclass(kw_only=True)
class AlignConfig(_ConfigFile):
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
        _require_positive_integers(self, ("projection_dim",))
        _require_positive_numbers(self, ("temperature_init_value",))
        bias = self.logit_bias_init_value
        _require(
            bias is None or (isinstance(bias, (int, float)) and math.isfinite(bias)),
            "logit_bias_init_value",
            bias,
            "a number, or nothing for the contrastive loss",
        )
        _require(
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


# Presets: only what differs from the defaults.
# name: (text_config, vision_config, joint)
PRESETS = {
    "align-base": (
        {},
        {"image_size": 289, "hidden_dim": 640},
        {},
    ),
    # The original's small pair: EfficientNet-B3 and BERT-mini.
    "align-mini": (
        {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
        {
            "image_size": 289,
            "width_coefficient": 1.2,
            "depth_coefficient": 1.4,
            "hidden_dim": 384,
        },
        {"image_projection": True},
    ),
    # The paper's best: EfficientNet-L2 and BERT-large.
    "align-large": (
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        {
            "image_size": 289,
            "width_coefficient": 4.3,
            "depth_coefficient": 5.3,
            "hidden_dim": 1376,
        },
        {"projection_dim": 1376},
    ),
    # The bundled model: small pictures, a vocabulary of its own, early strides for speed.
    "align-tiny": (
        {
            "vocab_size": 6000,
            "hidden_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "intermediate_size": 768,
            "max_position_embeddings": 64,
        },
        {
            "image_size": 96,
            "width_coefficient": 0.6,
            "depth_coefficient": 0.6,
            "strides": [2, 2, 1, 2, 1, 2, 1],
            "expand_ratios": [1, 4, 6, 6, 6, 6, 6],
            "hidden_dim": 192,
        },
        {"projection_dim": 192},
    ),
}
