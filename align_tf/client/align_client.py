"""The client of an exported ALIGN model behind TensorFlow Serving, over REST or gRPC."""

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
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
    in_batches,
    joined,
    several,
    single_rows,
    with_callers_row,
)
from align_tf.client.endpoint import (
    PROTOCOLS,
    AlignServerError,
    Attempts,
    Endpoint,
    Tls,
    split_address,
)
from align_tf.client.grpc_transport import Grpc
from align_tf.client.rest import Rest
from align_tf.client.signatures import Signature, VersionStatus, read_signatures, version_statuses


class AlignClient(Client):
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
            timeout: seconds until a request has its answer, whole: connecting, sending, retries
                and their pauses included. Looking up a host's name is not cut off.
            retries: how often a request is sent again where the server is busy or not there:
                UNAVAILABLE, RESOURCE_EXHAUSTED and CANCELLED, 503 and 429, connections refused and
                reset.
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
            TypeError: an image or a label is none of these.
            AlignServerError, ConnectionError, TimeoutError: as for predict.
        """
        job = classify_job(labels, template)
        return joined(self._ask(job, batch) for batch in self._batches(images, job))

    def embed_images(self, images: Image | Iterable[Image]) -> np.ndarray:
        """Returns the images' embeddings, float32 (n, d), of unit length.

        Args:
            images: one image or several: paths, encoded bytes or PIL images.

        Raises:
            ValueError: no image.
            TypeError: one is none of these.
            AlignServerError, ConnectionError, TimeoutError: as for predict.
        """
        batches = self._batches(images, IMAGES)
        return np.concatenate([self._ask(IMAGES, batch) for batch in batches])

    def embed_texts(self, texts: str | Iterable[str]) -> np.ndarray:
        """Returns the texts' embeddings, float32 (n, d), of unit length.

        Raises:
            ValueError: no text.
            TypeError: one is no string.
            AlignServerError, ConnectionError, TimeoutError: as for predict.
        """
        batches = self._batches(texts, TEXTS)
        return np.concatenate([self._ask(TEXTS, batch) for batch in batches])

    def stream_classify(
        self, images: Image | Iterable[Image], labels: list[str], template: str = "{}"
    ) -> Iterator[Classification]:
        """Yields each image's classification, n = 1, in order; for collections of any size.

        Images are taken from the iterable as requests are made: `in_flight` batches at most are
        read and not yet yielded. Args and Raises: those of classify; no image yields nothing.
        """
        job = classify_job(labels, template)
        for answer in self._stream(images, job):
            yield from single_rows(answer)

    def stream_images(self, images: Image | Iterable[Image]) -> Iterator[np.ndarray]:
        """Yields each image's embedding, float32 (d,), in order, as stream_classify does."""
        for embeds in self._stream(images, IMAGES):
            yield from embeds

    def stream_texts(self, texts: str | Iterable[str]) -> Iterator[np.ndarray]:
        """Yields each text's embedding, float32 (d,), in order, as stream_classify does."""
        for embeds in self._stream(texts, TEXTS):
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
            TypeError: the inputs are no mapping, or the signature's name no string.
            ValueError: an input does not fit the signature's dtype without loss.
            AlignServerError: the server refused; the message is its own.
            ConnectionError: it cannot be reached.
            TimeoutError: it did not answer in time.
        """
        self._check(inputs, signature_name)
        attempts = self._attempts()  # one deadline for both requests
        if signature_name not in self._signatures:
            definitions = self._retried(attempts, self._transport.metadata)
            self._signatures = read_signatures(definitions)
        signature = self._signatures.get(signature_name, Signature({}, {}))
        ask = self._transport.predict
        return self._retried(attempts, ask, inputs, signature_name, signature)

    def status(self) -> list[VersionStatus]:
        """Returns the states of the model's versions, the newest first."""
        return version_statuses(self._retried(self._attempts(), self._transport.status))

    def metadata(self) -> dict[str, Signature]:
        """Returns the signatures of the newest version, or of the label's, by name."""
        return read_signatures(self._retried(self._attempts(), self._transport.metadata))

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def __enter__(self) -> "AlignClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _retried(self, attempts: Attempts, method: Callable, *arguments: Any) -> Any:
        while True:
            try:
                return method(*arguments, timeout=attempts.timeout)
            except (AlignServerError, ConnectionError) as error:
                time.sleep(attempts.pause(error))

    def _batches(self, items: Iterable[Any], job: Job) -> Iterator[Batch]:
        batches = in_batches(several(items, job.items), self.batch_size)
        first = next(batches, None)
        if first is None:
            raise ValueError(f"{job.items}: expected at least one")
        return itertools.chain([first], batches)

    def _ask(self, job: Job, batch: Batch) -> Any:
        inputs = job.inputs(batch)
        try:
            return job.result(self.predict(inputs, job.signature))
        except AlignServerError as error:
            raise with_callers_row(error, batch) from None

    def _stream(self, items: Iterable[Any], job: Job) -> Iterator[Any]:
        pool = futures.ThreadPoolExecutor(self.in_flight)
        under_way: collections.deque[futures.Future] = collections.deque()
        try:
            for batch in in_batches(several(items, job.items), self.batch_size):
                under_way.append(pool.submit(self._ask, job, batch))
                if len(under_way) == self.in_flight:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
