"""What the embedded server takes at most, and the gate that keeps to it."""

import dataclasses
import threading
from typing import Any

from align_tf.server.status_codes import Overloaded


def _limit(default: float, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Limits:
    """The embedded server's limits, each a flag of `align-tf serve`.

    Predictions over REST and gRPC count together. Those that find no room are refused:
    RESOURCE_EXHAUSTED over gRPC, 503 over REST. The body of a REST request has a second more than
    client_timeout for each 64 KiB that have come.
    """

    max_request_bytes: int = _limit(256 * 2**20, "bytes of a request, also after decompression")
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


class Gate:
    """Lets predictions through up to a limit, has some more wait, and refuses the others.

    As a context manager it surrounds the work on one.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        places = limits.max_concurrent_requests + limits.max_queued_requests
        self._places = threading.Semaphore(places)
        self._turns = threading.Semaphore(limits.max_concurrent_requests)

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
