"""A client of an exported ALIGN model behind TensorFlow Serving, over REST or gRPC."""

import asyncio
import collections
import dataclasses
import io
import itertools
import os
import pathlib
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from align_tf.client.rest import (
    PROTOCOLS,
    AlignServerError,
    AsyncGrpc,
    Attempts,
    Endpoint,
    Grpc,
    Rest,
    Signature,
    TensorSpec,
    Tls,
    specs,
    split_address,
)

__all__ = [
    "AlignClient",
    "AlignServerError",
    "AsyncAlignClient",
    "Classification",
    "Signature",
    "TensorSpec",
    "Tls",
    "VersionStatus",
]

Image = str | os.PathLike | bytes | PIL.Image.Image

# input that the server's messages name by row: what the caller knows it as
_CALLERS_NAMES = {"image_bytes": "images", "texts": "texts"}


@dataclasses.dataclass(frozen=True)
class Classification:
    """Zero-shot classification of n images over m labels.

    Attributes:
        labels: the m labels as the caller gave them.
        logits: float32 (n, m).
        probs: float32 (n, m), each row sums to 1.
    """

    labels: list[str]
    logits: np.ndarray
    probs: np.ndarray

    @property
    def best(self) -> list[str]:
        """The most probable label of each image."""
        return [self.labels[index] for index in self.probs.argmax(axis=1)]


class VersionStatus(NamedTuple):
    """A version of the model; `state` is AVAILABLE when it answers."""

    version: int
    state: str
    error_message: str


class _Client:
    """What both clients know: where the server is, and how requests and answers look."""

    def __init__(
        self,
        transport: Callable,
        endpoint: Endpoint,
        timeout: float,
        retries: int,
        batch_size: int,
        in_flight: int,
    ):
        self.timeout, self.retries = timeout, retries
        self.batch_size, self.in_flight = batch_size, in_flight
        for name, least in (("retries", 0), ("batch_size", 1), ("in_flight", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        self.model_name = endpoint.model_name
        self._transport = transport(endpoint)
        self._signatures: dict[str, Signature] = {}

    def _attempts(self) -> Attempts:
        return Attempts(self.timeout, self.retries)


class AlignClient(_Client):
    """Asks a TensorFlow Serving endpoint; safe to use from several threads."""

    def __init__(
        self,
        address: str,
        *,
        model_name: str = "align",
        version_label: str | None = None,
        protocol: str = "rest",
        tls: Tls | None = None,
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 5,
        batch_size: int = 32,
        in_flight: int = 4,
    ):
        """Makes a client; nothing is sent yet.

        Args:
            address: "host" or "host:port", such as "localhost:8501", or a URL, "http://...",
                "https://...", "grpc://..." or "grpcs://...".
            model_name: the name under which the server has the model.
            version_label: the label of the version to ask, such as "stable"; None asks the newest.
            protocol: "rest" (port 8501 unless given) or "grpc" (port 8500).
            tls: how to encrypt; not needed with an address "https://..." or "grpcs://...".
            token: sent as `authorization: Bearer TOKEN`.
            timeout: seconds to wait for the answer to a request, its retries included.
            retries: how often a request is sent again where the server is busy or not there:
                UNAVAILABLE and RESOURCE_EXHAUSTED, 503 and 429, connections refused and reset.
                The pauses grow from 0.1 to 5 seconds.
            batch_size: how many images or texts go into one request.
            in_flight: how many requests the `stream_` methods have under way.

        Raises:
            ValueError: an argument is none of these.
            OSError: a file of `tls` cannot be read.
            ModuleNotFoundError: gRPC needs packages that are not installed.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f'protocol={protocol!r}: expected "rest" or "grpc"')
        host, port, tls = split_address(address, protocol, tls)
        super().__init__(
            Rest if protocol == "rest" else Grpc,
            Endpoint(host, port, tls, token, model_name, version_label),
            timeout,
            retries,
            batch_size,
            in_flight,
        )

    def classify(
        self, images: Image | Iterable[Image], labels: list[str], template: str = "{}"
    ) -> Classification:
        """Zero-shot classification.

        Args:
            images: one image or several: paths, encoded bytes or PIL images.
            labels: the m labels to choose from.
            template: what the model reads for a label, such as "a photo of a {}".

        Returns:
            logits and probs (n, m).

        Raises:
            ValueError: no image, no label, or a template without {}.
            AlignServerError, ConnectionError, TimeoutError: as for predict.
        """
        job = _classify_job(labels, template)
        return _joined(self._ask(job, batch) for batch in self._batches(_several(images), job))

    def embed_images(self, images: Image | Iterable[Image]) -> np.ndarray:
        """Returns the images' embeddings, float32 (n, d), of unit length.

        Args:
            images: one image or several: paths, encoded bytes or PIL images.

        Raises:
            ValueError: no image.
            AlignServerError, ConnectionError, TimeoutError: as for predict.
        """
        batches = self._batches(_several(images), _IMAGES)
        return np.concatenate([self._ask(_IMAGES, batch) for batch in batches])

    def embed_texts(self, texts: str | Iterable[str]) -> np.ndarray:
        """Returns the texts' embeddings, float32 (n, d), of unit length.

        Raises:
            ValueError: no text.
            AlignServerError, ConnectionError, TimeoutError: as for predict.
        """
        batches = self._batches([texts] if isinstance(texts, str) else texts, _TEXTS)
        return np.concatenate([self._ask(_TEXTS, batch) for batch in batches])

    def stream_classify(
        self, images: Iterable[Image], labels: list[str], template: str = "{}"
    ) -> Iterator[Classification]:
        """Yields each image's classification, n = 1, in order; for collections of any size.

        Images are taken from the iterable as requests are made: `in_flight` batches at most are
        read and not yet yielded. Args and Raises: those of classify; no image yields nothing.
        """
        job = _classify_job(labels, template)
        for answer in self._stream(images, job):
            yield from _rows(answer)

    def stream_images(self, images: Iterable[Image]) -> Iterator[np.ndarray]:
        """Yields each image's embedding, float32 (d,), in order, as stream_classify does."""
        for embeds in self._stream(images, _IMAGES):
            yield from embeds

    def stream_texts(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields each text's embedding, float32 (d,), in order, as stream_classify does."""
        for embeds in self._stream(texts, _TEXTS):
            yield from embeds

    def predict(
        self, inputs: Mapping[str, Any], signature_name: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """Runs any signature, in one request.

        Args:
            inputs: arrays or nested lists by name; strings as str or bytes.
            signature_name: the signature.

        Returns:
            The outputs by name, in the signature's dtypes; strings as arrays of bytes objects.

        Raises:
            AlignServerError: the server refused; the message is its own.
            ConnectionError: it cannot be reached.
            TimeoutError: it did not answer in time.
        """
        if signature_name not in self._signatures:
            self._signatures = self.metadata()
        signature = self._signatures.get(signature_name, Signature({}, {}))
        return self._retried(self._transport.predict, inputs, signature_name, signature)

    def status(self) -> list[VersionStatus]:
        """Returns the states of the model's versions, the newest first."""
        return _version_statuses(self._retried(self._transport.status))

    def metadata(self) -> dict[str, Signature]:
        """Returns the signatures of the newest version, or of the label's, by name."""
        return _signatures(self._retried(self._transport.metadata))

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def __enter__(self) -> "AlignClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _retried(self, method: Callable, *arguments: Any) -> Any:
        attempts = self._attempts()
        while True:
            try:
                return method(*arguments, timeout=attempts.timeout)
            except (AlignServerError, ConnectionError) as error:
                time.sleep(attempts.pause(error))

    def _batches(self, items: Iterable[Any], job: "_Job") -> Iterator["_Batch"]:
        batches = _batches(items, self.batch_size)
        first = next(batches, None)
        if first is None:
            raise ValueError(f"{job.items}: expected at least one")
        return itertools.chain([first], batches)

    def _ask(self, job: "_Job", batch: "_Batch") -> Any:
        inputs = job.inputs(batch)
        try:
            return job.result(self.predict(inputs, job.signature))
        except AlignServerError as error:
            raise _with_callers_row(error, batch) from None

    def _stream(self, items: Iterable[Any], job: "_Job") -> Iterator[Any]:
        pool = futures.ThreadPoolExecutor(self.in_flight)
        under_way: collections.deque[futures.Future] = collections.deque()
        try:
            for batch in _batches(items, self.batch_size):
                under_way.append(pool.submit(self._ask, job, batch))
                if len(under_way) == self.in_flight:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class AsyncAlignClient(_Client):
    """AlignClient for asyncio, over gRPC; use it in the event loop that makes it."""

    def __init__(
        self,
        address: str,
        *,
        model_name: str = "align",
        version_label: str | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 5,
        batch_size: int = 32,
        in_flight: int = 4,
    ):
        """Makes a client; nothing is sent yet. Args and Raises: those of AlignClient."""
        host, port, tls = split_address(address, "grpc", tls)
        super().__init__(
            AsyncGrpc,
            Endpoint(host, port, tls, token, model_name, version_label),
            timeout,
            retries,
            batch_size,
            in_flight,
        )

    async def classify(
        self,
        images: Image | Iterable[Image] | AsyncIterable[Image],
        labels: list[str],
        template: str = "{}",
    ) -> Classification:
        """Zero-shot classification, as AlignClient.classify; `in_flight` requests at a time."""
        job = _classify_job(labels, template)
        return _joined(await self._collect(_several(images), job))

    async def embed_images(
        self, images: Image | Iterable[Image] | AsyncIterable[Image]
    ) -> np.ndarray:
        """Returns the images' embeddings, float32 (n, d), as AlignClient.embed_images."""
        return np.concatenate(await self._collect(_several(images), _IMAGES))

    async def embed_texts(self, texts: str | Iterable[str] | AsyncIterable[str]) -> np.ndarray:
        """Returns the texts' embeddings, float32 (n, d), as AlignClient.embed_texts."""
        texts = [texts] if isinstance(texts, str) else texts
        return np.concatenate(await self._collect(texts, _TEXTS))

    async def stream_classify(
        self,
        images: Iterable[Image] | AsyncIterable[Image],
        labels: list[str],
        template: str = "{}",
    ) -> AsyncIterator[Classification]:
        """Yields each image's classification in order, as AlignClient.stream_classify."""
        async for answer in self._stream(images, _classify_job(labels, template)):
            for row in _rows(answer):
                yield row

    async def stream_images(
        self, images: Iterable[Image] | AsyncIterable[Image]
    ) -> AsyncIterator[np.ndarray]:
        """Yields each image's embedding in order, as AlignClient.stream_images."""
        async for embeds in self._stream(images, _IMAGES):
            for row in embeds:
                yield row

    async def stream_texts(
        self, texts: Iterable[str] | AsyncIterable[str]
    ) -> AsyncIterator[np.ndarray]:
        """Yields each text's embedding in order, as AlignClient.stream_texts."""
        async for embeds in self._stream(texts, _TEXTS):
            for row in embeds:
                yield row

    async def predict(
        self, inputs: Mapping[str, Any], signature_name: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """Runs any signature, in one request, as AlignClient.predict."""
        if signature_name not in self._signatures:
            self._signatures = await self.metadata()
        signature = self._signatures.get(signature_name, Signature({}, {}))
        return await self._retried(self._transport.predict, inputs, signature_name, signature)

    async def status(self) -> list[VersionStatus]:
        """Returns the states of the model's versions, the newest first."""
        return _version_statuses(await self._retried(self._transport.status))

    async def metadata(self) -> dict[str, Signature]:
        """Returns the signatures of the newest version, or of the label's, by name."""
        return _signatures(await self._retried(self._transport.metadata))

    async def close(self) -> None:
        """Closes the connection."""
        await self._transport.close()

    async def __aenter__(self) -> "AsyncAlignClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _retried(self, method: Callable, *arguments: Any) -> Any:
        attempts = self._attempts()
        while True:
            try:
                return await method(*arguments, timeout=attempts.timeout)
            except (AlignServerError, ConnectionError) as error:
                await asyncio.sleep(attempts.pause(error))

    async def _collect(self, items: Any, job: "_Job") -> list[Any]:
        answers = [answer async for answer in self._stream(items, job)]
        if not answers:
            raise ValueError(f"{job.items}: expected at least one")
        return answers

    async def _ask(self, job: "_Job", batch: "_Batch") -> Any:
        inputs = await asyncio.to_thread(job.inputs, batch)  # it may read files
        try:
            return job.result(await self.predict(inputs, job.signature))
        except AlignServerError as error:
            raise _with_callers_row(error, batch) from None

    async def _stream(self, items: Any, job: "_Job") -> AsyncIterator[Any]:
        under_way: collections.deque[asyncio.Task] = collections.deque()
        try:
            async for batch in _async_batches(items, self.batch_size):
                under_way.append(asyncio.create_task(self._ask(job, batch)))
                if len(under_way) == self.in_flight:
                    yield await under_way.popleft()
            while under_way:
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)


# --- batches and what is asked of them -----------------------------------------------------


class _Batch(NamedTuple):
    start: int  # the place of its first item in the caller's list
    items: list[Any]


class _Job(NamedTuple):
    items: str  # the caller's name for them
    signature: str
    inputs: Callable[[_Batch], dict[str, Any]]
    result: Callable[[dict[str, np.ndarray]], Any]


def _classify_job(labels: list[str], template: str) -> _Job:
    if isinstance(labels, str):
        raise TypeError(f"labels={labels!r}: expected a list of strings")
    labels = list(labels)
    if not labels:
        raise ValueError("labels: expected at least one")
    if "{}" not in template:
        raise ValueError(f"template={template!r}: expected a {{}} for the label")
    prompts = [template.replace("{}", label) for label in labels]

    def inputs(batch: _Batch) -> dict[str, Any]:
        return {"image_bytes": _all_encoded(batch), "labels": [prompts] * len(batch.items)}

    def result(outputs: dict[str, np.ndarray]) -> Classification:
        # A server that merges requests answers with the widest of their lists.
        logits, probs = (outputs[name][:, : len(labels)] for name in ("logits", "probs"))
        return Classification(labels, logits, probs)

    return _Job("images", "serving_default", inputs, result)


_IMAGES = _Job(
    "images",
    "embed_image",
    lambda batch: {"image_bytes": _all_encoded(batch)},
    lambda outputs: outputs["image_embeds"],
)
_TEXTS = _Job(
    "texts",
    "embed_text",
    lambda batch: {"texts": batch.items},
    lambda outputs: outputs["text_embeds"],
)


def _joined(answers: Iterable[Classification]) -> Classification:
    answers = list(answers)
    logits, probs = ([getattr(a, name) for a in answers] for name in ("logits", "probs"))
    return Classification(answers[0].labels, np.concatenate(logits), np.concatenate(probs))


def _rows(answer: Classification) -> Iterator[Classification]:
    for row in range(len(answer.probs)):
        rows = slice(row, row + 1)
        yield Classification(answer.labels, answer.logits[rows], answer.probs[rows])


def _several(images: Any) -> Any:
    one = isinstance(images, (str, os.PathLike, bytes, bytearray, PIL.Image.Image))
    return [images] if one else images


def _batches(items: Iterable[Any], size: int) -> Iterator[_Batch]:
    items, start = iter(items), 0
    while batch := list(itertools.islice(items, size)):
        yield _Batch(start, batch)
        start += size


async def _async_batches(items: Any, size: int) -> AsyncIterator[_Batch]:
    if not isinstance(items, AsyncIterable):
        for batch in _batches(items, size):
            yield batch
        return
    start, batch = 0, []
    async for item in items:
        batch.append(item)
        if len(batch) == size:
            yield _Batch(start, batch)
            start, batch = start + size, []
    if batch:
        yield _Batch(start, batch)


def _all_encoded(batch: _Batch) -> list[bytes]:
    return [_encoded(image, batch.start + row) for row, image in enumerate(batch.items)]


def _encoded(image: Image, place: int) -> bytes:
    if isinstance(image, (bytes, bytearray)):
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


def _with_callers_row(error: AlignServerError, batch: _Batch) -> AlignServerError:
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


# --- what the server tells of itself -------------------------------------------------------


def _version_statuses(answer: dict[str, Any]) -> list[VersionStatus]:
    return [
        VersionStatus(int(item["version"]), item["state"], item["status"]["error_message"])
        for item in answer["model_version_status"]
    ]


def _signatures(definitions: dict[str, Any]) -> dict[str, Signature]:
    return {
        name: Signature(specs(entry["inputs"]), specs(entry["outputs"]))
        for name, entry in definitions.items()
        if entry["method_name"]  # the initializer has none
    }
