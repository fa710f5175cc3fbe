"""webdataset shards: the members of a tar to records, within bounded memory."""

import collections
import itertools
import os
import shlex
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from align_tf.addresses import Place, fetched
from align_tf.data.counting import Count
from align_tf.data.folders import UNREAD, is_hidden
from align_tf.data.sources import CAPTION, IMAGE, read_captions, tell_foreign
from align_tf.files import readable

READ_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError)
# In bytes: more is taken for a bomb, a small file that fills the memory.
LARGEST = {True: 1 << 27, False: 1 << 24}  # member, an image or not
LONGEST_NAME = 1 << 20
NAMING = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)

# suffix, and the member
Members = Iterator[tuple[str, tarfile.TarInfo]]


class _Damage(tarfile.ReadError):
    """A header that is none, behind a member that is whole."""


class _Member(tarfile.TarInfo):
    """A member, whose header ends the reading where it is broken or would fill the memory."""

    @classmethod
    def frombuf(cls, *block: Any) -> tarfile.TarInfo:
        try:
            member = super().frombuf(*block)
        except tarfile.InvalidHeaderError as error:
            raise _Damage(str(error)) from error
        if member.type in NAMING and member.size > LONGEST_NAME:
            raise _Damage(f"a name of {member.size} bytes")
        return member


def tar_records(
    file: Place, images: tuple[str, ...], caption_key: str | None
) -> Iterator[tuple[str, bytes, list[str]]]:
    """Yields the key, the image and the captions of each record of a shard."""
    foreign: list[str] = []
    with fetched(file) as local, tarfile.open(local, tarinfo=_Member) as tar:
        for key, members in _groups(tar):
            wanted = {
                suffix: _content(tar, member, LARGEST[suffix in images])
                for suffix, member in members
                if suffix in (*images, *CAPTION)
            }
            if wanted:
                image = next((wanted[suffix] for suffix in images if suffix in wanted), b"")
                suffix = next((suffix for suffix in CAPTION if suffix in wanted), None)
                found = suffix and read_captions(key + suffix, wanted[suffix], caption_key, foreign)
                yield readable(key), image, found or []
    tell_foreign(str(file), foreign)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, largest: int) -> bytes:
    """Reads a member; nothing of one that is larger, or of zeros that are not in the file."""
    if member.issparse() or member.size > largest:
        return b""
    return tar.extractfile(member).read()


def count_tar(file: Place, images: tuple[str, ...], need_captions: bool) -> Count:
    """Counts the records of a shard by the names of its members.

    Args:
        file: the shard.
        images: suffixes of images.
        need_captions: it has to have some.

    Returns:
        The count; the record that is cut off is one too.

    Raises:
        ValueError: it is no tar file, has no images or captions, or the members of a record do not
            lie side by side.
    """
    keys, suffixes, dotted, unread = set(), set(), [], collections.Counter()
    cut_off = False
    try:
        with fetched(file) as local, tarfile.open(local, tarinfo=_Member) as tar:
            for key, members in _groups(tar):
                of_record = _noted(members, images, dotted, unread)
                suffixes |= of_record
                if of_record.isdisjoint((*images, *CAPTION)):
                    continue
                if key in keys:
                    raise ValueError(_apart(file, key))
                keys.add(key)
    except READ_ERRORS as error:
        if not suffixes:
            raise ValueError(f"{file}: not a tar file") from error
        cut_off = True
    needed = (("images", images), ("captions", CAPTION))
    for what, expected in needed if need_captions else needed[:1]:
        if suffixes and suffixes.isdisjoint(expected):
            raise ValueError(
                f"{file}: no {what}: expected members that end in {', '.join(expected)}, "
                f"found {', '.join(sorted(suffixes))}"
            )
    return Count(len(keys) + cut_off, len(dotted), next(iter(dotted), ""), dict(unread))


def _noted(
    members: Members, images: tuple[str, ...], dotted: list[str], unread: collections.Counter
) -> set[str]:
    """Returns the suffixes of a record, and notes those that are left out."""
    suffixes = set()
    for suffix, member in members:
        suffixes.add(suffix)
        if suffix.endswith(IMAGE) and suffix not in (*IMAGE, *images):
            dotted.append(member.name)
        unread.update([suffix] if suffix in UNREAD else [])
    return suffixes


def _apart(file: Place, key: str) -> str:
    return (
        f"{file}: the files of {readable(key)} do not lie side by side, as webdataset has it; to "
        f"sort them: mkdir sorted && tar -xf {shlex.quote(str(file))} -C sorted && "
        "tar --sort=name -cf sorted.tar -C sorted ."
    )


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
    """Yields the key of each run of members that share it, and the members."""
    damage = []

    def named() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        try:
            for member in tar:
                parts = member.name.removeprefix("./").split("/")
                if member.isfile() and not any(map(is_hidden, parts)):
                    yield *_split(member.name), member
        except _Damage as error:  # the record before it is whole
            damage.append(error)

    for key, members in itertools.groupby(named(), lambda parts: parts[0]):
        yield key, ((suffix, member) for _, suffix, member in members)
    if damage:
        raise damage[0]


def _split(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last part, as webdataset does."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = file.partition(".")
    return os.path.join(folder, stem), dot + suffix.lower()
