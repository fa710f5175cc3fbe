"""The lengths, in tokens, that the texts of a batch are padded to."""

from typing import Any

LENGTH_BUCKETS = (8, 16, 32, 64)

LENGTHS = "whole numbers of 2 or more, such as [16, 64]"


def are_lengths(value: Any) -> bool:
    """Says whether a value is a list of lengths, at least one."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(
            isinstance(length, int) and not isinstance(length, bool) and length >= 2
            for length in value
        )
    )
