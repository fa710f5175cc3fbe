"""A model and its processor by its name, and what tells a model from another."""

import hashlib
import json
import os

import numpy as np
from keras import ops

from align_tf.models.align import AlignModel
from align_tf.models.effective_weights import effective_weights
from align_tf.preprocessing.processor import AlignProcessor


def fingerprint(model: AlignModel, processor: AlignProcessor) -> str:
    """Returns a digest of what embeddings depend on: configuration, weights, image settings."""
    config = model.config.to_dict()
    for part in (config, config["text_config"], config["vision_config"]):
        for key in ("architectures", "dtype", "torch_dtype", "transformers_version"):
            part.pop(key, None)  # of the file, not of the model
    images = processor.image_processor.to_dict()
    images.pop("max_image_pixels", None)
    digest = hashlib.sha256(json.dumps([config, images], sort_keys=True, default=str).encode())
    # With an adapter, as the model has it merged.
    weights = effective_weights(model) if model.active_adapter else model._relative_weights()
    for weight in sorted(model.weights, key=lambda weight: weight.path):
        found = weights.get(weight.path.removeprefix(f"{model.path}/"))
        if found is None:  # the adapter's own
            continue
        values = np.asarray(ops.convert_to_numpy(found), np.float32)
        digest.update(f"{weight.path.removeprefix(model.path)} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:32]


def load_model(
    model: str | os.PathLike | AlignModel, processor: AlignProcessor | None
) -> tuple[AlignModel, AlignProcessor]:
    """Loads a model and its processor by the model's name, or passes on those that are given.

    Raises:
        FileNotFoundError, ValueError: as `AlignModel.from_pretrained`; or there is a model and no
            processor.
    """
    if isinstance(model, AlignModel):
        if processor is None:
            raise ValueError("processor=None: expected the processor of the model that is given")
        return model, processor
    return AlignModel.from_pretrained(model), processor or AlignProcessor.from_pretrained(model)
