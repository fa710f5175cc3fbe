"""The weights of several sources: what may be one, and the shares of the pairs that they mean."""

import fractions
import math
import numbers
from collections.abc import Sequence
from typing import Any

WEIGHTS = "a number above 0 for each source"


def is_weight(value: Any) -> bool:
    """Says whether a value may be the weight of a source."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and 0 < value < math.inf


def shares_of(weights: Sequence[float]) -> list[fractions.Fraction]:
    """Takes weights to the shares of a whole: as they are written, so that 0.1 is a tenth."""
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]
