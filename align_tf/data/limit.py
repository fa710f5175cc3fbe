"""How many records may be left out: a number of them, or a share of those read, such as "5%"."""

import numbers
import re
from typing import Any

LIMIT = 'a whole number of 0 or more, or a share of 0% to 100%, such as "5%"'


def is_limit(value: Any) -> bool:
    """Says whether a value is a number of records or a share of them."""
    if isinstance(value, str):
        return re.fullmatch(r"\d+(\.\d+)?%", value) is not None and float(value[:-1]) <= 100
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 0


def share_of(limit: Any) -> float | None:
    """Returns the share in 0..1 that a limit is, or None where it is no share."""
    return float(limit[:-1]) / 100 if isinstance(limit, str) else None
