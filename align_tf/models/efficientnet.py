"""EfficientNet, the image tower: stage table, compound scaling, MBConv block.

Architecture: arXiv 1905.11946. Details that differ between implementations follow
Hugging Face's modeling_align.py.
"""

import dataclasses
from typing import Any, TypeVar

import keras
from keras import layers, ops

from align_tf.configuration.blocks import BlockSpec
from align_tf.configuration.vision import AlignVisionConfig
from align_tf.models import fused_training
from align_tf.models.activation import get_activation
from align_tf.models.configured import Configured
from align_tf.models.freezing import KeepsFrozen
from align_tf.models.ghost_batch_norm import GhostBatchNormalization
from align_tf.models.initialization import kernel_initializer

Block = TypeVar("Block", bound="MBConvBlock")


def conv(config: AlignVisionConfig, filters: int, kernel_size: int, **options: Any) -> layers.Layer:
    """Returns a convolution with the tower's initializer."""
    initializer = kernel_initializer(config)
    return layers.Conv2D(filters, kernel_size, kernel_initializer=initializer, **options)


def batch_norm(config: AlignVisionConfig, **options: Any) -> layers.Layer:
    """Returns a BatchNorm with the tower's momentum and epsilon."""
    options |= {"momentum": config.batch_norm_momentum, "epsilon": config.batch_norm_eps}
    if config.virtual_batch_size is not None:
        return GhostBatchNormalization(config.virtual_batch_size, **options)
    return layers.BatchNormalization(**options)


@keras.saving.register_keras_serializable(package="align_tf")
class MBConvBlock(Configured, KeepsFrozen, layers.Layer):
    """Inverted bottleneck: expand, depthwise convolution, squeeze-and-excite, project.

    Args:
        config: the image tower's configuration.
        spec: this block's row of `block_table`.
    """

    config_class = AlignVisionConfig

    def __init__(self, config: AlignVisionConfig, spec: BlockSpec, *, name: str, dtype: Any = None):
        super().__init__(name=name, dtype=dtype)
        self.config = config
        self.spec = spec
        options = {"dtype": self.dtype_policy}
        self.activation = get_activation(config.hidden_act)
        self.expanded = spec.in_channels * spec.expand_ratio
        squeezed = max(1, int(spec.in_channels * config.squeeze_expansion_ratio))

        if spec.expand_ratio != 1:
            self.expand_conv = conv(
                config, self.expanded, 1, use_bias=False, name="expand_conv", **options
            )
            self.expand_bn = batch_norm(config, name="expand_bn", **options)
        if spec.stride == 2:
            # Hugging Face pads (k//2 - 1, k//2) whatever the input's size, where "same" would
            # look at it; blocks in depthwise_padding have k//2 on both sides.
            after = spec.kernel_size // 2
            before = after if spec.square_padding else after - 1
            self.depthwise_pad = layers.ZeroPadding2D(
                ((before, after), (before, after)), name="depthwise_pad", **options
            )
        self.depthwise_conv = layers.DepthwiseConv2D(
            spec.kernel_size,
            strides=spec.stride,
            padding="valid" if spec.stride == 2 else "same",
            use_bias=False,
            depthwise_initializer=kernel_initializer(config),
            name="depthwise_conv",
            **options,
        )
        self.depthwise_bn = batch_norm(config, name="depthwise_bn", **options)
        self.se_squeeze = layers.GlobalAveragePooling2D(keepdims=True, name="se_squeeze", **options)
        self.se_reduce = conv(
            config, squeezed, 1, activation=self.activation, name="se_reduce", **options
        )
        self.se_expand = conv(
            config, self.expanded, 1, activation="sigmoid", name="se_expand", **options
        )
        self.project_conv = conv(
            config, spec.out_channels, 1, use_bias=False, name="project_conv", **options
        )
        self.project_bn = batch_norm(config, name="project_bn", **options)
        if spec.residual:
            # Drop-connect: a whole sample's branch is dropped (arXiv 1603.09382).
            self.drop_connect = layers.Dropout(
                spec.drop_rate, noise_shape=(None, 1, 1, 1), name="drop_connect", **options
            )

    @property
    def batch_norms(self) -> tuple[str, ...]:
        """The names of the block's BatchNorms."""
        norms = ("depthwise_bn", "project_bn")
        return norms if self.spec.expand_ratio == 1 else ("expand_bn", *norms)

    def build(self, input_shape: Any = None) -> None:
        narrow = (None, None, None, self.spec.in_channels)
        wide = (None, None, None, self.expanded)
        if self.spec.expand_ratio != 1:
            self.expand_conv.build(narrow)
            self.expand_bn.build(wide)
        if self.spec.stride == 2:
            self.depthwise_pad.build(wide)
        self.depthwise_conv.build(wide)
        self.depthwise_bn.build(wide)
        self.se_reduce.build((None, 1, 1, self.expanded))
        self.se_expand.build((None, 1, 1, self.se_reduce.filters))
        self.project_conv.build(wide)
        self.project_bn.build((None, None, None, self.spec.out_channels))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "spec": dataclasses.asdict(self.spec)}

    @classmethod
    def from_config(cls: type[Block], config: dict[str, Any]) -> Block:
        return super().from_config({**config, "spec": BlockSpec(**config["spec"])})

    def call(self, inputs: Any, training: bool = False, keep_rate: Any = None) -> Any:
        """Takes (n, h, w, in_channels) to (n, h', w', out_channels).

        Args:
            inputs: the images' features.
            training: drop branches, and normalise by the batch's statistics.
            keep_rate: the chance of a branch to stay, as a tensor, where a loop over blocks has
                one for each; None takes the block's own.
        """
        if training and fused_training.can_fuse(self.activation, self.depthwise_bn, inputs):
            x = fused_training.branch(self, inputs)
        else:
            x = self.branch(inputs, training)
        if self.spec.residual:
            x = inputs + self._drop(x, training, keep_rate)
        return x

    def _drop(self, x: Any, training: bool, keep_rate: Any) -> Any:
        if keep_rate is None:
            return self.drop_connect(x, training=training)
        shape, seed = (ops.shape(x)[0], 1, 1, 1), self.drop_connect.seed_generator
        kept = keras.random.uniform(shape, dtype="float32", seed=seed) < keep_rate
        return ops.where(kept, x / ops.cast(keep_rate, x.dtype), 0)

    def branch(self, x: Any, training: bool = False) -> Any:
        """Takes (n, h, w, in_channels) to (n, h', w', out_channels)."""
        if self.spec.expand_ratio != 1:
            x = self.activation(self.expand_bn(self.expand_conv(x), training=training))
        if self.spec.stride == 2:
            x = self.depthwise_pad(x)
        x = self.depthwise_conv(x)
        x = self.activation(self.depthwise_bn(x, training=training))
        x = x * self.se_expand(self.se_reduce(self.se_squeeze(x)))
        return self.project_bn(self.project_conv(x), training=training)
