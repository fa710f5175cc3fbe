"""What the embedded server takes at most, and the gate that keeps to it."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

from align_tf.server.status_codes import Overloaded, RequestError, invalid_argument


def _limit(default: float, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Limits:
    """The embedded server's limits, each a flag of `align-tf serve`.

    Predictions over REST and gRPC count together. Those that find no room are refused:
    RESOURCE_EXHAUSTED over gRPC, 503 over REST. The body of a REST request has a second more than
    client_timeout for each 64 KiB that have come.
    """

    max_request_bytes: int = _limit(128 * 2**20, "bytes of a request, also after decompression")
    max_rows: int = _limit(100_000, "rows of an input")
    max_memory_bytes: int = _limit(
        2 * 2**30, "bytes that the requests in flight take together, of JSON as it is read"
    )
    max_concurrent_requests: int = _limit(
        32, "predictions at work; one that waits for its batch is at work"
    )
    max_queued_requests: int = _limit(128, "predictions that wait for one at work to end")
    client_timeout: float = _limit(
        30.0, "seconds that the head of a REST request may take, and its body"
    )

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 0 or (value == 0 and name != "max_queued_requests"):
                raise ValueError(f"{name} is {value}, expected a positive number")

    @property
    def threads(self) -> int:
        """Threads for one protocol: those of predictions, and some to tell status and health."""
        return self.max_concurrent_requests + self.max_queued_requests + 4


class Memory:
    """The memory of all requests in flight."""

    def __init__(self, limit: int):
        self.limit = limit
        self.taken = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def request(self) -> Iterator[Callable[[int], None]]:
        """Surrounds a request; yields what takes bytes for it, or by a negative number gives some.

        What is called raises Overloaded where others have taken too much, and RequestError where
        the request alone would.
        """
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            with self._lock:
                if mine + size > self.limit:
                    raise RequestError(
                        "RESOURCE_EXHAUSTED",
                        f"The request takes about {mine + size} bytes of memory, of "
                        f"{self.limit} for all",
                    )
                if self.taken + size > self.limit:
                    raise Overloaded("Too many large requests at once: try again later")
                self.taken += size
                mine += size

        try:
            yield take
        finally:
            with self._lock:
                self.taken -= mine


class Gate:
    """Lets predictions through up to a limit, has some more wait, and refuses the others.

    As a context manager it surrounds the work on one.
    """

    def __init__(self, limits: Limits):
        self.limits, self.memory = limits, Memory(limits.max_memory_bytes)
        places = limits.max_concurrent_requests + limits.max_queued_requests
        self._places = threading.Semaphore(places)
        self._turns = threading.Semaphore(limits.max_concurrent_requests)

    def check_rows(self, name: str, shape: tuple[int, ...]) -> None:
        """Checks an input's first dimension.

        Raises:
            RequestError: it is more than max_rows.
        """
        if shape and shape[0] > self.limits.max_rows:
            raise invalid_argument(
                f"{name}: {shape[0]} rows, expected max_rows={self.limits.max_rows} at most"
            )

    def __enter__(self) -> None:
        """Waits for this request's turn.

        Raises:
            Overloaded: too many wait already.
        """
        if not self._places.acquire(blocking=False):
            raise Overloaded(
                f"The server has {self.limits.max_concurrent_requests} requests at work and "
                f"{self.limits.max_queued_requests} waiting, its limits: try again later"
            )
        self._turns.acquire()

    def __exit__(self, *exception: object) -> None:
        self._turns.release()
        self._places.release()
