"""The ALIGN models: the text tower, the image tower, and both under one temperature."""

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from align_tf import files, hub
from align_tf.checkpoints import name_table, original
from align_tf.checkpoints.import_plan import plan_import
from align_tf.checkpoints.tensors import is_original, read_tensors, weight_files, write_tensors
from align_tf.configuration.align import AlignConfig
from align_tf.configuration.blocks import block_table
from align_tf.configuration.config_file import CONFIG_NAME
from align_tf.configuration.text import AlignTextConfig
from align_tf.configuration.vision import AlignVisionConfig
from align_tf.models import accumulation as accumulation_module
from align_tf.models import fused_training
from align_tf.models.activation import get_activation
from align_tf.models.bert import EncoderLayer, TextEmbeddings, dense, embedding
from align_tf.models.efficientnet import MBConvBlock, batch_norm, conv
from align_tf.models.initialization import no_init_weights
from align_tf.models.loss import (
    REDUCTIONS,
    contrastive_rows,
    gather_across_replicas,
    has_workers,
    initial_logit_bias,
    num_replicas,
    own_pairs,
    positive_pairs,
    reduce_directions,
    right_rows,
    sigmoid_rows,
    weighted_mean,
)
from align_tf.models.outputs import ModelOutput
from align_tf.models.remat import rematerialize

logger = logging.getLogger(__name__)

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
# What a batch may hold beside the inputs of the towers; the loss reads it.
PAIR_INPUTS = ("image_ids", "text_ids", "sample_weight")
METRICS = ("loss_i2t", "loss_t2i", "accuracy_i2t", "accuracy_t2i", "temperature")


class _Checkpoint:
    """Reading and writing of weights, shared by the three models."""

    config_class: type
    table: tuple  # this model's rows of the name table
    prefix = ""  # what a larger checkpoint puts before this model's names
    unused: tuple[str, ...] = ()  # what a larger checkpoint holds beside this model

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        config: Any = None,
        dtype: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "keras.Model":
        """Builds the model of a checkpoint and fills every weight from it.

        Args:
            name_or_path: a folder with `config.json` and `model.safetensors` (whole or in
                shards) or `pytorch_model.bin`; `align-tiny`; or a Hugging Face id such as
                `kakaobrain/align-base`. A tower also loads from a joint checkpoint. Also a
                folder, id or prefix of a checkpoint of the original training code
                (`model-weights.index` and `.data-*`), such as
                `kakaobrain/coyo-align-b7-base`. That one needs no `config.json`: sizes come
                from the shapes of the weights, and what these cannot say from EfficientNet's
                stages and strides, BERT's heads of width 64, images of 289 pixels and the
                defaults of the configurations (activations, epsilons, dropout, padding).
            config: a configuration of this model, or some keys of `config.json`, nested as
                there, that go before those of the checkpoint. A size that is not that of the
                weights is an error.
            dtype: a dtype or policy of the model, such as `mixed_bfloat16`.
            revision: branch, tag or commit on the hub.
            token: access token of the hub.
            cache_dir: the hub's cache folder.
            local_files_only: never ask the hub, use its cache.

        Returns:
            The model.

        Raises:
            FileNotFoundError: there is no such checkpoint, or a file of it is missing.
            CheckpointError: a file is broken, a weight is missing, a tensor
                is left over, or a shape or a size differs; the message names each.
        """
        folder = hub.resolve_folder(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            weights=True,
        )
        source = hub.original_index(name_or_path) or folder
        config = cls._read_config(source, config)
        with no_init_weights():
            model = cls(config, dtype=dtype)
        model._load(source, prefix=cls.prefix, unused=cls.unused)
        model._start_fine_tuning()
        return model

    @classmethod
    def _read_config(cls, source: pathlib.Path, given: Any) -> Any:
        file = weight_files(source)[0]
        if isinstance(given, cls.config_class):
            return given
        path, values = file.parent / CONFIG_NAME, {}
        if path.is_file() or not is_original(file):
            values = files.read_json(path)
        for key, value in (given or {}).items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        if is_original(file):
            values = original.read_config(file, values)
        return cls.config_class.from_dict(values)

    def _vision_tower(self) -> "AlignVisionModel | None":
        return None

    def _start_fine_tuning(self) -> None:
        """Freezes BatchNorm, unless the configuration says which it is."""
        tower = self._vision_tower()
        if tower is not None and tower.config.freeze_batch_norm is None:
            tower._set_batch_norm(frozen=True)

    def _relative_weights(self) -> dict[str, Any]:
        return {weight.path.removeprefix(f"{self.path}/"): weight for weight in self.weights}

    def _load(
        self,
        folder: pathlib.Path,
        *,
        prefix: str = "",
        unused: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
    ) -> list[str]:
        """Fills the weights from a checkpoint folder: all of them, or none and an error.

        Args:
            folder: as `checkpoint.weight_files` takes it.
            prefix, unused, optional: as `checkpoint.plan_import` takes them.

        Returns:
            The parts of the checkpoint that `unused` left out.
        """
        weights = self._relative_weights()
        shapes = {path: tuple(weight.shape) for path, weight in weights.items()}
        plan, left_out, kept = plan_import(
            shapes,
            weight_files(folder),
            self.table,
            prefix=prefix,
            unused=unused,
            optional=optional,
        )
        for file, rows in plan.items():
            # Largest first: what reading it takes beside is over before the others come.
            names = sorted(rows, key=lambda name: -math.prod(shapes[rows[name][0]]))
            for name, array in read_tensors(file, names):
                path, transform = rows[name]
                array = name_table.permute(array, transform, to_keras=True)
                weights[path].assign(array.astype(weights[path].dtype, copy=False))
                del array  # before the next one is read
        if kept:
            logger.warning("%s: %s has no %s: new", self.name, folder, ", ".join(kept))
        return left_out

    def save_pretrained(self, folder: str | os.PathLike, dtype: str | None = None) -> None:
        """Writes `config.json` and `model.safetensors` as transformers reads them.

        Args:
            folder: made if it is not there.
            dtype: `float32`, `float16` or `bfloat16`; None keeps the weights' own.
        """
        weights = self._relative_weights()
        names = name_table.to_hugging_face(weights, self.table)
        tensors = {
            hf: name_table.permute(ops.convert_to_numpy(weights[path]), transform, to_keras=False)
            for path, (hf, transform) in names.items()
        }
        extra = {"architectures": [type(self).__name__], "dtype": dtype or self.variable_dtype}
        config = dataclasses.replace(self.config, extra={**self.config.extra, **extra})
        folder = pathlib.Path(folder)
        write_tensors(folder, tensors, dtype)
        config.save_pretrained(folder)

    def get_config(self) -> dict[str, Any]:
        layers = self._flatten_layers(include_self=False)
        frozen = [layer.path for layer in layers if layer.weights and not layer.trainable]
        state = {"frozen": frozen}
        if self._vision_tower() is not None:
            state["batch_norm"] = self._vision_tower().batch_norm
        return {**super().get_config(), "config": self.config.to_dict(), **state}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "keras.Model":
        config = dict(config)
        frozen, trainable = config.pop("frozen"), config.pop("trainable")
        batch_norm = config.pop("batch_norm", None)
        model = cls(cls.config_class.from_dict(config.pop("config")), **config)
        if batch_norm is not None:
            model._vision_tower()._set_batch_norm(**batch_norm)
        for layer in model._flatten_layers(include_self=False):
            if layer.path in frozen:
                layer.trainable = False
        if not trainable:
            model.trainable = False
        return model


class _Tower:
    """Freezing by block, shared by the two towers."""

    def freeze(self, blocks: Iterable[int] | None = None) -> None:
        """Stops the tower from training.

        Args:
            blocks: indices of the blocks to freeze; None freezes the whole tower.

        Raises:
            ValueError: there is no block of that index.
        """
        self._set_trainable(blocks, False)

    def unfreeze(self, blocks: Iterable[int] | None = None) -> None:
        """Lets the tower train; takes what `freeze` takes."""
        self._set_trainable(blocks, True)

    def _set_trainable(self, blocks: Iterable[int] | None, value: bool) -> None:
        # The tower itself stays trainable: Keras asks the parent before the child.
        chosen = self.layers if blocks is None else [self._block(index) for index in blocks]
        for layer in chosen:
            layer.trainable = value

    def _block(self, index: int) -> layers.Layer:
        count = len(self.blocks)
        if not -count <= index < count:
            raise ValueError(f"block {index}: {self.name} has blocks 0 to {count - 1}")
        return self.blocks[index]


@keras.saving.register_keras_serializable(package="align_tf")
class AlignTextModel(_Checkpoint, _Tower, keras.Model):
    """The text tower: a BERT encoder.

    Args:
        config: its configuration.
        name: the name of the model, and the first part of its weights' paths.
        dtype: a dtype or policy such as `mixed_bfloat16`; None takes Keras's global policy.
    """

    config_class = AlignTextConfig
    table = name_table.TEXT_TABLE
    prefix = "text_model."
    unused = name_table.UNUSED_BY_TEXT_TOWER

    def __init__(
        self, config: AlignTextConfig, *, name: str = "text_model", dtype: Any = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.config = config = copy.deepcopy(config)
        options = {"dtype": self.dtype_policy}
        self.embeddings = TextEmbeddings(config, **options)
        self.blocks = [
            EncoderLayer(
                config,
                config.num_attention_heads - len(config.pruned_heads.get(index, ())),
                name=f"layer_{index}",
                **options,
            )
            for index in range(config.num_hidden_layers)
        ]
        self.pooler = dense(config, config.hidden_size, activation="tanh", name="pooler", **options)
        self.remat = False
        self.build()

    def build(self, input_shape: Any = None) -> None:
        self.embeddings.build()
        for block in self.blocks:
            block.build()
        self.pooler.build((None, self.config.hidden_size))

    def call(
        self,
        inputs: Any,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        first_token_only: bool = False,
        training: bool = False,
    ) -> ModelOutput:
        """Encodes tokens.

        Args:
            inputs: `input_ids` int (m, t), or a dict of `input_ids` or `inputs_embeds`
                float (m, t, hidden_size), and if wanted `attention_mask` (m, t), 1 for a token
                and 0 for padding, `token_type_ids` (m, t) and `position_ids` (m, t).
            output_hidden_states: also return `hidden_states`, those after the embeddings and
                after each layer, each (m, t, hidden_size).
            output_attentions: also return `attentions`, one (m, heads, t, t) for each layer.
            first_token_only: compute of the last layer what the embedding needs, the state of
                the first token: `last_hidden_state` is (m, 1, hidden_size).
            training: apply dropout.

        Returns:
            `last_hidden_state` (m, t, hidden_size) and `pooler_output` (m, hidden_size).

        Raises:
            ValueError: both or neither of ids and embeddings are given, or the text is longer
                than max_position_embeddings.
        """
        inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
        given = {key: inputs[key] for key in TEXT_INPUTS if inputs.get(key) is not None}
        attention_mask = given.pop("attention_mask", None)
        if ("input_ids" in given) == ("inputs_embeds" in given):
            raise ValueError("expected input_ids or inputs_embeds, not both and not neither")
        length = ops.shape(given.get("input_ids", given.get("inputs_embeds")))[1]
        self._check_length(length)
        if attention_mask is None:
            attention_mask = ops.ones((1, length), dtype="bool")
        attention_mask = ops.expand_dims(ops.cast(attention_mask, "bool"), (1, 2))  # (m, 1, 1, t)

        x = self.embeddings(**given, training=training)
        hidden_states, attentions = [x], []
        for block in self.blocks:
            run = rematerialize(block) if self.remat and training else block
            if first_token_only and block is self.blocks[-1]:
                run = functools.partial(block, first_token_only=True)
            x, probs = run(x, attention_mask, training=training)
            hidden_states.append(x)
            attentions.append(probs)

        output = ModelOutput(last_hidden_state=x, pooler_output=self.pooler(x[:, 0]))
        if output_hidden_states:
            output["hidden_states"] = tuple(hidden_states)
        if output_attentions:
            output["attentions"] = tuple(attentions)
        return output

    def _check_length(self, length: Any) -> None:
        if isinstance(length, int) and length > self.config.max_position_embeddings:
            raise ValueError(
                f"a text of {length} tokens: expected at most max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Cuts the word embeddings, or adds rows drawn as new ones are; compile again after it.

        Args:
            vocab_size: rows to have.
        """
        config = dataclasses.replace(self.config, vocab_size=vocab_size)  # checks the value
        layer = self.embeddings.word_embeddings
        new = embedding(
            config,
            vocab_size,
            config.hidden_size,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
        kept = ops.convert_to_numpy(layer.embeddings)[:vocab_size]
        added = new.embeddings_initializer((vocab_size - len(kept), config.hidden_size))
        rows = np.concatenate([kept, ops.convert_to_numpy(added).astype(kept.dtype)])
        _replace_layer(self.embeddings, "word_embeddings", new, [rows])
        self.config.vocab_size = vocab_size

    def prune_heads(self, heads: dict[int, Iterable[int]]) -> None:
        """Takes attention heads out; compile again after it.

        Args:
            heads: layer's index -> heads to take out, numbered as in the unpruned model.

        Raises:
            ValueError: there is no such layer or head, or none would be left.
        """
        before = self.config.pruned_heads
        after = {**before, **{i: sorted({*before.get(i, ()), *h}) for i, h in heads.items()}}
        dataclasses.replace(self.config, pruned_heads=after)  # checks the values
        for index in heads:
            attention = self.blocks[index].attention
            left = [
                h for h in range(self.config.num_attention_heads) if h not in before.get(index, ())
            ]
            kept = np.array([head not in after[index] for head in left])
            columns = np.repeat(kept, self.config.head_size)
            attention.num_heads = int(kept.sum())
            for attribute in ("query", "key", "value"):
                kernel, bias = getattr(attention, attribute).get_weights()
                self._replace_dense(attention, attribute, kernel[:, columns], bias[columns])
            kernel, bias = attention.output_dense.get_weights()
            self._replace_dense(attention, "output_dense", kernel[columns], bias)
        self.config.pruned_heads = after

    def _replace_dense(self, parent: layers.Layer, attribute: str, kernel: Any, bias: Any) -> None:
        old = getattr(parent, attribute)
        new = dense(self.config, kernel.shape[1], name=old.name, dtype=old.dtype_policy)
        _replace_layer(parent, attribute, new, [kernel, bias])


def _replace_layer(parent: layers.Layer, attribute: str, new: layers.Layer, values: list) -> None:
    """Puts a layer of another size in the place of a built one, under the same weight paths."""
    old = getattr(parent, attribute)
    with open_for_change(parent):
        new.build((None, None, values[0].shape[0]))
        new.set_weights(values)
        new.trainable = old.trainable
        parent._tracker.untrack(old)
        setattr(parent, attribute, new)


@contextlib.contextmanager
def open_for_change(layer: layers.Layer) -> Iterator[None]:
    """Lets a built layer take new weights and sublayers, under its own path."""
    # Keras closes a built layer to them; its own LoRA and quantization open it so.
    layer._tracker.unlock()
    try:
        with contextlib.ExitStack() as scopes:
            for part in layer.path.split("/"):
                scopes.enter_context(keras.name_scope(part))
            yield
    finally:
        layer._tracker.lock()


@keras.saving.register_keras_serializable(package="align_tf")
class AlignVisionModel(_Checkpoint, _Tower, keras.Model):
    """The image tower: an EfficientNet without top convolution.

    Args:
        config: its configuration.
        name: the name of the model, and the first part of its weights' paths.
        dtype: a dtype or policy such as `mixed_bfloat16`; None takes Keras's global policy.
    """

    config_class = AlignVisionConfig
    table = name_table.VISION_TABLE
    prefix = "vision_model."
    unused = name_table.UNUSED_BY_VISION_TOWER

    def __init__(
        self, config: AlignVisionConfig, *, name: str = "vision_model", dtype: Any = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
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
        self.build()
        self._set_batch_norm(frozen=bool(config.freeze_batch_norm))

    def build(self, input_shape: Any = None) -> None:
        self.stem_pad.build((None, None, None, self.config.num_channels))
        self.stem_conv.build((None, None, None, self.config.num_channels))
        self.stem_bn.build((None, None, None, self.config.stem_channels))
        for block in self.blocks:
            block.build()

    def call(
        self, inputs: Any, output_hidden_states: bool = False, training: bool = False
    ) -> ModelOutput:
        """Encodes images of any size.

        Args:
            inputs: `pixel_values` float (n, h, w, 3), or a dict that holds it.
            output_hidden_states: also return `hidden_states`, those after the stem and after
                each block, each (n, h', w', c).
            training: apply drop-connect, and BatchNorm by the batch's statistics.

        Returns:
            `last_hidden_state` (n, h', w', embed_dim) and `pooler_output` (n, embed_dim),
            float32.
        """
        x = inputs["pixel_values"] if isinstance(inputs, dict) else inputs
        x = self.stem_conv(self.stem_pad(x))
        if training and fused_training.fits(self.activation, self.stem_bn, x):
            x = fused_training.normalize_swish(self.stem_bn, x)
        else:
            x = self.activation(self.stem_bn(x, training=training))
        hidden_states = [x]
        for block in self.blocks:
            run = rematerialize(block) if self.remat and training else block
            x = run(x, training=training)
            hidden_states.append(x)

        pool = ops.mean if self.config.pooling_type == "mean" else ops.max
        pooled = pool(ops.cast(x, "float32"), axis=(1, 2))
        output = ModelOutput(last_hidden_state=x, pooler_output=pooled)
        if output_hidden_states:
            output["hidden_states"] = tuple(hidden_states)
        return output

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
        """
        self.config.freeze_batch_norm = False
        self._set_batch_norm(frozen=False, synchronized=synchronized)

    def _set_batch_norm(self, *, frozen: bool, synchronized: bool = False) -> None:
        self.batch_norm = {"frozen": frozen, "synchronized": synchronized}
        for owner, layer in self._batch_norms():
            layer.trainable = owner.trainable and not frozen
            layer.synchronized = synchronized and keras.backend.backend() == "tensorflow"

    def _batch_norms(self) -> Iterator[tuple[layers.Layer, layers.Layer]]:
        """Yields each BatchNorm, after the layer that it freezes and unfreezes with."""
        yield self.stem_conv, self.stem_bn
        for block in self.blocks:
            for layer in block._flatten_layers():
                if isinstance(layer, layers.BatchNormalization):
                    yield block, layer

    def _set_trainable(self, blocks: Iterable[int] | None, value: bool) -> None:
        super()._set_trainable(blocks, value)
        self._set_batch_norm(**self.batch_norm)  # a block hands its value down to them

    def _vision_tower(self) -> "AlignVisionModel":
        return self


@keras.saving.register_keras_serializable(package="align_tf")
class AlignModel(_Checkpoint, keras.Model):
    """ALIGN (arXiv 2102.05918): an image and a text tower trained to agree.

    A `.keras` file of it loads with `keras.saving.load_model` once
    `from align_tf import AlignModel` has told Keras of the class.

    Args:
        config: its configuration.
        label_smoothing: of the contrastive loss; 0.1 as in the paper.
        loss_reduction: `mean` of the losses of the two directions, or their `sum` as in the
            original.
        temperature_bounds: the least and the largest value that training may give the
            temperature.
        name: the name of the model.
        dtype: a dtype or policy such as `mixed_bfloat16`; None takes Keras's global policy.
            Embeddings, logits and loss are float32 whatever it is.
    """

    config_class = AlignConfig
    table = name_table.JOINT_TABLE
    tower_inputs = ("pixel_values", *TEXT_INPUTS)

    def __init__(
        self,
        config: AlignConfig,
        *,
        label_smoothing: float = 0.1,
        loss_reduction: str = "mean",
        temperature_bounds: tuple[float, float] = (0.01, 10.0),
        name: str = "align",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        if loss_reduction not in REDUCTIONS:
            raise ValueError(
                f"loss_reduction={loss_reduction!r}: expected one of {', '.join(REDUCTIONS)}"
            )
        least, largest = temperature_bounds
        if not 0 < least <= largest:
            raise ValueError(
                f"temperature_bounds={temperature_bounds!r}: expected two positive numbers, "
                "the smaller one first"
            )
        self.label_smoothing = label_smoothing
        self.loss_reduction = loss_reduction
        self.temperature_bounds = (least, largest)
        self.accumulation = 1
        self.text_model = AlignTextModel(config.text_config, dtype=self.dtype_policy)
        self.text_model.pooler.trainable = False  # no part of the embedding, so of no gradient
        self.vision_model = AlignVisionModel(config.vision_config, dtype=self.dtype_policy)
        # The towers own their configurations; one that resizes or prunes shows here too.
        towers = {"text_config": self.text_model.config, "vision_config": self.vision_model.config}
        self.config = config = dataclasses.replace(config, **towers)
        self.text_projection = layers.Dense(
            config.projection_dim, name="text_projection", dtype="float32"
        )
        if config.image_projection:
            self.image_projection = layers.Dense(
                config.projection_dim, name="image_projection", dtype="float32"
            )
        self.batch_metrics = {name: keras.metrics.Mean(name=name) for name in METRICS}
        self.build()

    def build(self, input_shape: Any = None) -> None:
        self.text_projection.build((None, self.config.text_config.hidden_size))
        if self.config.image_projection:
            self.image_projection.build((None, self.config.vision_config.embed_dim))
        self.temperature = self.add_weight(
            name="temperature",
            shape=(),
            initializer=keras.initializers.Constant(self.config.temperature_init_value),
            constraint=_TemperatureBounds(self),
            dtype="float32",
            autocast=False,
        )
        if self.config.logit_bias_init_value is not None:
            self._add_logit_bias()

    def _add_logit_bias(self) -> None:
        self.logit_bias = self.add_weight(
            name="logit_bias",
            shape=(),
            initializer=keras.initializers.Constant(self.config.logit_bias_init_value),
            dtype="float32",
            autocast=False,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "loss_reduction": self.loss_reduction,
            "temperature_bounds": self.temperature_bounds,
        }

    def call(
        self,
        inputs: dict[str, Any],
        return_loss: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool = False,
    ) -> ModelOutput:
        """Embeds images and texts and compares all of them.

        Args:
            inputs: `pixel_values` (n, h, w, 3) and what `AlignTextModel` takes, (m, t). The loss
                also reads, of n = m pairs, `image_ids` and `text_ids`, int (n,): pairs that share
                one are positives of one another; and `sample_weight` (n,), 0 for a pair that is
                not there.
            return_loss: also return `loss`.
            output_hidden_states: ask both towers for theirs.
            output_attentions: ask the text tower for its attentions.
            training: apply dropout and drop-connect, and BatchNorm by the batch's statistics.

        Returns:
            `logits_per_image` (n, m) and `logits_per_text` (m, n), cosines divided by the
            temperature; `image_embeds` (n, projection_dim) and `text_embeds`
            (m, projection_dim) of unit length; `text_model_output` and `vision_model_output`.

        Raises:
            ValueError: `pixel_values` or the texts are missing, or an input is not known.
        """
        _check_inputs(inputs)
        vision_output = self.vision_model(
            inputs["pixel_values"], output_hidden_states=output_hidden_states, training=training
        )
        text_output = self.text_model(
            {key: inputs[key] for key in TEXT_INPUTS if key in inputs},
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )
        image_embeds = _unit(self._project_image(vision_output))
        text_embeds = _unit(self._project_text(text_output))
        logits_per_text = _logits(text_embeds, image_embeds, *self._scale())
        output = ModelOutput(
            logits_per_image=ops.transpose(logits_per_text),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )
        if return_loss:
            positives = positive_pairs(inputs.get("image_ids"), inputs.get("text_ids"))
            weight = _product(inputs.get("sample_weight"), None)
            both = (output.logits_per_text, output.logits_per_image)
            rows = (self._loss_rows(logits, positives, weight) for logits in both)
            directions = (weighted_mean(values, weight) for values in rows)
            output["loss"] = reduce_directions(*directions, self.loss_reduction)
        return output

    def get_text_features(self, inputs: Any, training: bool = False) -> Any:
        """Embeds texts.

        Args:
            inputs: what `AlignTextModel` takes.
            training: apply dropout.

        Returns:
            (m, projection_dim), float32, before normalisation.
        """
        output = self.text_model(inputs, first_token_only=True, training=training)
        return self._project_text(output)

    def get_image_features(self, inputs: Any, training: bool = False) -> Any:
        """Embeds images.

        Args:
            inputs: what `AlignVisionModel` takes.
            training: apply drop-connect, and BatchNorm by the batch's statistics.

        Returns:
            (n, projection_dim), float32, before normalisation.
        """
        return self._project_image(self.vision_model(inputs, training=training))

    def _project_text(self, output: ModelOutput) -> Any:
        # The first token's state, not BERT's pooler.
        return self.text_projection(output.last_hidden_state[:, 0])

    def _project_image(self, output: ModelOutput) -> Any:
        pooled = output.pooler_output
        return self.image_projection(pooled) if self.config.image_projection else pooled

    def _scale(self) -> list:
        """What `_logits` takes after the embeddings."""
        return [self.temperature, self.logit_bias] if self.has_logit_bias else [self.temperature]

    # --- training ---

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: None = None,
        *,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
        accumulation: int = 1,
        remat: bool = False,
    ) -> None:
        """Prepares the model for `fit`; the loss and the metrics are its own.

        Args:
            optimizer: as Keras takes it, like the next four.
            loss: None; see `use_sigmoid_loss` for the other loss.
            run_eagerly: do not compile the step.
            steps_per_execution: batches that one call runs.
            jit_compile: compile the step by XLA.
            auto_scale_loss: scale the loss of a mixed_float16 model.
            accumulation: parts that a batch goes through the towers in, one after the other, to
                the step of the whole batch with the activations of one part (GradCache,
                arXiv 2101.06983); see `align_tf.models.accumulation`.
            remat: compute the activations inside a block again for its gradient instead of
                keeping them: less memory, more time.

        Raises:
            ValueError: a loss is given, or accumulation is not a positive integer.
        """
        if loss is not None:
            raise ValueError(
                f"loss={loss!r}: expected None; AlignModel minimises its contrastive loss, or "
                "after use_sigmoid_loss(batch_size) the pairwise sigmoid loss"
            )
        if not isinstance(accumulation, int) or accumulation < 1:
            raise ValueError(f"accumulation={accumulation!r}: expected a positive integer")
        super().compile(
            optimizer=optimizer,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        self.accumulation = accumulation
        self.text_model.remat = self.vision_model.remat = remat

    def get_compile_config(self) -> dict[str, Any]:
        options = {"accumulation": self.accumulation, "remat": self.vision_model.remat}
        return {**super().get_compile_config(), **options}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        config = keras.saving.deserialize_keras_object(config)
        for key in ("loss_weights", "metrics", "weighted_metrics"):  # Keras's own, unused here
            config.pop(key, None)
        self.compile(**config)
        self.optimizer.build(self.trainable_variables)

    def fit(self, x: Any = None, y: Any = None, *args: Any, sample_weight: Any = None, **kw: Any):
        """As Keras's `fit`, which drops the sample_weight of arrays that come without targets."""
        return super().fit(*_with_weight(x, y, sample_weight), *args, **kw)

    def evaluate(
        self, x: Any = None, y: Any = None, *args: Any, sample_weight: Any = None, **kw: Any
    ):
        """As Keras's `evaluate`; see `fit`."""
        return super().evaluate(*_with_weight(x, y, sample_weight), *args, **kw)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The loss of a batch of pairs, against the negatives of all replicas.

        Each replica takes the whole loss of the global batch and its share of it, so that the
        gradients that a distribution strategy sums are those of one device.

        Args:
            x: the batch; its `image_ids`, `text_ids` and `sample_weight` count, see `call`.
            y: not used.
            y_pred: what `call` returns.
            sample_weight: (n,), times the one in `x`.
            training: not used.
        """
        ids = [gather_across_replicas(x.get(key)) for key in ("image_ids", "text_ids")]
        weight = gather_across_replicas(_product(x.get("sample_weight"), sample_weight))
        images, texts = (gather_across_replicas(y_pred[key]) for key in accumulation_module.EMBEDS)
        values = {}
        for name, rows, columns in (("t2i", texts, images), ("i2t", images, texts)):
            loss, accuracy = self._compare(rows, columns, ids, weight)
            values |= {f"loss_{name}": loss, f"accuracy_{name}": accuracy}
        self._update_metrics(values, ops.shape(images)[0] if weight is None else ops.sum(weight))
        loss = reduce_directions(values["loss_t2i"], values["loss_i2t"], self.loss_reduction)
        return (loss + sum(self.losses)) / num_replicas()

    def _compare(self, rows: Any, columns: Any, ids: list, weight: Any) -> tuple[Any, Any]:
        """Returns the loss and the accuracy of one direction, of all (n, d) by all (n, d).

        An accumulated batch makes its (n, n) logits part by part too.
        """

        def compare(index: Any, part: Any, columns: Any, *scale: Any) -> tuple[Any, Any]:
            logits = _logits(part, columns, *scale)
            positives = positive_pairs(*ids, rows=index)
            if positives is None:
                positives = own_pairs(logits, index)
            losses = self._loss_rows(logits, positives, weight)
            return losses, right_rows(logits, positives, weight)

        # As values: what is computed again for the gradient takes no variables.
        scale = [ops.convert_to_tensor(variable.value) for variable in self._scale()]
        of_rows = accumulation_module.map_rows(
            compare, rows, (columns, *scale), self.accumulation, num_outputs=2
        )
        return tuple(weighted_mean(values, weight) for values in of_rows)

    def _loss_rows(self, logits: Any, positives: Any, weight: Any) -> Any:
        """Returns the loss of each row, (r,)."""
        if self.has_logit_bias:
            return sigmoid_rows(logits, positives, weight)
        return contrastive_rows(logits, positives, weight, self.label_smoothing)

    def _update_metrics(self, values: dict[str, Any], total: Any) -> None:
        for name, value in values.items():
            self.batch_metrics[name].update_state(value, sample_weight=total)
        # Of the temperature the last value is wanted, not the mean.
        self.batch_metrics["temperature"].reset_state()
        self.batch_metrics["temperature"].update_state(self.temperature)

    def train_step(self, *state_and_data: Any) -> Any:
        if self.accumulation == 1:
            return _over_workers(super().train_step(*state_and_data))
        return _over_workers(accumulation_module.train_step(self, *state_and_data))

    def test_step(self, *state_and_data: Any) -> Any:
        return _over_workers(super().test_step(*state_and_data))

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        # The model is built as it is made, so that only the optimizer is left. Keras would take
        # a batch first and average its replicas, which of a dict fails between workers
        # (keras issue 20329).
        optimizer = self.optimizer
        if self._distribute_strategy is None or optimizer is None or optimizer.built:
            return
        with self._distribute_strategy.scope():
            optimizer.build(self.trainable_variables)

    def predict_step(self, *state_and_data: Any) -> Any:
        """Keeps what batches can be joined in: the embeddings; (n, m) logits cannot."""
        output = super().predict_step(*state_and_data)
        output, *state = output if isinstance(output, tuple) else (output,)
        embeds = {key: output[key] for key in ("image_embeds", "text_embeds")}
        return (embeds, *state) if state else embeds

    @property
    def has_logit_bias(self) -> bool:
        """Whether the model has the learned bias of the sigmoid loss."""
        return self.config.logit_bias_init_value is not None

    def use_sigmoid_loss(self, batch_size: int) -> None:
        """Takes the pairwise sigmoid loss (SigLIP, arXiv 2303.15343); compile again after it.

        The logits get a learned bias, the weight `logit_bias`, which is saved with the model:
        from then on it trains by this loss, also after it is loaded again.

        Args:
            batch_size: pairs in a batch, over all replicas: the bias starts at
                log(p / (1 - p)), p = 1 / batch_size.

        Raises:
            ValueError: batch_size is not an integer of 2 or more.
        """
        value = initial_logit_bias(batch_size)
        added = not self.has_logit_bias
        self.config.logit_bias_init_value = value
        if not added:
            self.logit_bias.assign(value)
            return
        with open_for_change(self):
            self._add_logit_bias()

    # --- freezing and surgery ---

    def freeze(self, tower: str | None = None, blocks: Iterable[int] | None = None) -> None:
        """Stops a tower, or some of its blocks, from training; compile again after it.

        Args:
            tower: `text` or `vision`; None means both.
            blocks: indices of the blocks to freeze; None freezes the whole tower.
        """
        for model in self._towers(tower):
            model.freeze(blocks)

    def unfreeze(self, tower: str | None = None, blocks: Iterable[int] | None = None) -> None:
        """Lets a tower, or some of its blocks, train; takes what `freeze` takes."""
        for model in self._towers(tower):
            model.unfreeze(blocks)
        self.text_model.pooler.trainable = False

    def freeze_batch_norm(self) -> None:
        """Keeps the image tower's BatchNorms as they are; see `AlignVisionModel`."""
        self.vision_model.freeze_batch_norm()

    def unfreeze_batch_norm(self, synchronized: bool = False) -> None:
        """Lets the image tower's BatchNorms train; see `AlignVisionModel`."""
        self.vision_model.unfreeze_batch_norm(synchronized)

    def _vision_tower(self) -> AlignVisionModel:
        return self.vision_model

    def _towers(self, tower: str | None) -> list:
        towers = {"text": self.text_model, "vision": self.vision_model}
        if tower is not None and tower not in towers:
            raise ValueError(f"tower={tower!r}: expected one of {', '.join(towers)}, or None")
        return list(towers.values()) if tower is None else [towers[tower]]

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Resizes the text tower's word embeddings; see `AlignTextModel`."""
        self.text_model.resize_token_embeddings(vocab_size)

    def prune_heads(self, heads: dict[int, Iterable[int]]) -> None:
        """Takes attention heads out of the text tower; see `AlignTextModel`."""
        self.text_model.prune_heads(heads)

    @classmethod
    def from_towers(
        cls,
        text: str | os.PathLike,
        vision: str | os.PathLike,
        *,
        projection_dim: int | None = None,
        temperature_init_value: float = 1.0,
        dtype: Any = None,
    ) -> "AlignModel":
        """Builds a model to train from a BERT and an EfficientNet that were trained apart.

        Args:
            text: folder or id of a Hugging Face BERT checkpoint, with or without the `bert.`
                prefix; its task heads are left out.
            vision: folder or id of a Hugging Face EfficientNet checkpoint; its top convolution
                and classifier are left out.
            projection_dim: width of the joint space; None takes the image tower's own, another
                value puts an image projection behind it.
            temperature_init_value: where the temperature starts.
            dtype: a dtype or policy of the model.

        Returns:
            The model, its projection new and its towers filled.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointError: a checkpoint does not fit.
        """
        text_folder = hub.resolve_folder(text, weights=True)
        vision_folder = hub.resolve_folder(vision, weights=True)
        text_config = _tower_config(AlignTextConfig, text_folder, "bert")
        vision_config = _tower_config(AlignVisionConfig, vision_folder, "efficientnet")
        projection_dim = projection_dim or vision_config.embed_dim
        config = AlignConfig(
            text_config=text_config,
            vision_config=vision_config,
            projection_dim=projection_dim,
            temperature_init_value=temperature_init_value,
            image_projection=projection_dim != vision_config.embed_dim,
        )
        model = cls(config, dtype=dtype)
        text_left_out = model.text_model._load(
            text_folder,
            prefix="bert.",
            unused=name_table.UNUSED_OF_BERT,
            optional=(r"^pooler/",),
        )
        vision_left_out = model.vision_model._load(
            vision_folder, prefix="efficientnet.", unused=name_table.UNUSED_OF_EFFICIENTNET
        )
        for source, left_out in ((text, text_left_out), (vision, vision_left_out)):
            if left_out:
                logger.warning("%s: left out: %s", source, ", ".join(left_out))
        model._start_fine_tuning()
        return model


class _TemperatureBounds(keras.constraints.Constraint):
    """Keeps the temperature within a model's bounds; Keras 3.10 takes no plain function."""

    def __init__(self, model: AlignModel) -> None:
        self.model = model

    def __call__(self, w: Any) -> Any:
        return ops.clip(w, *self.model.temperature_bounds)


def _tower_config(config_class: type, folder: pathlib.Path, model_type: str) -> Any:
    """Takes the keys that a tower knows out of the config.json of another model."""
    values = files.read_json(folder / CONFIG_NAME)
    if values.get("model_type") != model_type:
        raise ValueError(
            f"{folder}: model_type={values.get('model_type')!r}: expected {model_type!r}"
        )
    known = {field.name for field in dataclasses.fields(config_class)} - {"extra"}
    return config_class(**{key: value for key, value in values.items() if key in known})


def _check_inputs(inputs: Any) -> None:
    """Says which input is missing or not known."""
    known = (*AlignModel.tower_inputs, *PAIR_INPUTS)
    if not isinstance(inputs, dict):
        raise ValueError(f"inputs of {type(inputs).__name__}: expected a dict of pixel_values, ...")
    unknown = [key for key in inputs if key not in known]
    if unknown:
        raise ValueError(f"unknown inputs {', '.join(unknown)}: expected {', '.join(known)}")
    if inputs.get("pixel_values") is None:
        raise ValueError("expected pixel_values; for texts alone call get_text_features")
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        raise ValueError("expected input_ids; for images alone call get_image_features")


def _with_weight(x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any]:
    """Moves the sample weight of arrays into the batch."""
    if sample_weight is None:
        return x, y
    if not isinstance(x, dict):
        raise ValueError("sample_weight beside a dataset: expected it as a key of its batches")
    return {**x, "sample_weight": _product(x.get("sample_weight"), sample_weight)}, y


def _product(*weights: Any) -> Any:
    """Multiplies those of the sample weights that are given, (n,) or (n, 1); None for none."""
    given = [ops.reshape(ops.cast(w, "float32"), (-1,)) for w in weights if w is not None]
    return math.prod(given[1:], start=given[0]) if given else None


def _over_workers(logs: Any) -> Any:
    """Gives the logs of one of several workers the axis that Keras averages them over."""
    # `fit` reduces scalars over axis 0, an error (keras issue 20585).
    return {key: value[None] for key, value in logs.items()} if has_workers() else logs


def _logits(rows: Any, columns: Any, temperature: Any, bias: Any = None) -> Any:
    """Compares (r, d) with (n, d): cosines divided by the temperature, plus the bias if any."""
    logits = ops.matmul(rows, ops.transpose(columns)) / temperature
    return logits if bias is None else logits + bias


def _unit(x: Any) -> Any:
    """Scales vectors to unit length; zero stays zero, with a finite gradient."""
    return x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=-1, keepdims=True), 1e-24))
