"""What both clients know: where the server is, and how requests and answers look."""

from collections.abc import Callable

from align_tf.client.endpoint import (
    Attempts,
    Endpoint,
)
from align_tf.client.signatures import Signature


class Client:
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
