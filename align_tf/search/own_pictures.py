"""Whose pictures are shown: those below the folder that this user embedded.

An index may come from someone else, and name any file. What it says of its folder is believed
where it is signed with a key that lies in this user's home.
"""

import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from align_tf import files
from align_tf.addresses import Place

NAME = "_pictures.json"  # in a collection; those who read it as one table leave it out
KEY_BYTES = 32


def sign(collection: Place, pictures: Sequence[str]) -> None:
    """Keeps beside a collection in which folder its pictures are.

    Args:
        collection: its folder.
        pictures: the paths of all, one or more.
    """
    folders = {os.path.normpath(os.path.dirname(path)) for path in pictures}
    folder = os.path.commonpath(folders)
    signed = {"folder": folder, "signature": _signature(folder)}
    files.write_text(collection / NAME, json.dumps(signed) + "\n")


def signed(collection: pathlib.Path) -> dict[str, Any] | None:
    """Returns what `sign` kept; None where it was not called, or the file is broken."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return files.read_json(collection / NAME)
    return None


def own_folder(said: Any) -> str | None:
    """Returns the folder of what `sign` kept; None where this user did not sign it."""
    if not isinstance(said, Mapping):
        return None
    folder, signature = said.get("folder"), said.get("signature")
    if not isinstance(folder, str) or not isinstance(signature, str):
        return None
    own = _signature(folder)
    return folder if own is not None and hmac.compare_digest(own, signature) else None


def is_below(path: str, folder: str | None) -> bool:
    """Says whether a file is below a folder, by its name: links within are followed."""
    if folder is None:
        return False
    if os.pardir in pathlib.PurePath(path).parts:  # which names do not tell where it leads
        path, folder = os.path.realpath(path), os.path.realpath(folder)
    with contextlib.suppress(ValueError):  # relative, or on another drive
        return os.path.commonpath([path, folder]) == os.path.normpath(folder)
    return False


def _signature(folder: str) -> str | None:
    try:
        key = _key()
    except OSError:  # no home that can be written to
        return None
    return hmac.new(key, os.fsencode(folder), hashlib.sha256).hexdigest()


def _key() -> bytes:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = pathlib.Path(state, "align_tf", "key")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # for the owner alone
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(file.name, path)
    return path.read_bytes()
