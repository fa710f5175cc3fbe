"""Queries of text, image or both over an index."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from align_tf.client.align_client import AlignClient
from align_tf.hub import resolve_folder
from align_tf.models.align import AlignModel
from align_tf.models.fingerprint import fingerprint, load_model
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.search.encoder import Encoder
from align_tf.search.index import TOP_K, Hit, Index
from align_tf.search.vectors import as_float32

SAME_IMAGE = 0.99  # the similarity that two embeddings of one picture have at least


class Searcher:
    """Answers queries over an index.

    Args:
        index: the index, or its folder.
        model: the model that embedded the collection: a checkpoint's name, or the model; None
            takes the name that the index holds, where that is on this machine: it is not fetched.
        processor: the model's; None loads it by the model's name.
        client: of a server that has the model, in the place of model and processor.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as `Index` and `AlignModel.from_pretrained`.
        ValueError: the index holds the embeddings of another model.
    """

    def __init__(
        self,
        index: Index | str | os.PathLike,
        *,
        model: str | os.PathLike | AlignModel | None = None,
        processor: AlignProcessor | None = None,
        client: AlignClient | None = None,
    ):
        self.index = index if isinstance(index, Index) else Index(index)
        about = self.index.about
        if client is not None:
            self.encoder = client
            self._check_server()
            return
        name = "the model given" if isinstance(model, AlignModel) else str(model or "")
        if model is None:
            name, model = about["model"], self._own_model(about["model"])
        model, processor = load_model(model, processor)
        found = fingerprint(model, processor)
        if found != about["fingerprint"]:
            raise ValueError(
                f"{self.index.folder}: holds embeddings of {about['model'] or 'another model'} "
                f"(fingerprint {about['fingerprint'][:8]}), not of {name} ({found[:8]}): expected "
                "that model, or the collection embedded and indexed again"
            )
        self.encoder = Encoder(model, processor)

    def embed_query(
        self,
        text: str | None = None,
        image: Any = None,
        add: str | Sequence[str] = (),
        subtract: str | Sequence[str] = (),
    ) -> np.ndarray:
        """Embeds a query: image + text + added texts - subtracted ones, of unit length.

        The parts are of unit length before they are summed (ALIGN, arXiv 2102.05918, section 7).

        Args:
            text: what the images show.
            image: a picture like them, as `AlignProcessor` takes it; of a server, as
                `AlignClient` does.
            add: texts that the result is moved towards.
            subtract: texts that it is moved away from.

        Returns:
            (d,).

        Raises:
            ValueError: there is neither text nor image, a text is blank, the image cannot be
                decoded, or the parts cancel out.
        """
        add = [add] if isinstance(add, str) else list(add)
        subtract = [subtract] if isinstance(subtract, str) else list(subtract)
        if text is None and image is None:
            raise ValueError("a query needs a text or an image")
        plus = [*([] if text is None else [text]), *add]
        if not all(part.strip() for part in (*plus, *subtract)):
            raise ValueError("a blank text in the query: expected words")
        parts = []
        if image is not None:
            parts.append(self.encoder.embed_images([image])[0])
        if plus or subtract:
            signs = np.array([1.0] * len(plus) + [-1.0] * len(subtract))
            parts.extend(signs[:, None] * self.encoder.embed_texts([*plus, *subtract]))
        total = np.sum(parts, axis=0)
        length = np.linalg.norm(total)
        if not length > 1e-6:
            raise ValueError("the parts of the query cancel out")
        return as_float32(total / length)

    def search(
        self,
        text: str | None = None,
        image: Any = None,
        add: str | Sequence[str] = (),
        subtract: str | Sequence[str] = (),
        k: int = TOP_K,
    ) -> list[Hit]:
        """Finds the images nearest to a query, the nearest first.

        Args:
            text: as `embed_query`.
            image: as `embed_query`.
            add: as `embed_query`.
            subtract: as `embed_query`.
            k: how many.

        Returns:
            k images, fewer where the collection has not so many.

        Raises:
            ValueError: as `embed_query`, or k is less than 1.
        """
        query = self.embed_query(text, image, add, subtract)
        scores, rows = self.index.search(query[None], k)
        return self.index.hits(scores[0], rows[0])

    def _own_model(self, name: str) -> pathlib.Path:
        """Finds the model that the index names, which may come from anyone, on this machine."""
        if not name:
            raise ValueError(f"{self.index.folder}: does not tell its model's name: expected model")
        try:
            return resolve_folder(name, local_files_only=True, weights=True)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.index.folder}: of a model {name!r}, which is not on this machine: expected "
                "--model with that name, where it may be fetched, or with its folder"
            ) from error

    def _check_server(self) -> None:
        """Has the server embed a picture of the collection anew; it has to be found again."""
        rows = range(min(len(self.index), TOP_K))
        hits = self.index.hits(np.zeros(len(rows)), np.array(rows))
        shown = (hit.path for hit in hits if hit.path and not hit.outside)
        path = next(filter(os.path.isfile, shown), None)
        if path is None:  # its width is all that can be checked
            embeds = self.encoder.embed_texts(["a"])
            self.index.search(embeds, 1)
            return
        scores, _ = self.index.search(self.encoder.embed_images([path]), 1)
        if scores[0, 0] < SAME_IMAGE:
            raise ValueError(
                f"{self.index.folder}: the server's embedding of {path} is {scores[0, 0]:.2f} near "
                f"to the collection's, expected 1: it serves another model than "
                f"{self.index.about['model'] or 'the one of the index'}"
            )
