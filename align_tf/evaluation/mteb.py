"""A model as `mteb` takes one, for its tasks of images and texts (MIEB, arXiv 2504.10471).

    import mteb
    from align_tf.evaluation.mteb import MtebEncoder

    tasks = mteb.get_tasks(tasks=["OxfordPetsZeroShot", "Flickr30kT2IRetrieval"])
    results = mteb.evaluate(MtebEncoder("my-align"), tasks, cache=mteb.ResultCache("results"))
    print(results.to_dataframe())

Without `cache` mteb files results in its own folder; either way it measures nothing twice.
"""

import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from align_tf.evaluation.embedder import Embedder, batched
from align_tf.extras import extra
from align_tf.models.align import AlignModel
from align_tf.models.fingerprint import fingerprint, load_model
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.preprocessing.tokenization import MAX_LENGTH

with extra("mteb", "a model for MTEB needs mteb"):
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from tqdm.auto import tqdm

FRAMEWORKS = {"tensorflow": "TensorFlow", "jax": "JAX"}  # backend of Keras: as mteb calls it
INPUTS = ("text", "image")  # columns of a batch; all others say something of these
BATCH_SIZE = 32  # mteb's own


class MtebEncoder(AbsEncoder):
    """Embeds what `mteb` hands it: texts, PIL images of any mode of 8 bits, or both in one.

    A row of a text and an image is the sum of their embeddings, each of unit length (ALIGN, arXiv
    2102.05918, section 7), as in `align_tf.search`; mteb's own ALIGN sums them as they come.
    No task's prompt is put before a text, since ALIGN was trained on none.

    Args:
        model: the model, or what `AlignModel.from_pretrained` takes.
        processor: the model's; None loads it by the model's name.
        name: what the results are filed under; None takes the folder's. The revision beside it is
            a digest of the weights: mteb takes no figures of one checkpoint for another's.

    Raises:
        FileNotFoundError, ValueError: as `AlignModel.from_pretrained`, or there is a model and no
            processor.
    """

    def __init__(
        self,
        model: AlignModel | str | os.PathLike,
        processor: AlignProcessor | None = None,
        *,
        name: str | None = None,
    ):
        self.model, self.processor = load_model(model, processor)
        self.embedder = Embedder(self.model)
        if name is None:
            name = "model" if isinstance(model, AlignModel) else pathlib.Path(model).resolve().name
        self.mteb_model_meta = _described(self.model, self.processor, f"align_tf/{name}")

    def encode(
        self,
        inputs: Iterable[dict[str, list]],
        *,
        batch_size: int = BATCH_SIZE,
        show_progress_bar: bool = True,
        precision: str = "float32",
        **about: Any,
    ) -> np.ndarray:
        """Embeds the rows of a DataLoader.

        Args:
            inputs: batches of the columns `text`, `image` or both, of any size.
            batch_size: rows embedded at a time.
            show_progress_bar: show it on stderr.
            precision: float32.
            **about: the task and the part of it, of no matter to this model.

        Returns:
            float32 (n, d), of unit length.

        Raises:
            ValueError: another precision, a batch of neither column, or an image that the
                processor does not take.
        """
        if precision != "float32":
            raise ValueError(f"precision={precision!r}: expected 'float32'")
        inputs = tqdm(inputs, desc="Embedding", disable=not show_progress_bar)
        rows = itertools.chain.from_iterable(map(_rows, inputs))
        return np.concatenate([self._embed(batch) for batch in batched(rows, batch_size)])

    def _embed(self, rows: list[dict[str, Any]]) -> np.ndarray:
        parts = []
        if "image" in rows[0]:
            images = [row["image"] for row in rows]
            parts.append(self.embedder.images(self.processor(images=images)["pixel_values"]))
        if "text" in rows[0]:
            texts = [row["text"] for row in rows]
            parts.append(self.embedder.texts(self.processor(text=texts, padding="longest")))
        total = np.sum(parts, axis=0, dtype=np.float32)
        return total if len(parts) == 1 else total / np.linalg.norm(total, axis=1, keepdims=True)


def _described(model: AlignModel, processor: AlignProcessor, name: str) -> ModelMeta:
    """Says of a model what mteb writes beside its results; what is not known is None."""
    known = {
        "name": name,
        "revision": fingerprint(model, processor),
        "framework": [FRAMEWORKS[keras.backend.backend()]],
        "modalities": ["image", "text"],
        "n_parameters": model.count_params(),
        "embed_dim": model.config.projection_dim,
        "max_tokens": MAX_LENGTH,
        "similarity_fn_name": "cosine",
        "use_instructions": False,
    }
    required = (key for key, field in ModelMeta.model_fields.items() if field.is_required())
    return ModelMeta(**{**dict.fromkeys(required), **known})


def _rows(batch: dict[str, list]) -> Iterator[dict[str, Any]]:
    columns = {name: batch[name] for name in INPUTS if name in batch}
    if not columns:
        raise ValueError(f"a batch of {', '.join(batch)}: expected {' or '.join(INPUTS)}")
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))
