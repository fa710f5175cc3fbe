"""A temporary folder inside the one that an export is written into: whole exports, or nothing."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from align_tf import addresses
from align_tf.files import check_folder


@contextlib.contextmanager
def temporary_folder(directory: addresses.Place, name: str) -> Iterator[pathlib.Path]:
    """Gives a hidden folder in `directory`, from which what is whole is renamed into it.

    The folder goes at the end, and so do those that were made for it and are still empty.

    Args:
        directory: made if it is not there; of a remote one the folder is on this machine.
        name: what the folder's name begins with, after the dot.

    Yields:
        The folder, from which `put` takes what is whole.

    Raises:
        FileExistsError: a file is in the place of the directory.
        OSError: nothing can be written there.
    """
    if not addresses.is_local(directory):
        with tempfile.TemporaryDirectory(prefix="align_tf-") as temporary:
            yield pathlib.Path(temporary)
        return
    absent = []
    for path in (directory, *directory.parents):
        if path.is_dir():
            break
        check_folder(path)
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


def put(whole: pathlib.Path, target: addresses.Place, last: str = "") -> None:
    """Puts a file or a folder that is whole in its place.

    Args:
        whole: in a `temporary_folder`.
        target: what it becomes; of a remote folder the files are sent.
        last: the name of the file that tells that a folder is whole, sent after the others.
    """
    if addresses.is_local(target):
        whole.replace(target)
    elif whole.is_dir():
        addresses.send_folder(whole, target, last)
    else:
        addresses.send(whole, target)
