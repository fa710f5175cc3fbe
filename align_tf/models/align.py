"""ALIGN: the image tower and the text tower under one temperature."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import keras
from keras import layers, ops

from align_tf import files, hub
from align_tf.checkpoints import name_table
from align_tf.configuration.align import AlignConfig
from align_tf.configuration.config_file import CONFIG_NAME
from align_tf.configuration.text import AlignTextConfig
from align_tf.configuration.vision import AlignVisionConfig
from align_tf.models.contrastive import METRICS, ContrastiveTraining, product, similarities
from align_tf.models.exports import Exports
from align_tf.models.fit_watch import CONTRASTED
from align_tf.models.inputs import PAIR_INPUTS, TakesNames, check_known, gather
from align_tf.models.loss import (
    REDUCTIONS,
    positive_pairs,
    reduce_directions,
    weighted_mean,
)
from align_tf.models.outputs import ModelOutput
from align_tf.models.pretrained import Pretrained
from align_tf.models.text import TEXT_INPUTS, AlignTextModel
from align_tf.models.vision import AlignVisionModel
from align_tf.models.weight_files import WeightFiles

logger = logging.getLogger(__name__)


@keras.saving.register_keras_serializable(package="align_tf")
class AlignModel(TakesNames, Exports, WeightFiles, ContrastiveTraining, Pretrained, keras.Model):
    """ALIGN (arXiv 2102.05918): an image and a text tower trained to agree.

    A `.keras` file of it loads with `keras.saving.load_model` once `import align_tf` has told Keras
    of the class.

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
    input_names = (*tower_inputs, *PAIR_INPUTS)

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
        self._check_config(config)
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
        self.text_model.kept_frozen = ("pooler",)  # no part of the embedding, so of no gradient
        self.text_model.pooler.trainable = False
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
        names = (*METRICS, CONTRASTED)
        self.batch_metrics = {name: keras.metrics.Mean(name=name) for name in names}
        self.trained_batches = 0  # of `fit`, over all its calls; a resumed training goes on from it
        self.build()
        self._remember_layers()

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

    def _make_config(self) -> dict[str, Any]:
        return {
            **super()._make_config(),
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

        `model(inputs)` and `model(**inputs)` are the same.

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
        logits_per_text = similarities(text_embeds, image_embeds, *self._scale())
        logits_per_image = ops.transpose(logits_per_text)
        loss = {}
        if return_loss:
            loss["loss"] = self._loss(inputs, logits_per_text, logits_per_image)
        return ModelOutput(  # in the order of Hugging Face's
            **loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )

    @property
    def output_shape(self) -> dict[str, Any]:
        """The shapes of the outputs by name, None for what depends on the inputs."""
        logits, embeds = (None, None), (None, self.config.projection_dim)
        return {
            "logits_per_image": logits,
            "logits_per_text": logits,
            "text_embeds": embeds,
            "image_embeds": embeds,
            "text_model_output": self.text_model.output_shape,
            "vision_model_output": self.vision_model.output_shape,
        }

    def _check_names(self, inputs: Any) -> None:
        if not isinstance(inputs, dict):
            kind = type(inputs).__name__
            raise ValueError(f"inputs of {kind}: expected a dict of pixel_values, ...")
        check_known(inputs, self.input_names)
        if inputs.get("pixel_values") is None:
            raise ValueError("expected pixel_values; for texts alone call get_text_features")
        if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
            raise ValueError("expected input_ids; for images alone call get_image_features")

    def _check_inputs(self, inputs: Any) -> None:
        self._check_names(inputs)
        texts = {key: inputs[key] for key in TEXT_INPUTS if key in inputs}
        self.vision_model._check_inputs(inputs["pixel_values"])
        self.text_model._check_inputs(texts)

    def _loss(self, inputs: dict[str, Any], *both: Any) -> Any:
        """The loss of the logits of both directions, text to image first."""
        positives = positive_pairs(inputs.get("image_ids"), inputs.get("text_ids"))
        weight = product(inputs.get("sample_weight"), None)
        rows = (self._loss_rows(logits, positives, weight) for logits in both)
        directions = (weighted_mean(values, weight) for values in rows)
        return reduce_directions(*directions, self.loss_reduction)

    def get_text_features(self, inputs: Any = None, training: bool = False, **named: Any) -> Any:
        """Embeds texts, not normalised, as the reference does.

        Args:
            inputs: what `AlignTextModel` takes.
            training: apply dropout.
            **named: the inputs by name, in the place of `inputs` or beside them.

        Returns:
            (m, projection_dim), float32.
        """
        inputs = gather(TEXT_INPUTS, inputs, named)
        output = self.text_model(inputs, first_token_only=True, training=training)
        return self._project_text(output)

    def get_image_features(
        self, inputs: Any = None, training: bool = False, *, pixel_values: Any = None
    ) -> Any:
        """Embeds images, not normalised, as the reference does.

        Args:
            inputs: what `AlignVisionModel` takes.
            training: apply drop-connect, and BatchNorm by the batch's statistics.
            pixel_values: the images by name, in the place of `inputs`.

        Returns:
            (n, projection_dim), float32.
        """
        inputs = inputs if pixel_values is None else pixel_values
        return self._project_image(self.vision_model(inputs, training=training))

    def _project_text(self, output: ModelOutput) -> Any:
        # The first token's state, not BERT's pooler.
        return self.text_projection(output.last_hidden_state[:, 0])

    def _project_image(self, output: ModelOutput) -> Any:
        pooled = output.pooler_output
        return self.image_projection(pooled) if self.config.image_projection else pooled

    def _scale(self) -> list:
        """What `similarities` takes after the embeddings."""
        return [self.temperature, self.logit_bias] if self.has_logit_bias else [self.temperature]

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
        """Lets a tower, or some of its blocks, train; takes what `freeze` takes.

        After Keras's `trainable = False` of the model, projections and temperature train again too.
        """
        towers = self._towers(None)
        if not self.trainable:
            self._trainable = True  # of the model, and of no tower
            for part in [*self._scale(), *(layer for layer in self.layers if layer not in towers)]:
                part.trainable = True
            self._keep_frozen()
        for model in self._towers(tower):
            model.unfreeze(blocks)

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


def _unit(x: Any) -> Any:
    """Scales vectors to unit length; zero stays zero, with a finite gradient."""
    return x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=-1, keepdims=True), 1e-24))
