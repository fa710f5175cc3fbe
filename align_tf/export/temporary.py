"""A temporary folder inside the one that an export is written into: whole exports, or nothing."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from align_tf.files import check_local


@contextlib.contextmanager
def temporary_folder(directory: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Gives a hidden folder in `directory`, from which what is whole is renamed into it.

    The folder goes at the end, and so do those that were made for it and are still empty.

    Args:
        directory: made if it is not there.
        name: what the folder's name begins with, after the dot.

    Yields:
        The folder.

    Raises:
        ValueError: the directory is a remote one.
        FileExistsError: a file is in the place of the directory.
        OSError: nothing can be written there.
    """
    check_local(directory)
    absent = []
    for path in (directory, *directory.parents):
        if path.is_dir():
            break
        if path.exists():
            raise FileExistsError(f"{path}: a file; expected a folder, or a name that is free")
        absent.append(path)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.", dir=directory))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # one that is not empty stays
            for path in absent:
                path.rmdir()
