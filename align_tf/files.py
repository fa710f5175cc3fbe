"""Reading and replacing files: JSON objects, lines, and writing at once or not at all."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_lines(file: Any) -> list[str]:
    """Reads the lines of a text file that are not blank.

    Args:
        file: a path, or a file within a package, as `importlib.resources.files` gives it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, or has no such line.
    """
    path = pathlib.Path(file) if isinstance(file, str) else file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        lines = [line.strip(" ") for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path}: empty, expected one a line")
    return lines


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary path beside `path`, renamed to it if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp gives the owner's rights alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file at once or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
