"""Addresses such as `gs://bucket/pairs`: to paths, and what lies there listed, fetched and sent."""

import concurrent.futures
import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from align_tf.terminal import say

# What an address begins with; a drive of Windows has one letter.
REMOTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")

# scheme: the package that speaks it, and the extra that brings it, if it is not there anyway
SCHEMES = {
    "gs": ("gcsfs", "gcs"),
    "s3": ("s3fs", "s3"),
    "hf": ("huggingface_hub", ""),
    "memory": ("fsspec", ""),
}
BUCKETS = ("gs", "s3")  # schemes whose every file lies in a bucket
PROBE = ".align_tf-"  # what the name of an empty file begins with that tries whether one may write
ATTEMPTS, PAUSE = 3, 1.0  # of a file, and the seconds after the first; they double
SILENCE = 30  # seconds
AT_A_TIME = 8  # files
# What tells one state of a file from another, by the names that the schemes have for it.
STATES = ("etag", "ETag", "generation", "blob_id", "md5Hash", "updated", "LastModified", "created")

# What no second attempt mends.
HOPELESS = ("NoCredentialsError", "DefaultCredentialsError")
PATIENT = ("gs",)  # schemes whose client has asked again for minutes when it gives up

# A `pathlib.Path`, or a `upath.UPath`, which is loaded for an address alone.
Place = Any

_copied: dict[str, str] = {}  # folder of this machine that `fetched_folder` made -> its address


class _CutOffError(OSError):
    """A file of which a client took a part for the whole."""


class AddressError(ValueError):
    """A bucket or a hub that did not answer, or refused; never that a file is not there."""


def is_remote(path: str | os.PathLike) -> bool:
    """Says whether a path is an address, such as `gs://bucket/pairs`."""
    return bool(REMOTE.match(str(path)))


def is_path(value: Any) -> bool:
    """Says whether a value is a path or an address; a `upath.UPath` is no PathLike."""
    upath = sys.modules.get("upath")  # where it is not loaded, nothing is one of its paths
    return isinstance(value, str | os.PathLike | (upath.UPath if upath else str))


def check(path: str | os.PathLike) -> None:
    """Checks that what an address needs is installed; a path of this machine is fine.

    Raises:
        ValueError: it is an address of another kind, or names no bucket.
        ModuleNotFoundError: its package is absent; the message names the pip command.
    """
    match = REMOTE.match(str(path))
    if not match:
        return
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        raise ValueError(
            f"{path}: not an address that is read or written; expected gs://, s3:// or hf://, or "
            "a path on this machine"
        )
    if scheme in BUCKETS and not str(path)[match.end() :]:
        raise ValueError(f"{path}: names no bucket; expected {scheme}://bucket/name")
    package, extra = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f'{path}: {scheme}:// needs {package}: pip install "align-tf[{extra}]"', name=package
        )


def place(path: str | os.PathLike) -> Place:
    """Takes a path or an address to what has pathlib's methods.

    Args:
        path: of this machine, or an address of `SCHEMES`.

    Returns:
        A `pathlib.Path`; of an address a `upath.UPath`.

    Raises:
        ValueError: the name is empty, which pathlib takes for the working directory.
        ValueError, ModuleNotFoundError: as `check`.
    """
    if not is_remote(path):
        if path == "":
            raise ValueError("'': an empty name; expected a path")
        return pathlib.Path(path)
    check(path)
    import upath

    scheme, rest = REMOTE.match(str(path))[1].lower(), REMOTE.sub("", str(path), count=1)
    return upath.UPath(f"{scheme}://{rest.rstrip('/')}", **_options(scheme))


@functools.cache
def _options(scheme: str) -> dict[str, Any]:
    """How long a client waits for a server that is silent; fsspec's own settings go before."""
    import fsspec

    options = {}
    if scheme == "s3":
        times = {
            "connect_timeout": SILENCE,
            "read_timeout": SILENCE,
            "retries": {"max_attempts": 0},
        }
        options = {"config_kwargs": times}  # s3fs itself asks again
    elif scheme == "gs":
        import aiohttp

        silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options = {"requests_timeout": silence}
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # which writes traces of its own
    return {**options, **fsspec.config.conf.get(scheme, {})}


def is_local(path: Place) -> bool:
    """Says whether what `place` returned is on this machine."""
    return isinstance(path, pathlib.Path)


def absolute(path: str | os.PathLike) -> str:
    """Returns the absolute path of a path, and an address as it is."""
    return str(place(path)) if is_remote(path) else os.path.abspath(path)


@contextlib.contextmanager
def told(path: Place) -> Iterator[None]:
    """Has what a bucket's client raises in the block be an error of one line with the address.

    Raises:
        FileNotFoundError: there is no such file, folder or bucket.
        AddressError: anything else: no credentials, no answer, no right.
    """
    try:
        yield
    except Exception as error:  # each client and what lies below it raises kinds of its own
        reason = _reason(error)
        own = isinstance(error, (OSError, ValueError)) and str(path) in reason
        if is_local(path) or isinstance(error, AddressError) or own:
            raise
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{path}: no such file, folder or bucket: {reason}") from error
        raise AddressError(f"{path}: cannot be reached: {reason}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- listing -------------------------------------------------------------------------------


def listed(folder: Place) -> dict[str, dict[str, Any]]:
    """Lists an address with all below it, once and anew.

    Returns:
        The address of each file -> what its bucket tells of it; in order of the addresses.
    """
    with told(folder):
        folder.fs.invalidate_cache()
        found = folder.fs.find(folder.path, detail=True)
    return {_address(folder, name): found[name] for name in sorted(found)}


def names(folder: Place) -> list[str]:
    """Lists the names of the files and folders right in a folder; none where it is not there.

    A probe that `check_writable` could not remove is no file of anyone's.
    """
    if is_local(folder):
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    with told(folder):
        folder.fs.invalidate_cache()
        try:
            found = folder.fs.ls(folder.path, detail=False)
        except FileNotFoundError:
            return []
    found = (os.path.basename(name.rstrip("/")) for name in found)
    return sorted(name for name in found if not name.startswith(PROBE))


def matching(pattern: str) -> list[str]:
    """Lists what is at an address, or what its wildcards stand for, in order."""
    path = place(pattern)
    with told(path):
        return [_address(path, name) for name in sorted(path.fs.glob(path.path))]


def state(path: str) -> tuple[int, int] | None:
    """Returns the size of a file and a number that another content changes; None without one."""
    there = place(path)
    if is_local(there):
        try:
            found = os.stat(path)
        except (OSError, ValueError):  # a name that no file can have
            return None
        return found.st_size, found.st_mtime_ns
    if len(there.parts) == 1:
        return 0, 0  # a bucket
    return _states(str(there.parent)).get(there.name)


@functools.cache
def _states(folder: str) -> dict[str, tuple[int, int]]:
    """Lists once, until `look_again`, the sizes and states of the files right in a folder."""
    there = place(folder)
    try:
        with told(there):
            there.fs.invalidate_cache()
            found = there.fs.ls(there.path, detail=True)
    except FileNotFoundError:
        return {}
    return {
        os.path.basename(info["name"].rstrip("/")): (info["size"] or 0, _state(info))
        for info in found
    }


def look_again() -> None:
    """Has `state` ask the buckets anew."""
    _states.cache_clear()


def _state(info: dict[str, Any]) -> int:
    told_states = [str(info[name]) for name in STATES if info.get(name) is not None]
    return zlib.crc32("\0".join(told_states).encode())


def _address(folder: Place, name: str) -> str:
    return f"{folder.protocol}://{name.lstrip('/')}"


# --- fetching ------------------------------------------------------------------------------


@contextlib.contextmanager
def fetched(path: Place) -> Iterator[pathlib.Path]:
    """Gives a file on this machine until the end of the block: a copy, where it is remote.

    Raises:
        FileNotFoundError, AddressError: as `told`, where it is remote.
    """
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="align_tf-") as folder:
        target = pathlib.Path(folder, path.name)
        _fetch(path, target)
        with naming({str(target): str(path)}):
            yield target


def fetched_folder(folder: Place, wanted: Sequence[str] | None = None) -> pathlib.Path:
    """Copies files right in a remote folder to this machine, where they stay until it ends.

    Args:
        folder: one on this machine is itself returned.
        wanted: names of the files; None takes all.

    Returns:
        A folder on this machine.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
        AddressError: as `told`.
    """
    if is_local(folder):
        return folder
    with told(folder):
        folder.fs.invalidate_cache()
        found = folder.fs.ls(folder.path, detail=True)
    files = {
        name: (info["size"], _state(info))
        for info in found
        if info["type"] == "file" and (name := os.path.basename(info["name"]))
        if wanted is None or name in wanted
    }
    if not files:
        raise FileNotFoundError(f"{folder}: no such folder, or it holds nothing of what is read")
    same = repr((str(folder), sorted(files.items())))  # the same files of a folder are the same
    one = f"{zlib.crc32(same.encode()):08x}"
    target = pathlib.Path(_copies().name, one, *REMOTE.sub("", str(folder)).split("/"))
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as place:  # gone, where one fails
            new = pathlib.Path(place, target.name)
            new.mkdir()
            list(each(lambda name: _fetch(folder / name, new / name), sorted(files)))
            try:
                new.rename(target)
            except OSError:
                if not target.is_dir():  # as where another thread was first
                    raise
    _copied[str(target)] = str(folder)
    return target


@functools.cache
def _copies() -> tempfile.TemporaryDirectory:
    """Where copies lie until the process ends."""
    return tempfile.TemporaryDirectory(prefix="align_tf-")


@contextlib.contextmanager
def naming(copies: Mapping[str, str] | None = None) -> Iterator[None]:
    """Has an error of the block name the address of a file or folder, not the copy that was read.

    Args:
        copies: a path on this machine -> the address; None takes those of `fetched_folder`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        error.args = tuple(
            as_named(part, copies) if isinstance(part, str) else part for part in error.args
        )
        if isinstance(error, OSError) and isinstance(error.filename, str):
            error.filename = as_named(error.filename, copies)
        raise


def as_named(text: str, copies: Mapping[str, str] | None = None) -> str:
    """Does the same in a message."""
    for copy, name in (_copied if copies is None else copies).items():
        text = text.replace(copy, name)
    return text


def opened(path: Place) -> Any:
    """Opens a file for a library that reads parts of it; one on this machine is its path."""
    if is_local(path):
        return path
    with told(path):
        return path.fs.open(path.path, "rb")


def content(path: Place) -> bytes | None:
    """Reads a small file; None where there is none.

    A bucket that does not answer is not one without the file, as it is to `UPath.exists`.

    Raises:
        OSError: it is on this machine, and cannot be read.
        AddressError: as `told`.
    """
    if is_local(path):
        return path.read_bytes() if path.is_file() else None
    try:
        return _again(path, lambda: path.fs.cat_file(path.path))
    except FileNotFoundError:
        return None


def contents(paths: Sequence[str]) -> list[bytes | None]:
    """Reads small files, remote ones several at a time; None is one of these that is not there.

    Raises:
        OSError: one on this machine cannot be read.
        AddressError: as `told`.
    """

    def read(path: str) -> bytes | None:
        there = place(path)
        return there.read_bytes() if is_local(there) else content(there)

    return list((each if any(map(is_remote, paths)) else map)(read, paths))


def _fetch(path: Place, target: pathlib.Path) -> None:
    def fetch() -> None:
        path.fs.get_file(path.path, str(target))
        size, came = path.fs.info(path.path)["size"], target.stat().st_size
        if size is not None and size != came:
            raise _CutOffError(f"{came:,} of {size:,} bytes came")

    _again(path, fetch)


def _again(path: Place, call: Callable[[], Any]) -> Any:
    """Calls what a network may break, a few times."""
    with told(path):
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:
                given_up = path.protocol in PATIENT and not isinstance(error, _CutOffError)
                if given_up or attempt == ATTEMPTS - 1 or type(error).__name__ in HOPELESS:
                    raise
                say(f"{path}: {_reason(error)}; trying again")
            time.sleep(PAUSE * 2**attempt)
            path.fs.invalidate_cache()
    return None


def each(call: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Calls a function of each item, several at a time, and yields the results in order."""
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as threads:
        yield from threads.map(call, items)


# --- sending -------------------------------------------------------------------------------


def send(file: pathlib.Path, path: Place) -> None:
    """Copies a file to an address, where it appears whole."""
    _again(path, lambda: path.fs.put_file(str(file), path.path))


def check_writable(path: str | os.PathLike) -> None:
    """Checks that files may be written at an address, by one that is empty and goes again.

    Raises:
        ValueError, ModuleNotFoundError: as `check`.
        FileNotFoundError, AddressError: as `told`.
    """
    probe = place(path) / f"{PROBE}{os.getpid()}"
    if probe.protocol == "hf":  # each file is a commit, which stays
        return
    with told(place(path)):
        probe.fs.pipe_file(probe.path, b"")
        with contextlib.suppress(Exception):  # one who may write may not be allowed to remove
            probe.fs.rm_file(probe.path)


def send_folder(folder: pathlib.Path, address: Place, last: str = "") -> None:
    """Copies a folder with all below it to an address.

    Args:
        folder: on this machine.
        address: what lies there stays, but for files of the same names.
        last: the name of the file that tells that all others are there, sent after them.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    for part in ([f for f in found if f.name != last], [f for f in found if f.name == last]):
        list(each(lambda file: send(file, address.joinpath(*file.relative_to(folder).parts)), part))


def remove(folder: Place, first: str = "") -> None:
    """Removes a remote folder, beginning with the file that tells that all others are there."""
    found = sorted(listed(folder), key=lambda name: (os.path.basename(name) != first, name))
    for name in found:
        there = place(name)
        with told(there), contextlib.suppress(FileNotFoundError):
            there.fs.rm_file(there.path)
