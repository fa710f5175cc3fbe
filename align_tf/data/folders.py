"""The folders that people have: which of the files in them are data."""

import collections
import os
import pathlib
from collections.abc import Iterator

from align_tf import addresses
from align_tf.data.sources import IMAGE
from align_tf.files import readable
from align_tf.terminal import say_once

# What systems keep in folders for themselves, beside all that begins with a dot.
SYSTEM = (
    *("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
    *("__pycache__",),
)
# What may hold pictures and is not read.
UNREAD = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".tif", ".tiff", ".jp2", ".svg", ".psd", ".ico"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".tga", ".ppm", ".pdf"),
    *(".zip", ".rar", ".7z"),
)


def is_hidden(name: str) -> bool:
    """Says whether a file or a folder of a name is none of a person's data."""
    return name.startswith(".") or name in SYSTEM


def ends(path: str | os.PathLike, suffixes: tuple[str, ...]) -> bool:
    """Says whether a path is that of a file of some suffixes, in lower or upper case."""
    name = os.path.basename(str(path))
    return name.lower().endswith(suffixes) and not is_hidden(name)


def pictures(folder: str | os.PathLike) -> Iterator[tuple[str, set[str]]]:
    """Yields the images of a folder and those within, in order, with the names beside each.

    Hidden files and folders are left out; a line on stderr tells of those that are not read.
    """
    unread = collections.Counter()
    walk = _walk_address if addresses.is_remote(folder) else _walk
    for root, files in walk(str(folder)):
        beside = set(files)
        unread.update(os.path.splitext(file)[1].lower() for file in files if ends(file, UNREAD))
        for file in sorted(files):
            if ends(file, IMAGE):
                yield os.path.join(root, file), beside
    tell_unread(str(folder), unread)


def tell_unread(name: str, unread: collections.Counter) -> None:
    """Says on stderr, once of a source, how many files are of kinds that are not read."""
    if unread:
        kinds = ", ".join(f"{suffix} ({count:,})" for suffix, count in unread.most_common())
        say_once(f"{readable(name)}: left out files of kinds that are not read: {kinds}")


def class_pictures(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Lists the images of a folder by its sub-folders, of which some may have none."""
    names = (path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    found = {name: [] for name in sorted(names)}
    for image, _ in pictures(folder):
        name, within, _ = os.path.relpath(image, folder).partition(os.sep)
        if within:
            found[name].append(pathlib.Path(image))
    return {name: sorted(images) for name, images in found.items()}


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yields a folder and those within, linked ones too, with the names of the files in each."""
    above = {folder: ()}  # of folders that are still to come: what they lie in, which is no loop
    for root, folders, files in os.walk(folder, onerror=_tell_closed, followlinks=True):
        within = (*above.pop(root), _identity(root))
        folders[:] = sorted(
            name
            for name in folders
            if not is_hidden(name) and _identity(os.path.join(root, name)) not in within
        )
        above |= dict.fromkeys((os.path.join(root, name) for name in folders), within)
        yield root, files


def _walk_address(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Does the same at an address, from one listing of it."""
    found = collections.defaultdict(list)
    root = folder.rstrip("/")  # a whole bucket is spelled with a slash at its end
    start = f"{root}//" if root.endswith(":") else f"{root}/"
    for path in addresses.listed(addresses.place(folder)):
        *within, name = path.removeprefix(root).strip("/").split("/")
        if not any(map(is_hidden, within)):
            found[tuple(within)].append(name)
    for within in sorted(found):
        yield start + "/".join(within), found[within]


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:  # gone meanwhile
        return None
    return found.st_dev, found.st_ino


def _tell_closed(error: OSError) -> None:
    say_once(f"{readable(os.fspath(error.filename))}: left out: {error.strerror}")
