"""Batches of images and texts, and what a request asks of them."""

import dataclasses
import io
import itertools
import os
import pathlib
import re
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from align_tf.client.endpoint import (
    AlignServerError,
)

Image = str | os.PathLike | bytes | PIL.Image.Image

_BYTES = (bytes, bytearray, memoryview)
# the caller's name for items: what is one of them, and not several
_ONE = {"images": (str, os.PathLike, *_BYTES, PIL.Image.Image), "texts": (str, bytes)}
# input that the server's messages name by row: what the caller knows it as
_CALLERS_NAMES = {"image_bytes": "images", "texts": "texts"}


@dataclasses.dataclass(frozen=True)
class Classification:
    """Zero-shot classification of n images over m labels.

    A label counts once, however often it is given, and each of its columns has its probability:
    the columns of the distinct labels sum to 1 in each row. An empty text for a label is none: its
    logit is the lowest float32, its probability 0.

    Attributes:
        labels: the m labels as the caller gave them.
        logits: float32 (n, m).
        probs: float32 (n, m).
    """

    labels: list[str]
    logits: np.ndarray
    probs: np.ndarray

    @property
    def best(self) -> list[str]:
        """The most probable label of each image."""
        return [self.labels[index] for index in self.probs.argmax(axis=1)]


def classification(
    labels: Sequence[str], prompts: Sequence[str], logits: np.ndarray
) -> Classification:
    """Classifies by a model's logits, as the `serving_default` of an export does.

    Args:
        labels: the m labels.
        prompts: what the model read for each.
        logits: (n, m).

    Returns:
        The labels with their logits and probabilities.
    """
    prompts = np.array(prompts, object)
    logits = np.where(prompts == "", np.finfo(np.float32).min, np.asarray(logits, np.float32))
    _, first, place = np.unique(prompts, return_index=True, return_inverse=True)
    distinct = logits[:, first].astype(np.float64)
    odds = np.exp(distinct - distinct.max(axis=1, keepdims=True)) * (prompts[first] != "")
    probs = odds / np.maximum(odds.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    return Classification(list(labels), logits, probs[:, place].astype(np.float32))


class Batch(NamedTuple):
    start: int  # the place of its first item in the caller's list
    items: list[Any]


class Job(NamedTuple):
    items: str  # the caller's name for them
    signature: str
    inputs: Callable[[Batch], dict[str, Any]]
    result: Callable[[dict[str, np.ndarray]], Any]


def checked_labels(labels: Iterable[str], template: str) -> tuple[list[str], list[str]]:
    """Returns the labels, and what the model reads for each.

    Raises:
        ValueError: there is no label, or the template is without {}.
        TypeError: the labels are no list of strings, or the template is no string.
    """
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise TypeError(f"labels={labels!r}: expected a list of strings")
    labels = list(labels)
    if not labels:
        raise ValueError("labels: expected at least one")
    for place, label in enumerate(labels):
        if not isinstance(label, str):
            raise TypeError(f"labels[{place}]: expected a string, got {type(label).__name__}")
    if not isinstance(template, str):
        raise TypeError(f"template={template!r}: expected a string")
    if "{}" not in template:
        raise ValueError(f"template={template!r}: expected a {{}} for the label")
    return labels, [template.replace("{}", label) for label in labels]


def classify_job(labels: list[str], template: str) -> Job:
    labels, prompts = checked_labels(labels, template)

    def inputs(batch: Batch) -> dict[str, Any]:
        return {"image_bytes": _all_encoded(batch), "labels": [prompts] * len(batch.items)}

    def result(outputs: dict[str, np.ndarray]) -> Classification:
        # A server that merges requests answers with the widest of their lists.
        logits, probs = (outputs[name][:, : len(labels)] for name in ("logits", "probs"))
        return Classification(labels, logits, probs)

    return Job("images", "serving_default", inputs, result)


IMAGES = Job(
    "images",
    "embed_image",
    lambda batch: {"image_bytes": _all_encoded(batch)},
    lambda outputs: outputs["image_embeds"],
)
TEXTS = Job(
    "texts",
    "embed_text",
    lambda batch: {"texts": _all_texts(batch)},
    lambda outputs: outputs["text_embeds"],
)


def joined(answers: Iterable[Classification]) -> Classification:
    answers = list(answers)
    logits, probs = ([getattr(a, name) for a in answers] for name in ("logits", "probs"))
    return Classification(answers[0].labels, np.concatenate(logits), np.concatenate(probs))


def single_rows(answer: Classification) -> Iterator[Classification]:
    for row in range(len(answer.probs)):
        rows = slice(row, row + 1)
        yield Classification(answer.labels, answer.logits[rows], answer.probs[rows])


def several(items: Any, name: str) -> Any:
    """Returns what a caller gives, one or several, as several.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(items, _ONE[name]):
        return [items]
    # A file yields its lines, a mapping its keys.
    if isinstance(items, (Mapping, io.IOBase)) or not isinstance(items, (Iterable, AsyncIterable)):
        raise TypeError(f"{name}: expected one or several, got {type(items).__name__}")
    return items


def in_batches(items: Iterable[Any], size: int) -> Iterator[Batch]:
    items, start = iter(items), 0
    while batch := list(itertools.islice(items, size)):
        yield Batch(start, batch)
        start += size


def _all_encoded(batch: Batch) -> list[bytes]:
    return [_encoded(image, batch.start + row) for row, image in enumerate(batch.items)]


def _all_texts(batch: Batch) -> list[str | bytes]:
    for row, text in enumerate(batch.items):
        if not isinstance(text, _ONE["texts"]):
            place, kind = batch.start + row, type(text).__name__
            raise TypeError(f"texts[{place}]: expected a string, got {kind}")
    return batch.items


def _encoded(image: Image, place: int) -> bytes:
    if isinstance(image, _BYTES):
        return bytes(image)
    if isinstance(image, PIL.Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()
    if isinstance(image, (str, os.PathLike)):
        return pathlib.Path(image).read_bytes()
    raise TypeError(
        f"images[{place}]: expected a path, bytes or a PIL image, got {type(image).__name__}"
    )


def with_callers_row(error: AlignServerError, batch: Batch) -> AlignServerError:
    """Returns the server's refusal, naming the row as the caller counts it."""
    found = re.search(rf"\b({'|'.join(_CALLERS_NAMES)})\[(\d+)\]", str(error))
    if found is None:
        return error
    row = int(found[2])
    if row >= len(batch.items):
        return AlignServerError(f"{error} (a row of another request in the batch)", error.status)
    place = batch.start + row
    named = f"{_CALLERS_NAMES[found[1]]}[{place}]"
    return AlignServerError(str(error).replace(found[0], named), error.status, place)


async def in_async_batches(items: Any, size: int) -> AsyncIterator[Batch]:
    if not isinstance(items, AsyncIterable):
        for batch in in_batches(items, size):
            yield batch
        return
    start, batch = 0, []
    async for item in items:
        batch.append(item)
        if len(batch) == size:
            yield Batch(start, batch)
            start, batch = start + size, []
    if batch:
        yield Batch(start, batch)
