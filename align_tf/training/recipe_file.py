"""A recipe read from a YAML file and flags."""

import dataclasses
import difflib
import os
import reprlib
from typing import Any

from align_tf.addresses import Place, content, place
from align_tf.training.recipe import Recipe
from align_tf.training.recipe_sources import SOURCES

# Of each two, a recipe states one.
ALTERNATIVES = (("model", "preset"), ("steps", "epochs"))


def read_recipe(
    path: str | os.PathLike | None = None,
    flags: dict[str, Any] | None = None,
    silent: dict[str, Any] | None = None,
) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file of `Recipe`'s keys; relative paths in it are relative to the working
            directory. None reads the flags alone.
        flags: settings that override those of the file; a string is read as YAML reads it.
        silent: settings for where neither states them, nor their alternative.

    Returns:
        The recipe.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid YAML, or a key is unknown, missing or out of range.
    """
    values = {} if path is None else _read_yaml(place(path))
    flags = flags or {}
    for one, other in (*ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)):
        if one in flags and other not in flags:
            values.pop(other, None)
    values.update({key: _parsed(key, value) for key, value in flags.items()})
    stated = {
        other for pair in ALTERNATIVES if not values.keys().isdisjoint(pair) for other in pair
    }
    values = {key: v for key, v in (silent or {}).items() if key not in stated} | values
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            where = "flags" if path is None else path
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {nearest!r}?")
    try:
        return Recipe(**values)
    except ValueError as error:
        named = path is not None and str(error).partition("=")[0] not in flags
        raise ValueError(f"{path}: {error}" if named else str(error)) from None


def _read_yaml(path: Place) -> dict[str, Any]:
    found = content(path)
    if found is None:
        folder = ", but a folder; one of pairs goes to data" if path.is_dir() else ""
        raise FileNotFoundError(f"{path}: no such recipe file{folder}")
    try:
        text = found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    values = _parsed_yaml(str(path), text)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of 'key: value', found {reprlib.repr(values)}")
    return values


def _parsed(key: str, value: Any) -> Any:
    field = Recipe.__dataclass_fields__.get(key)
    if not isinstance(value, str) or field is None or field.metadata["expected"] is str:
        return value
    if field.metadata["expected"] is SOURCES and not (value[:1] == "[" and value[-1:] == "]"):
        return value  # a name, whatever is in it
    return _parsed_yaml(f"{key}={reprlib.repr(value)}", value)


def _parsed_yaml(name: str, text: str) -> Any:
    import yaml

    try:
        _check_keys(yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark and f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{name}{line or ''}: not valid YAML: {error.problem}") from error
    # Of values that look like a date or a number of thousands of digits, and of nesting.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{name}: not valid YAML: {said}") from error


def _check_keys(node: Any) -> None:
    """Refuses a key that comes twice, of which YAML takes the last without a word."""
    nodes, met = [node], set()  # what an alias names is met again
    while nodes:
        node = nodes.pop()
        if not isinstance(getattr(node, "value", None), list) or id(node) in met:
            continue
        met.add(id(node))
        keys = set()
        for child in node.value:
            if isinstance(child, tuple):  # of a mapping
                key, child = child
                if isinstance(key.value, str) and key.value in keys:
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: the key {key.value!r} comes twice")
                keys.add(key.value if isinstance(key.value, str) else None)
            nodes.append(child)
