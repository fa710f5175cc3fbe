"""The image tower: an EfficientNet without top convolution."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import layers, ops

from align_tf.checkpoints import name_table
from align_tf.configuration.blocks import block_table
from align_tf.configuration.vision import AlignVisionConfig
from align_tf.models import fused_training
from align_tf.models.activation import get_activation
from align_tf.models.block_loop import run_blocks
from align_tf.models.efficientnet import MBConvBlock, batch_norm, conv
from align_tf.models.exports import Exports
from align_tf.models.freezing import Tower
from align_tf.models.inputs import TakesNames, check_pixels
from align_tf.models.outputs import ModelOutput
from align_tf.models.pretrained import Pretrained
from align_tf.models.remat import rematerialize
from align_tf.models.sharded_state import whole


@keras.saving.register_keras_serializable(package="align_tf")
class AlignVisionModel(TakesNames, Exports, Pretrained, Tower, keras.Model):
    """The image tower: an EfficientNet without top convolution.

    It gives several outputs by name; see `AlignTextModel` for one of them in a larger model.

    Args:
        config: its configuration.
        name: the name of the model, and the first part of its weights' paths.
        dtype: a dtype or policy such as `mixed_bfloat16`; None takes Keras's global policy.
    """

    config_class = AlignVisionConfig
    table = name_table.VISION_TABLE
    prefix = "vision_model."
    unused = name_table.UNUSED_BY_VISION_TOWER
    input_names = ("pixel_values",)

    def __init__(
        self, config: AlignVisionConfig, *, name: str = "vision_model", dtype: Any = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self._check_config(config)
        self.config = config = copy.deepcopy(config)
        options = {"dtype": self.dtype_policy}
        self.activation = get_activation(config.hidden_act)
        self.stem_pad = layers.ZeroPadding2D(((0, 1), (0, 1)), name="stem_pad", **options)
        self.stem_conv = conv(
            config, config.stem_channels, 3, strides=2, use_bias=False, name="stem_conv", **options
        )
        self.stem_bn = batch_norm(config, name="stem_bn", **options)
        self.blocks = [
            MBConvBlock(config, spec, name=f"block_{index}", **options)
            for index, spec in enumerate(block_table(config))
        ]
        self.remat = False
        self.loop_blocks = False  # see `block_loop`
        self.build()
        self._set_batch_norm(frozen=bool(config.freeze_batch_norm))
        self._remember_layers()

    def build(self, input_shape: Any = None) -> None:
        self.stem_pad.build((None, None, None, self.config.num_channels))
        self.stem_conv.build((None, None, None, self.config.num_channels))
        self.stem_bn.build((None, None, None, self.config.stem_channels))
        for block in self.blocks:
            block.build()

    def call(
        self, inputs: Any, output_hidden_states: bool = False, training: bool = False
    ) -> ModelOutput:
        """Encodes images of any size that the tower's strides leave a pixel of.

        Args:
            inputs: `pixel_values` float (n, h, w, 3), or a dict that holds it.
            output_hidden_states: also return `hidden_states`, those after the stem and after
                each block, each (n, h', w', c).
            training: apply drop-connect, and BatchNorm by the batch's statistics.

        Returns:
            `last_hidden_state` (n, h', w', embed_dim) and `pooler_output` (n, embed_dim),
            float32.

        Raises:
            ValueError: the images are not floats with the channels last, or are smaller than
                the configuration's `least_side`.
        """
        x = inputs["pixel_values"] if isinstance(inputs, dict) else inputs
        x, given = self._one_or_more(self._large_enough(x), training)
        x = self.stem_conv(self.stem_pad(x))
        if training and fused_training.can_fuse(self.activation, self.stem_bn, x):
            x = fused_training.normalize_swish(self.stem_bn, x)
        else:
            x = self.activation(self.stem_bn(x, training=training))
        hidden_states = [given(x)]
        if training and self.loop_blocks and not output_hidden_states:
            x = run_blocks(self.blocks, x, keep_inputs_alone=self.remat)
        else:
            for block in self.blocks:
                run = (rematerialize if self.remat and training else whole)(block)
                x = run(x, training=training)
                hidden_states.append(given(x))

        x = given(x)
        pool = ops.mean if self.config.pooling_type == "mean" else ops.max
        pooled = pool(ops.cast(x, "float32"), axis=(1, 2))
        output = ModelOutput(last_hidden_state=x, pooler_output=pooled)
        if output_hidden_states:
            output["hidden_states"] = tuple(hidden_states)
        return output

    @property
    def output_shape(self) -> dict[str, Any]:
        """The shapes of the outputs by name, None for what depends on the inputs."""
        width = self.config.embed_dim
        return {"last_hidden_state": (None, None, None, width), "pooler_output": (None, width)}

    def _check_inputs(self, inputs: Any) -> None:
        if not isinstance(inputs, dict):
            inputs = {"pixel_values": inputs}
        if inputs.get("pixel_values") is None:
            raise ValueError(f"inputs {', '.join(inputs) or 'of none'}: expected pixel_values")
        config = self.config
        check_pixels(inputs["pixel_values"], config.num_channels, config.least_side)

    def _large_enough(self, x: Any) -> Any:
        """Has a graph look at the sides that are known only when it runs.

        TensorFlow's convolutions by oneDNN give of an image smaller than their kernel, which
        leaves nothing, memory as they find it in the image's shape.
        """
        if keras.backend.backend() != "tensorflow" or None not in x.shape[1:3]:
            return x
        import tensorflow as tf

        least = self.config.least_side
        message = f"pixel_values: expected images of {least} x {least} pixels or more, found"
        sides = tf.shape(x)[1:3]
        check = tf.debugging.Assert(tf.reduce_all(sides >= least), [message, sides])
        with tf.control_dependencies([check]):
            return tf.identity(x)

    def _one_or_more(self, x: Any, training: bool) -> tuple[Any, Callable]:
        """Puts a black image in the place of none: oneDNN's convolutions fail on an empty batch.

        Of a batch with fewer images than replicas, some get none.

        Returns:
            The images, and what takes the rows of those that were given.
        """
        if keras.backend.backend() != "tensorflow" or x.shape[0]:
            return x, lambda y: y
        import tensorflow as tf

        rows = tf.shape(x)[0]
        moves = any(norm.trainable for _, norm in self._batch_norms())
        if training and moves:
            message = (
                "a replica without an image would move BatchNorm's averages: expected as many "
                "images in a batch as there are replicas, or freeze_batch_norm()"
            )
            tf.debugging.assert_positive(rows, message)
        black = tf.zeros([tf.maximum(1 - rows, 0), *tf.unstack(tf.shape(x))[1:]], x.dtype)
        # By operations from which LiteRT's converter learns the sizes.
        filled = tf.ensure_shape(tf.concat([x, black], axis=0), [None, *x.shape[1:]])
        slices = (tf.zeros(1, tf.int32), tf.reshape(rows, [1]), tf.ones(1, tf.int32))
        return filled, lambda y: tf.strided_slice(y, *slices)  # for all blocks' the same nodes

    def freeze_batch_norm(self) -> None:
        """Keeps every BatchNorm at its moving averages, scale and offset; compile again after it.

        It is the default of a model from `from_pretrained`; in a new one BatchNorm trains. A
        choice made by this method or by `unfreeze_batch_norm` is kept in `config.json`.
        """
        self.config.freeze_batch_norm = True
        self._set_batch_norm(frozen=True)

    def unfreeze_batch_norm(self, synchronized: bool = False) -> None:
        """Lets the BatchNorms train of those blocks that do; compile again after it.

        Args:
            synchronized: under `tf.distribute`, normalise by the statistics of all replicas
                instead of each by its own. Under JAX they are of the whole batch anyway.

        Raises:
            ValueError: LoRA is on, of which BatchNorm is no part.
        """
        if self.base_frozen:
            raise ValueError(
                "BatchNorm is no part of an adapter: expected unfreeze_batch_norm() after "
                "merge_adapter(), or no LoRA"
            )
        self.config.freeze_batch_norm = False
        self._set_batch_norm(frozen=False, synchronized=synchronized)

    def _set_batch_norm(self, *, frozen: bool, synchronized: bool = False) -> None:
        self.batch_norm = {"frozen": frozen, "synchronized": synchronized}
        self.kept_frozen = ("stem_bn",) if frozen else ()
        for block in self.blocks:
            block.kept_frozen = block.batch_norms if frozen else ()
        for owner, layer in self._batch_norms():
            layer.trainable = owner.trainable and not frozen
            layer.synchronized = synchronized and keras.backend.backend() == "tensorflow"

    def _batch_norms(self) -> Iterator[tuple[layers.Layer, layers.Layer]]:
        """Yields each BatchNorm, after the layer that it freezes and unfreezes with."""
        yield self.stem_conv, self.stem_bn
        for block in self.blocks:
            for name in block.batch_norms:
                yield block, getattr(block, name)

    def _vision_tower(self) -> "AlignVisionModel":
        return self
