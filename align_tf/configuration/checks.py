"""Checks of a configuration's values, each an error that names key, value and what was expected."""

import sys
from typing import Any


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {expected}")


def require_activation(value: Any, known: tuple[str, ...]) -> None:
    valid = value in known if isinstance(value, str) else callable(value)
    require(valid, "hidden_act", value, f"one of {', '.join(known)}, or a callable")


def is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_finite(value: Any) -> bool:
    """Says whether a value is a number that a float holds, as not every int is."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def require_positive_integers(config: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(config, key)
        require(is_positive_integer(value), key, value, "a positive integer")


def require_positive_numbers(config: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(config, key)
        valid = is_finite(value) and value > 0
        require(valid, key, value, "a positive number")


def require_rates(config: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(config, key)
        valid = isinstance(value, (int, float)) and 0 <= value < 1
        require(valid, key, value, "a rate in [0, 1)")
