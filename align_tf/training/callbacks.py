"""Keras callbacks that evaluate a model while it trains, keep it, and count its compilations."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from align_tf.addresses import place
from align_tf.evaluation import tasks
from align_tf.evaluation.embedder import Embedder, check_ends, in_batches
from align_tf.evaluation.identity import text_contents
from align_tf.evaluation.retrieval import distinct_pairs, retrieval_metrics
from align_tf.evaluation.zero_shot import check_labels, class_embeddings, zero_shot_metrics
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.preprocessing.tokenization import AlignTokenizer
from align_tf.training import resume

# What JAX tells of a compilation, and the name that Keras's training step has there.
COMPILATION, TRAIN_STEP = "/jax/core/compile/backend_compile_duration", "jit(train_step)"


class _Evaluation(keras.callbacks.Callback):
    """Writes figures into the logs; a subclass's `evaluate` measures them.

    Where the optimizer keeps moving averages of the weights, these are measured.
    """

    make_embedder: Callable[[keras.Model], Embedder] = Embedder  # several may share one

    def __init__(self, every_steps: int | None, name: str = ""):
        super().__init__()
        self.prefix = f"val_{name}_" if name else "val_"
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: expected 1 or more, or None")
        self.every_steps = every_steps
        self.async_safe = every_steps is None  # else Keras waits after each batch
        self._step = 0
        self._figures: dict[str, float] = {}

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self.embedder = self.make_embedder(model)

    def evaluate(self) -> dict[str, float]:
        raise NotImplementedError

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._step = self.model.trained_batches

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self.every_steps is None:
            return
        last, self._step = self._step, self._model.trained_batches
        # Not a remainder of 0: with steps_per_execution a batch stands for several.
        if self._step // self.every_steps > last // self.every_steps:
            self._measure(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self.every_steps is None:
            self._measure(logs)
        elif logs is not None:
            logs.update(self._figures)

    def _measure(self, logs: dict[str, float] | None) -> None:
        with resume.averaged(self.model):  # on JAX, reading it brings the weights up to date
            self._figures = {
                f"{self.prefix}{name}": value for name, value in self.evaluate().items()
            }
        if logs is not None:
            logs.update(self._figures)


class RetrievalEvaluation(_Evaluation):
    """Measures retrieval on held-out pairs: `val_r1_i2t`, `val_median_rank_t2i` and so on.

    The figures are those of `evaluation.retrieval_metrics` with `val_` before the name. Callbacks
    that come after this one, History, the progress bar and TensorBoard see them:
    `EarlyStopping("val_r1_i2t", mode="max")`. They are those of `align-tf evaluate` where the pairs
    are the same; `make_dataset` takes the first caption of an image, `align-tf evaluate` all.

    Args:
        dataset: batches as `fit` takes them, iterated anew each time, or one dict of arrays; as
            `Embedder.pairs` takes it.
        every_steps: measure whenever so many batches are done, and repeat the last figures at the
            end of an epoch; None measures at the end of each epoch.
        name: of the data set, where there are several: `val_<name>_r1_i2t`.

    Raises:
        ValueError: the data set is endless, or an iterator that is gone after one pass.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        *,
        every_steps: int | None = None,
        name: str = "",
    ):
        super().__init__(every_steps, name)
        check_ends(dataset)
        if isinstance(dataset, Iterator):
            raise ValueError(
                f"dataset of {type(dataset).__name__}, gone after one pass: expected a data set, "
                "which is iterated anew each time"
            )
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

    Raises:
        ValueError: two of the class names are the same to the model, or every_steps is below 1.
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
        check_labels(class_names, text_contents(tokenizer(list(class_names), padding="longest")))
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


class ZeroShotFolders(_Evaluation):
    """As ZeroShotEvaluation, of a folder with a sub-folder of images for each class.

    Args:
        processor: of the model.
        options: as `evaluation.tasks.evaluate` takes them.
        opened: what `evaluation.tasks.read` made of them.
        name: of the data set, where there are several.
    """

    def __init__(self, processor: AlignProcessor, options: Any, opened: dict, *, name: str = ""):
        super().__init__(None, name)
        self.processor, self.options, self.opened = processor, options, opened

    def evaluate(self) -> dict[str, float]:
        arguments = (self.processor, self.options, self.opened, self.embedder)
        return tasks.evaluate(self._model, *arguments)["metrics"]


class ResumableCheckpoint(resume.MeasuresAverages):
    """Writes a checkpoint after each epoch of `fit`, from which a training goes on.

    `from_pretrained` loads the folder `checkpoint-<batches>`, which also holds the optimizer and
    the states of dropout; it appears when it is whole. With a moving average of the weights, it
    holds the average, and the validation of `fit` measures that. A new process compiles the same
    model and goes on, to the weights of a training that was not interrupted:

        checkpoints = ResumableCheckpoint("drive/align", processor)
        step = checkpoints.restore(model)
        dataset = make_dataset(..., training=True, start_step=step)
        model.fit(dataset, initial_epoch=step // steps_per_epoch, epochs=epochs,
                  steps_per_epoch=steps_per_epoch, callbacks=[checkpoints])

    Args:
        output: the folder of the training, such as one on a mounted drive or `gs://bucket/align`.
        processor: saved with the model.
        keep: how many checkpoints stay.
    """

    def __init__(self, output: str | os.PathLike, processor: AlignProcessor, *, keep: int = 2):
        super().__init__()
        if keep < 1:
            raise ValueError(f"keep={keep}: expected 1 or more")
        self.output, self.processor, self.keep = place(output), processor, keep

    def restore(self, model: keras.Model) -> int:
        """Puts the last whole checkpoint into a compiled model.

        Args:
            model: the model, frozen and compiled as the one that was saved.

        Returns:
            The batches it has trained on, 0 where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none is whole or of
                this model.
        """
        model.optimizer.build(model.trainable_variables)
        return resume.restore_last(self.output, model)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        step = self.model.trained_batches  # on JAX, self.model is brought up to date
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss}, so no checkpoint is written")
        resume.save(self.output, step, self.model, self.processor, self.keep)


class CompilationCount(keras.callbacks.Callback):
    """Counts how often JAX compiles the training step: once for each shape of a batch.

    Attributes:
        count: compilations while `fit` ran with this callback.
    """

    def __init__(self) -> None:
        super().__init__()
        if keras.backend.backend() != "jax":
            raise RuntimeError(
                f"compilations are counted on JAX, Keras runs on {keras.backend.backend()}"
            )
        self.count = 0

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        import jax

        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, seconds: float, *, fun_name: str = "", **_: Any) -> None:
        self.count += event == COMPILATION and fun_name == TRAIN_STEP
