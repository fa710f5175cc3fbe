"""The client for asyncio, over gRPC."""

import asyncio
import collections
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import numpy as np

from align_tf.client.base import Client
from align_tf.client.batches import (
    IMAGES,
    TEXTS,
    Batch,
    Classification,
    Image,
    Job,
    classify_job,
    in_async_batches,
    joined,
    several,
    single_rows,
    with_callers_row,
)
from align_tf.client.endpoint import (
    AlignServerError,
    Attempts,
    Endpoint,
    Tls,
    split_address,
)
from align_tf.client.grpc_transport import AsyncGrpc
from align_tf.client.signatures import (
    Signature,
    VersionStatus,
    read_signatures,
    version_statuses,
)


class AsyncAlignClient(Client):
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
        job = classify_job(labels, template)
        return joined(await self._collect(images, job))

    async def embed_images(
        self, images: Image | Iterable[Image] | AsyncIterable[Image]
    ) -> np.ndarray:
        """Returns the images' embeddings, float32 (n, d), as AlignClient.embed_images."""
        return np.concatenate(await self._collect(images, IMAGES))

    async def embed_texts(self, texts: str | Iterable[str] | AsyncIterable[str]) -> np.ndarray:
        """Returns the texts' embeddings, float32 (n, d), as AlignClient.embed_texts."""
        return np.concatenate(await self._collect(texts, TEXTS))

    async def stream_classify(
        self,
        images: Image | Iterable[Image] | AsyncIterable[Image],
        labels: list[str],
        template: str = "{}",
    ) -> AsyncIterator[Classification]:
        """Yields each image's classification in order, as AlignClient.stream_classify."""
        async for answer in self._stream(images, classify_job(labels, template)):
            for row in single_rows(answer):
                yield row

    async def stream_images(
        self, images: Image | Iterable[Image] | AsyncIterable[Image]
    ) -> AsyncIterator[np.ndarray]:
        """Yields each image's embedding in order, as AlignClient.stream_images."""
        async for embeds in self._stream(images, IMAGES):
            for row in embeds:
                yield row

    async def stream_texts(
        self, texts: str | Iterable[str] | AsyncIterable[str]
    ) -> AsyncIterator[np.ndarray]:
        """Yields each text's embedding in order, as AlignClient.stream_texts."""
        async for embeds in self._stream(texts, TEXTS):
            for row in embeds:
                yield row

    async def predict(
        self, inputs: Mapping[str, Any], signature_name: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """Runs any signature, in one request, as AlignClient.predict."""
        self._check(inputs, signature_name)
        attempts = self._attempts()  # one deadline for both requests
        if signature_name not in self._signatures:
            definitions = await self._retried(attempts, self._transport.metadata)
            self._signatures = read_signatures(definitions)
        signature = self._signatures.get(signature_name, Signature({}, {}))
        ask = self._transport.predict
        return await self._retried(attempts, ask, inputs, signature_name, signature)

    async def status(self) -> list[VersionStatus]:
        """Returns the states of the model's versions, the newest first."""
        return version_statuses(await self._retried(self._attempts(), self._transport.status))

    async def metadata(self) -> dict[str, Signature]:
        """Returns the signatures of the newest version, or of the label's, by name."""
        return read_signatures(await self._retried(self._attempts(), self._transport.metadata))

    async def close(self) -> None:
        """Closes the connection."""
        await self._transport.close()

    async def __aenter__(self) -> "AsyncAlignClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _retried(self, attempts: Attempts, method: Callable, *arguments: Any) -> Any:
        while True:
            try:
                return await method(*arguments, timeout=attempts.timeout)
            except (AlignServerError, ConnectionError) as error:
                await asyncio.sleep(attempts.pause(error))

    async def _collect(self, items: Any, job: Job) -> list[Any]:
        answers = [answer async for answer in self._stream(items, job)]
        if not answers:
            raise ValueError(f"{job.items}: expected at least one")
        return answers

    async def _ask(self, job: Job, batch: Batch) -> Any:
        inputs = await asyncio.to_thread(job.inputs, batch)  # it may read files
        try:
            return job.result(await self.predict(inputs, job.signature))
        except AlignServerError as error:
            raise with_callers_row(error, batch) from None

    async def _stream(self, items: Any, job: Job) -> AsyncIterator[Any]:
        under_way: collections.deque[asyncio.Task] = collections.deque()
        try:
            async for batch in in_async_batches(several(items, job.items), self.batch_size):
                under_way.append(asyncio.create_task(self._ask(job, batch)))
                if len(under_way) == self.in_flight:
                    yield await under_way.popleft()
            while under_way:
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
