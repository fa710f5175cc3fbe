"""Reading and replacing files: text, JSON, lines, and writing at once or not at all."""

import codecs
import contextlib
import errno
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from align_tf import addresses

# What is halves of surrogate pairs in a text: those that stand for bytes are read as Windows-1252,
# others, such as that of an emoji that was cut, say nothing.
_HALVES = dict.fromkeys(range(0xD800, 0xE000)) | {
    0xDC00 + byte: bytes([byte]).decode("cp1252", "replace") for byte in range(0x80, 0x100)
}


# Where devices are, and what a shell has opened, such as /dev/stdout and that of `>(gzip > x)`.
STREAMS = ("/dev", "/dev/fd", "/proc/self/fd")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


def check_local(path: str | os.PathLike) -> None:
    """Checks that a path is none of a remote folder, such as `gs://bucket/pairs`.

    Raises:
        ValueError: it is.
    """
    if addresses.is_remote(path):
        raise ValueError(
            f"{path}: remote folders are not supported here; copy a source to this machine first "
            "and results there afterwards, or mount the folder, and name the local path"
        )


def check_writable(path: str | os.PathLike) -> None:
    """Checks that there is a place for a file or a folder, before the work that it is to hold.

    Raises:
        OSError: what is there already, or the nearest folder above, takes no files.
        ValueError, ModuleNotFoundError: as `addresses.check_writable`, of an address.
    """
    if addresses.is_remote(path):
        addresses.check_writable(path)
        return
    place = pathlib.Path(path).absolute()
    if _is_stream(place):
        if not os.access(place, os.W_OK):
            raise OSError(f"{path}: cannot be written: {os.strerror(errno.EACCES)}")
        return
    place = place if place.is_dir() else place.parent
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from error


def check_folder(path: addresses.Place) -> None:
    """Checks that no file is where a folder is to be, before the work that it is to hold.

    Args:
        path: as `addresses.place` returns it.

    Raises:
        FileExistsError: there is one.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: a file; expected a folder, or a name that is free")


def _is_stream(path: pathlib.Path) -> bool:
    """Says whether a path is that of a device or a pipe, in whose place no file may come."""
    if path.is_dir() or not path.exists():
        return False
    return not path.is_file() or str(path.parent) in STREAMS


# --- text ----------------------------------------------------------------------------------


def readable(text: str) -> str:
    """Spells a text so that it can be written anywhere, such as the name of a file.

    Bytes that are not UTF-8, which Python keeps in a name and where a text is opened by
    `text_format`, are read as Windows-1252.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.translate(_HALVES)
    return text


def text_format(start: bytes) -> dict[str, str]:
    """Tells by its first bytes how a text file is opened so that none of it is lost.

    Args:
        start: of the file, two bytes or more.

    Returns:
        `encoding` and `errors`, as `open` and `bytes.decode` take them.
    """
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # as Windows writes Unicode
        return {"encoding": "utf-16", "errors": "replace"}
    return {"encoding": "utf-8-sig", "errors": "surrogateescape"}


def decode_text(content: bytes) -> tuple[str, bool]:
    """Decodes a text file, and says whether it was Unicode, or read as Windows-1252 in part."""
    text = content.decode(**text_format(content))
    decoded = readable(text)
    return decoded, decoded == text


# --- reading -------------------------------------------------------------------------------


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


@contextlib.contextmanager
def values_of(name: str) -> Iterator[None]:
    """Has a value of the wrong kind, met in the block, be an error that names its file.

    Raises:
        ValueError: there is one.
    """
    try:
        yield
    except (AttributeError, OverflowError, TypeError) as error:
        raise ValueError(f"{name}: a value of the wrong kind: {error}") from error


def read_lines(file: Any) -> list[str]:
    """Reads the lines of a text file that are not blank.

    Args:
        file: a path, an address, or a file within a package, as `importlib.resources.files`
            gives it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, or has no such line; or it cannot be reached.
    """
    path = addresses.place(file) if isinstance(file, str) else file
    content = addresses.content(path) if isinstance(file, str) else path.read_bytes()
    if content is None:
        raise FileNotFoundError(f"{path}: no such file")
    try:
        lines = [line.strip(" ") for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path}: empty, expected one a line")
    return lines


# --- writing -------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary path, which takes the place of `path` if the block ends well.

    Args:
        path: as `addresses.place` returns it. Of one on this machine the temporary path lies
            beside it; a remote one is sent, and a device or a pipe is written to.
    """
    if not addresses.is_local(path):
        with tempfile.TemporaryDirectory(prefix="align_tf-") as folder:
            yield pathlib.Path(folder, path.name)
            addresses.send(pathlib.Path(folder, path.name), path)
        return
    if _is_stream(path.absolute()):
        with tempfile.TemporaryDirectory(prefix="align_tf-") as folder:
            yield pathlib.Path(folder, path.name)
            with open(path, "ab") as stream:
                stream.write(pathlib.Path(folder, path.name).read_bytes())
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FileExistsError(f"{path.parent}: a file; expected a folder") from None
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
