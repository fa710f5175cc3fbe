"""Keras callbacks that evaluate while a model trains."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from align_tf.embedding import Embedder, in_batches
from align_tf.evaluation import (
    class_embeddings,
    distinct_pairs,
    retrieval_metrics,
    zero_shot_metrics,
)
from align_tf.tokenization import AlignTokenizer


class _Evaluation(keras.callbacks.Callback):
    """Writes figures into the logs; a subclass's `evaluate` measures them."""

    def __init__(self, every_steps: int | None):
        super().__init__()
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: expected 1 or more, or None")
        self.every_steps = every_steps
        self.async_safe = every_steps is None  # else Keras waits after each batch
        self._step = self._steps_before_epoch = 0
        self._figures: dict[str, float] = {}

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self.embedder = Embedder(model)

    def evaluate(self) -> dict[str, float]:
        raise NotImplementedError

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._steps_before_epoch = self._step = int(self.model.optimizer.iterations)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self.every_steps is None:
            return
        last, self._step = self._step, self._steps_before_epoch + batch + 1
        # Not a remainder of 0: with steps_per_execution a batch stands for several.
        if self._step // self.every_steps > last // self.every_steps:
            self._measure(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self.every_steps is None:
            self._measure(logs)
        elif logs is not None:
            logs.update(self._figures)

    def _measure(self, logs: dict[str, float] | None) -> None:
        _ = self.model  # on JAX, reading it brings the weights up to date
        self._figures = {f"val_{name}": value for name, value in self.evaluate().items()}
        if logs is not None:
            logs.update(self._figures)


class RetrievalEvaluation(_Evaluation):
    """Measures retrieval on held-out pairs: `val_r1_i2t`, `val_median_rank_t2i` and so on.

    The figures are those of `evaluation.retrieval_metrics` with `val_` before the name. Callbacks
    that come after this one, History, the progress bar and TensorBoard see them:
    `EarlyStopping("val_r1_i2t", mode="max")`.

    Args:
        dataset: batches as `fit` takes them, iterated anew each time, or one dict of arrays.
            Rows of one `image_ids` are one image, rows of one `text_ids` one text.
        every_steps: measure whenever so many steps are done, and repeat the last figures at the
            end of an epoch; None measures at the end of each epoch.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        *,
        every_steps: int | None = None,
    ):
        super().__init__(every_steps)
        self.dataset = dataset

    def evaluate(self) -> dict[str, float]:
        embeds = self.embedder.pairs(self.dataset)
        images, texts, pairs = distinct_pairs(embeds["image_ids"], embeds["text_ids"])
        return retrieval_metrics(
            embeds["image_embeds"][images], embeds["text_embeds"][texts], pairs
        )


class ZeroShotEvaluation(_Evaluation):
    """Measures zero-shot classification of held-out images: `val_top1`, `val_top5` and so on.

    The figures are those of `evaluation.zero_shot_metrics` with `val_` before the name.

    Args:
        pixel_values: float32 (n, h, w, 3).
        labels: (n,), the place of each image's class in class_names.
        class_names: what the classes are called.
        tokenizer: the tokenizer of the model.
        templates: such as `a photo of a {}.`, whose mean stands for a class.
        every_steps: as in RetrievalEvaluation.
    """

    def __init__(
        self,
        pixel_values: Any,
        labels: Any,
        class_names: Sequence[str],
        tokenizer: AlignTokenizer,
        *,
        templates: Sequence[str] = ("{}",),
        every_steps: int | None = None,
    ):
        super().__init__(every_steps)
        self.pixel_values, self.labels = np.asarray(pixel_values), np.asarray(labels)
        self.class_names, self.templates = class_names, templates
        self.tokenizer = tokenizer

    def evaluate(self) -> dict[str, float]:
        images = [self.embedder.images(batch) for batch in in_batches(self.pixel_values)]
        classes = class_embeddings(self.class_names, self.templates, self._embed_text)
        return zero_shot_metrics(np.concatenate(images), classes, self.labels)

    def _embed_text(self, texts: list[str]) -> np.ndarray:
        batches = [
            self.embedder.texts(self.tokenizer(part, padding="longest"))
            for part in in_batches(texts)
        ]
        return np.concatenate(batches)
