"""Embedding and writing any of a collection's shards."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from align_tf.addresses import Place, is_remote
from align_tf.data import left_out
from align_tf.data.sources import Source
from align_tf.evaluation.embedder import Embedder
from align_tf.graph_errors import plain
from align_tf.preprocessing import image_processing
from align_tf.preprocessing.apart import functions_apart
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.search.collection import COLUMNS, SKIPPED_NAMED, Settings, Shard, write_shard
from align_tf.search.thumbnail import thumbnail, to_jpeg

BATCHES_AHEAD = 2
THUMBNAIL = 160  # pixels

_graph = tf.autograph.experimental.do_not_convert


class ShardWriter:
    """Embeds and writes any of a collection's shards.

    Args:
        opened: the source.
        settings: of the collection.
        output: the folder.
        batch_size: images embedded at a time; the first batch of a shard starts with it.
        embedder: of the model.
        processor: of the model.
    """

    def __init__(
        self,
        opened: Source,
        settings: Settings,
        output: Place,
        batch_size: int,
        embedder: Embedder,
        processor: AlignProcessor,
    ):
        self.opened, self.settings, self.output = opened, settings, output
        self.batch_size, self.embedder, self.processor = batch_size, embedder, processor

    def write(self, numbers: range, advance: Callable[[int], None] = lambda n: None) -> Iterator:
        """Writes shards that follow one another.

        Args:
            numbers: which.
            advance: is told how many records each batch has brought.

        Yields:
            The `Shard` of each that is written.
        """
        size = self.settings.shard_size
        first, stop = numbers.start * size, min(numbers.stop * size, self.settings.records)
        batches = self._batches(first, stop)
        for number in numbers:
            left = min(size, stop - number * size)
            parts, start = [], number * size
            while left > 0:
                part = self._embed(next(batches), start)
                parts.append(part)
                start, left = start + part["records"], left - part["records"]
                advance(part["records"])
            yield self._save(number, parts)

    def _batches(self, first: int, stop: int) -> Iterator[Any]:
        elements = self.opened.elements(None, first).take(stop - first)

        @_graph
        def load(_: tf.Tensor, elements: Any) -> dict[str, Any]:
            loaded = self.opened.load(elements)
            images = loaded["image_bytes"]
            with functions_apart():
                pixels, problems, _ = self.processor.image_processor.try_pixel_values(images)
            problems = tf.where(images == "", left_out.NO_IMAGE, problems)
            return {**loaded, "pixel_values": pixels, "problem": problems}

        batches = elements.ragged_batch(self.batch_size).enumerate()
        batches = batches.map(load, num_parallel_calls=BATCHES_AHEAD, deterministic=True)
        try:
            yield from batches.prefetch(BATCHES_AHEAD)
        except tf.errors.OpError as error:
            raise ValueError(
                f"{self.opened.name}: cannot be read: {plain(error.message)}"
            ) from error
        raise ValueError(f"{self.opened.name}: fewer records than were counted; it has changed")

    def _embed(self, batch: dict[str, Any], first: int) -> dict[str, Any]:
        """Embeds a batch whose first record is the collection's `first`."""
        ids = [key.decode(errors="replace") for key in batch["key"].numpy()]
        captions = [
            next((text.decode(errors="replace") for text in texts if text.strip()), None)
            for texts in batch["captions"].to_list()
        ]
        problems = batch["problem"].numpy()
        fine = np.flatnonzero(problems == image_processing.FINE)
        embeds = self.embedder.images(batch["pixel_values"])[fine]
        wrong = np.flatnonzero(~np.isfinite(embeds).all(axis=1))
        if wrong.size:
            raise ValueError(f"{ids[fine[wrong[0]]]}: its embedding is not finite")
        paths = self.opened.paths and self.opened.paths[first : first + len(ids)]
        captions = [captions[row] for row in fine]
        images = batch["image_bytes"].numpy()
        return {
            "records": len(ids),
            "id": [ids[row] for row in fine],
            "path": [paths[row] if paths else None for row in fine],
            "caption": captions,
            "thumbnail": [
                None if paths and _is_file(paths[row]) else _small(images[row]) for row in fine
            ],
            "image_embeds": embeds,
            "text_embeds": self._embed_texts(captions),
            "skipped": {
                ids[row]: left_out.REASONS[problems[row]]
                for row in np.flatnonzero(problems != image_processing.FINE)
            },
        }

    def _embed_texts(self, captions: list[str | None]) -> np.ndarray:
        """Embeds captions, (n, d); rows of zeros where there is none."""
        embeds = np.zeros((len(captions), self.settings.dim), np.float32)
        said = [row for row, text in enumerate(captions) if text is not None]
        if said:
            texts = [captions[row] for row in said]
            embeds[said] = self.embedder.texts(self.processor.tokenizer(texts, padding="longest"))
        return embeds

    def _save(self, number: int, parts: list[dict[str, Any]]) -> Shard:
        columns = {
            name: list(itertools.chain.from_iterable(part[name] for part in parts))
            for name in COLUMNS
        }
        for name in ("image_embeds", "text_embeds"):
            columns[name] = np.concatenate([part[name] for part in parts])
        skipped = dict(itertools.chain.from_iterable(part["skipped"].items() for part in parts))
        named = dict(itertools.islice(skipped.items(), SKIPPED_NAMED))
        rows = len(columns["id"])
        records = sum(part["records"] for part in parts)
        shard = Shard(number, rows, records - rows, named)
        write_shard(self.output, self.settings, shard, columns)
        return shard


def _is_file(path: str | None) -> bool:
    return path is not None and not is_remote(path)


def _small(image: bytes | None) -> bytes | None:
    picture = thumbnail(image, THUMBNAIL)
    return picture and to_jpeg(picture)
