"""The `data` of a recipe: a source, files of one kind, or several sources with weights."""

import reprlib
from typing import Any

from align_tf.data.weights import is_weight, shares_of

SOURCES = "a source, a list of files of one kind, or of {source: ..., weight: ...}"


def checked_sources(data: Any) -> Any:
    """Checks the sources; of several with weights, one that has none gets 1.

    Raises:
        ValueError: they are no sources, or a weight is none; the message names it.
    """
    if _is_source(data):
        return data
    parts = [{"source": of} if _is_source(of) else of for of in data] if type(data) is list else []
    for part in parts:
        if not (isinstance(part, dict) and {"source"} <= part.keys() <= {"source", "weight"}):
            raise ValueError(f"data={reprlib.repr(part)}: expected {SOURCES}")
    if not parts or not all(_is_source(part["source"]) for part in parts):
        raise ValueError(f"data={reprlib.repr(data)}: expected {SOURCES}")
    return [{"source": part["source"], "weight": _checked_weight(part)} for part in parts]


def drawn_sources(data: Any) -> tuple[list[Any], list[float]]:
    """Returns the sources of checked data and their weights, as `make_dataset` takes them."""
    parts = [{"source": data, "weight": 1}] if _is_source(data) else data
    return [part["source"] for part in parts], [part["weight"] for part in parts]


def said_sources(data: Any) -> list[str]:
    """Returns the sources of checked data in words, several with their shares."""
    sources, weights = drawn_sources(data)
    names = [name if isinstance(name, str) else ", ".join(name) for name in sources]
    if len(names) == 1:
        return names
    parts = zip(names, shares_of(weights), strict=True)
    return [f"{name} ({float(100 * share):.3g}%)" for name, share in parts]


def _is_source(value: Any) -> bool:
    """Says whether a value is a source without a weight: a name, or a list of them."""
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name for name in names)


def _checked_weight(part: dict[str, Any]) -> float:
    weight = part.get("weight", 1)
    if isinstance(weight, str):  # YAML takes 1e-3, which has no point, for text
        try:
            weight = float(weight)
        except ValueError:
            weight = None
    if not is_weight(weight):
        raise ValueError(f"data={reprlib.repr(part)}: expected a weight above 0")
    return int(weight) if weight == int(weight) else weight
