"""What the embedded server takes at most, and the gate that keeps to it."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

from align_tf.server.status_codes import Overloaded, RequestError, invalid_argument

LEAST_BYTES_PER_SECOND = 2**16  # that a client sends or takes, once its timeout has passed
LONGEST_SECONDS = 10**9  # that a lock can be waited for
_MAY_BE_NOTHING = ("max_queued_requests", "grace_seconds")


def _limit(default: float, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Limits:
    """The embedded server's limits, each a flag of `align-tf serve`.

    Predictions over REST and gRPC count together. Those that find no room are refused:
    RESOURCE_EXHAUSTED over gRPC, 503 over REST. A REST client has a second more than client_timeout
    for each 64 KiB that have come of its body, and either for each 64 KiB of its answer.
    """

    max_request_bytes: int = _limit(128 * 2**20, "bytes of a request, also after decompression")
    max_rows: int = _limit(100_000, "rows of an input")
    max_memory_bytes: int = _limit(
        2 * 2**30,
        "bytes that the requests in flight and their answers take together, of JSON as it is read; "
        "gRPC's messages take as many again at most while they come",
    )
    max_concurrent_requests: int = _limit(
        32, "predictions at work; one that waits for its batch is at work"
    )
    max_queued_requests: int = _limit(128, "predictions that wait for one at work to end")
    client_timeout: float = _limit(
        30.0,
        "seconds that a client may take to send the head of a REST request, its body, or a gRPC "
        "message, and to take its answer",
    )
    grace_seconds: float = _limit(
        20.0, "seconds that requests in flight have once the server is told to stop"
    )

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            may_be_nothing = name in _MAY_BE_NOTHING
            if not value >= 0 or (value == 0 and not may_be_nothing):
                least = "0 or more" if may_be_nothing else "a positive number"
                raise ValueError(f"{name}={value}: expected {least}")
            if isinstance(value, float) and value > LONGEST_SECONDS:
                raise ValueError(f"{name}={value}: expected {LONGEST_SECONDS} seconds at most")

    @property
    def threads(self) -> int:
        """Threads for one protocol: those of predictions, and some to tell status and health."""
        return self.max_concurrent_requests + self.max_queued_requests + 4

    @property
    def messages_at_once(self) -> int:
        """Messages of gRPC that may come at once: before they have, each may be of any size."""
        return max(1, self.max_memory_bytes // self.max_request_bytes)


class Memory:
    """The memory of all requests in flight."""

    def __init__(self, limit: int):
        self.limit = limit
        self.taken = 0
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def request(self) -> Iterator["Share"]:
        """Surrounds a request; yields its share."""
        share = Share(self)
        try:
            yield share
        finally:
            share.keep(0)


class Share:
    """What a request has taken of the memory of all."""

    def __init__(self, memory: Memory):
        self.memory, self.taken = memory, 0

    def take(self, size: int) -> None:
        """Takes so many bytes; by a negative number gives some back.

        Raises:
            Overloaded: others have taken too much.
            RequestError: the request alone would take too much.
        """
        memory = self.memory
        with memory.lock:
            if size > 0 and self.taken + size > memory.limit:
                raise RequestError(
                    "RESOURCE_EXHAUSTED",
                    f"The request takes about {self.taken + size} bytes of memory, of "
                    f"{memory.limit} for all",
                )
            if size > 0 and memory.taken + size > memory.limit:
                raise Overloaded("Too many large requests at once: try again later")
            memory.taken += size
            self.taken += size

    def keep(self, size: int) -> None:
        """Gives back all but so many bytes, if it has taken more."""
        self.take(min(0, size - self.taken))


class Gate:
    """Lets predictions through up to a limit, has some more wait, and refuses the others."""

    def __init__(self, limits: Limits):
        self.limits, self.memory = limits, Memory(limits.max_memory_bytes)
        places = limits.max_concurrent_requests + limits.max_queued_requests
        self._places = threading.Semaphore(places)
        self.turn = threading.Semaphore(limits.max_concurrent_requests)  # to be at work
        self._lock = threading.Lock()
        self.inside = 0  # predictions that have a place

    def check_rows(self, name: str, shape: tuple[int, ...]) -> None:
        """Checks an input's first dimension.

        Raises:
            RequestError: it is more than max_rows.
        """
        if shape and shape[0] > self.limits.max_rows:
            raise invalid_argument(
                f"{name}: {shape[0]} rows, expected max_rows={self.limits.max_rows} at most"
            )

    def check_place(self) -> None:
        """Raises what `place` does where there is none."""
        with self.place():
            pass

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Surrounds a prediction from its beginning.

        Raises:
            Overloaded: too many wait already.
        """
        if not self._places.acquire(blocking=False):
            raise Overloaded(
                f"The server has {self.limits.max_concurrent_requests} requests at work and "
                f"{self.limits.max_queued_requests} waiting, its limits: try again later"
            )
        with self._lock:
            self.inside += 1
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1
            self._places.release()
