"""A model in this process, asked as a client asks one on a server."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from align_tf.client.batches import Classification, checked_labels, classification
from align_tf.evaluation.embedder import Embedder
from align_tf.models.align import AlignModel
from align_tf.preprocessing.processor import AlignProcessor


class Encoder:
    """A model in this process, asked as `AlignClient` asks one on a server.

    Args:
        model: the model.
        processor: its processor.
    """

    def __init__(self, model: AlignModel, processor: AlignProcessor):
        self.model, self.processor = model, processor
        self.embedder = Embedder(model)

    def embed_images(self, images: Any) -> np.ndarray:
        """Returns (n, d), of unit length, of what `AlignProcessor` takes as images."""
        return self.embedder.images(self.processor(images=images)["pixel_values"])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (n, d), of unit length."""
        return self.embedder.texts(self.processor(text=list(texts), padding="longest"))

    def classify(self, images: Any, labels: Sequence[str], template: str = "{}") -> Classification:
        """Classifies images, as `AlignClient.classify` does."""
        labels, prompts = checked_labels(labels, template)
        texts = self.embed_texts(prompts)
        logits = self.embed_images(images) @ texts.T / float(self.model.temperature)
        if self.model.has_logit_bias:
            logits += float(self.model.logit_bias)
        return classification(labels, prompts, logits)
