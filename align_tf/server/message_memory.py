"""About how much memory a PredictRequest takes once it is parsed, told by its bytes alone.

A message of a megabyte may become fifty: an empty string of two bytes takes forty, an id of one
byte twenty. So its fields are counted, as they lie in its bytes, before anything is made of them.
"""

from typing import Any, NamedTuple

import numpy as np

from align_tf.server.status_codes import RequestError, invalid_argument

COPIES = 3  # of a request, at most: the message, its arrays, and those of its batch
BYTES_A_FIELD = 128  # that a field takes at most beside its content, an array's string included
BYTES_A_NUMBER = 32  # that a number of a packed field takes at most, in the message and as an array
TIMES_A_HANDLE = 64  # what a handle's content may grow to: a message of messages that no one sends
MAX_FIELDS = 2_000_000  # of a request; a string of a tensor is one

_VARINT, _FIXED64, _DELIMITED, _GROUP, _GROUP_END, _FIXED32 = range(6)
_STRING_VAL = 8 << 3 | _DELIMITED  # the one byte before each string of a tensor


class _Kind(NamedTuple):
    """What of a message's fields takes more than its bytes."""

    messages: dict[int, Any] = {}  # number of a field: the kind of the message that it holds
    packed: tuple[int, ...] = ()  # fields of numbers in as few bytes as they need
    handles: tuple[int, ...] = ()


_SHAPE = _Kind()
_TENSOR = _Kind({2: _SHAPE}, packed=(7, 10, 11, 13, 16, 17), handles=(14, 15))
_REQUEST = _Kind({2: _Kind({2: _TENSOR})})


def memory(data: bytes) -> int:
    """Returns about how many bytes a PredictRequest takes at most.

    Raises:
        RequestError: it has more than MAX_FIELDS fields, or is none.
    """
    walk = _Walk(data)
    walk.message(0, len(data), _REQUEST)
    return COPIES * len(data) + BYTES_A_FIELD * walk.fields + walk.more


class _Walk:
    """Goes through the fields of a message, and of those within it."""

    def __init__(self, data: bytes):
        self.data, self.fields, self.more = data, 0, 0

    def message(self, at: int, end: int, kind: _Kind) -> None:
        """Counts the fields of a message, which lies from `at` to `end`."""
        while at < end:
            if self.data[at] == _STRING_VAL and kind is _TENSOR:
                at = self.strings(at, end)
                continue
            tag, at = self.varint(at)
            self.count(1)
            wire = tag & 7
            if wire == _VARINT:
                _, at = self.varint(at)
            elif wire in (_FIXED64, _FIXED32):
                at += 8 if wire == _FIXED64 else 4
            elif wire == _DELIMITED:
                size, at = self.varint(at)
                if size > end - at:
                    raise _not_a_request()
                self.content(tag >> 3, at, at + size, kind)
                at += size
            elif wire not in (_GROUP, _GROUP_END):  # whose fields are counted like the others
                raise _not_a_request()
        if at != end:
            raise _not_a_request()

    def content(self, number: int, at: int, end: int, kind: _Kind) -> None:
        if number in kind.messages:
            self.message(at, end, kind.messages[number])
        elif number in kind.packed:
            numbers = np.frombuffer(self.data, np.uint8)[at:end] < 128  # the last byte of each
            self.more += BYTES_A_NUMBER * int(np.count_nonzero(numbers))
        elif number in kind.handles:
            self.more += TIMES_A_HANDLE * (end - at)

    def strings(self, at: int, end: int) -> int:
        """Counts strings that follow each other; returns where they end."""
        data, found, most = self.data, 0, MAX_FIELDS - self.fields
        while at < end and data[at] == _STRING_VAL and found <= most:
            size, at = self.varint(at + 1)
            at += size
            found += 1
        self.count(found)
        return at

    def count(self, fields: int) -> None:
        self.fields += fields
        if self.fields > MAX_FIELDS:
            raise RequestError(
                "RESOURCE_EXHAUSTED", f"The request has more than {MAX_FIELDS} values and fields"
            )

    def varint(self, at: int) -> tuple[int, int]:
        """Returns the number that begins there, and where it ends."""
        try:
            value = self.data[at]
            if value < 128:
                return value, at + 1
            value, shift = value & 127, 7
            while (byte := self.data[at + shift // 7]) >= 128:
                value |= (byte & 127) << shift
                shift += 7
                if shift > 63:
                    raise _not_a_request()
        except IndexError:
            raise _not_a_request() from None
        return value | byte << shift, at + shift // 7 + 1


def _not_a_request() -> RequestError:
    return invalid_argument("The message is not a PredictRequest")
