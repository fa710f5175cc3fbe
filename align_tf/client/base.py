"""What both clients know: where the server is, and how requests and answers look."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

from align_tf.client.endpoint import (
    Attempts,
    Endpoint,
)
from align_tf.client.signatures import Signature

LONGEST_TIMEOUT = 10**9  # seconds, which a socket can wait for


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
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number, at least {least}")
        if not isinstance(timeout, numbers.Real) or not 0 < timeout <= LONGEST_TIMEOUT:
            raise ValueError(
                f"timeout={timeout!r}: expected seconds, above 0 and up to {LONGEST_TIMEOUT}"
            )
        self.model_name = endpoint.model_name
        self._transport = transport(endpoint)
        self._signatures: dict[str, Signature] = {}

    def _attempts(self) -> Attempts:
        return Attempts(self.timeout, self.retries)

    @staticmethod
    def _check(inputs: Any, signature_name: Any) -> None:
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs: expected arrays by name, got {type(inputs).__name__}")
        if not isinstance(signature_name, str):
            raise TypeError(f"signature_name={signature_name!r}: expected a string")
