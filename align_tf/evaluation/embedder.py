"""Embedding batches with both towers, compiled once: batches in, NumPy arrays out."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from align_tf.evaluation.identity import RowIds, image_contents, text_contents
from align_tf.graph_errors import plain_errors
from align_tf.models.align import AlignModel
from align_tf.models.fit_watch import is_endless
from align_tf.models.sharded_state import check_not_gathered, whole_beside
from align_tf.preprocessing.tokenization import TOKEN_INPUTS
from align_tf.progress import track

BATCH_SIZE = 64


class Embedder:
    """A model's two towers, compiled on first use; they follow the model's weights.

    Args:
        model: the model; resizing its embeddings or pruning its heads asks for a new Embedder.
    """

    def __init__(self, model: AlignModel):
        text_features = AlignModel.get_text_features
        if keras.backend.backend() == "tensorflow":
            from align_tf.models.packing import text_features
        # Here, since within what is compiled there are no values to look at.
        self._check_images = model.vision_model._check_inputs
        self._check_texts = model.text_model._check_inputs
        self._images = _compiled(
            model, lambda x: ops.normalize(model.get_image_features(x), axis=-1)
        )
        self._texts = _compiled(model, lambda x: ops.normalize(text_features(model, x), axis=-1))

    def images(self, pixel_values: Any) -> np.ndarray:
        """Embeds images.

        Args:
            pixel_values: float32 (n, h, w, 3).

        Returns:
            (n, d), of unit length.
        """
        pixel_values = _native(pixel_values)
        self._check_images({"pixel_values": pixel_values})
        return ops.convert_to_numpy(self._images(pixel_values))

    def texts(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Embeds texts.

        Args:
            inputs: `input_ids`, and `attention_mask` and `token_type_ids` where there are, (m, t).

        Returns:
            (m, d), of unit length.
        """
        inputs = {name: _native(inputs[name]) for name in TOKEN_INPUTS if name in inputs}
        self._check_texts(inputs)
        return ops.convert_to_numpy(self._texts(inputs))

    def pairs(
        self, dataset: Mapping[str, Any] | Iterable[Mapping[str, Any]], progress: bool = False
    ) -> dict[str, np.ndarray]:
        """Embeds a data set of pairs.

        Args:
            dataset: batches as `AlignModel.fit` takes them, or one dict of arrays. A row of
                `sample_weight` 0 is left out. Rows of one `image_ids` of 0 or more are one image,
                and of one `text_ids` one text. Where they are missing or below 0, the fingerprints
                of `make_dataset`, rows of the same pixels are one image, and of the same tokens
                one text, compared in full.
            progress: show it on stderr.

        Returns:
            `image_embeds` and `text_embeds` (p, d), `image_ids` and `text_ids` (p,); the rows of
            a pair are the same in all of them.

        Raises:
            ValueError: the data set holds no pair, is endless, or has ids in some rows alone.
        """
        check_ends(dataset)
        row_ids = {name: RowIds(name) for name in ("image_ids", "text_ids")}
        batches = track(_batches(dataset), "Embedding", show=progress)
        with plain_errors():
            parts = [self._pair_batch(batch, row_ids) for batch in batches]
        if not any(len(part["image_ids"]) for part in parts):
            raise ValueError("the data set holds no pair to embed")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _pair_batch(
        self, batch: Mapping[str, Any], row_ids: dict[str, RowIds]
    ) -> dict[str, np.ndarray]:
        embeds = {
            "image_embeds": self.images(batch["pixel_values"]),
            "text_embeds": self.texts(batch),
        }
        size = len(embeds["image_embeds"])
        kept = np.asarray(batch.get("sample_weight", np.ones(size))) != 0
        part = {name: values[kept] for name, values in embeds.items()}
        tokens = {name: np.asarray(batch[name])[kept] for name in TOKEN_INPUTS if name in batch}
        contents = {
            "image_ids": lambda: image_contents(np.asarray(batch["pixel_values"])[kept]),
            "text_ids": lambda: text_contents(tokens),
        }
        for name, ids in row_ids.items():
            given = np.asarray(batch[name])[kept] if name in batch else None
            part[name] = ids(given, contents[name], int(kept.sum()))
        return part


def check_ends(dataset: Any) -> None:
    """Refuses a `tf.data.Dataset` that says that it is endless.

    Raises:
        ValueError: it does.
    """
    if is_endless(dataset):
        raise ValueError(
            "the data set is endless: expected one that ends, such as make_dataset(...) without "
            "training, or dataset.take(100)"
        )


def in_batches(values: Any, size: int = BATCH_SIZE) -> list:
    """Cuts a sequence or an array into pieces of `size` rows, the last one shorter."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def batched(items: Iterable, size: int = BATCH_SIZE) -> Iterator[list]:
    """Yields lists of `size` items, the last one shorter, of what need not be a sequence."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _batches(dataset: Any) -> Iterable[Mapping[str, Any]]:
    if not isinstance(dataset, Mapping):
        return dataset
    pieces = [in_batches(np.asarray(values)) for values in dataset.values()]
    return [dict(zip(dataset, batch, strict=True)) for batch in zip(*pieces, strict=True)]


def _native(value: Any) -> Any:
    """Takes an array or a TensorFlow tensor to what Keras's backend takes."""
    return value if keras.backend.backend() == "tensorflow" else np.asarray(value)


def _compiled(model: AlignModel, function: Callable) -> Callable:
    """Compiles a function of one input that calls the model."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, reduce_retracing=True, autograph=False)
    import jax

    @jax.jit
    def run(values: list, inputs: Any) -> Any:
        mapping = whole_beside(model, zip(model.variables, values, strict=True))
        with keras.StatelessScope(mapping):
            return function(inputs)

    def call(inputs: Any) -> Any:
        check_not_gathered(model)
        return run([variable.value for variable in model.variables], inputs)

    return call
