"""What image-text records are read from: a source, and the names of its images and captions."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from align_tf import addresses
from align_tf.addresses import Place
from align_tf.extras import extra
from align_tf.files import decode_text, readable
from align_tf.terminal import say_once

IMAGE = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
CAPTION = (".txt", ".caption", ".json")  # of one name, the first is taken

# Names that are looked for where image_key or caption_key is None, the first found is taken.
IMAGE_KEYS = ("jpg", "png", "webp", "image", "image/encoded", "image_bytes")
PATH_KEYS = ("path", "image", "image_path", "file_name", "filename", "filepath", "file")
CAPTION_KEYS = ("txt", "caption", "captions", "text", "caption/text", "title")
JSON_KEYS = ("caption", "captions", "text")


class Keys(NamedTuple):
    """The names of images and of captions to look for; None finds the usual ones.

    `index` is the file that keeps how many records each shard holds, if one does.
    """

    image: str | None
    caption: str | None
    need_captions: bool
    index: Place | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from.

    Attributes:
        name: for messages.
        count: its records; None where only reading it through would tell.
        elements: takes None, or the seed of an epoch's order, int64 (2,), to a dataset of the
            elements that stand for the records: row numbers where there are `paths`, or records
            still encoded, of key, image and captions. With `first` it leaves out so many, and does
            not open the files they fill.
        load: takes a batch of elements to `key` (n,), `image_bytes` (n,) and `captions`, ragged
            (n, None). What could not be read has no image and no caption.
        paths: the image file of each record, where the images are files; None for one whose name
            is not UTF-8.
        image_cause: why images are usually missing in such a source; "" where nothing is usual.
    """

    name: str
    count: int | None
    elements: Callable[..., tf.data.Dataset]
    load: Callable[[Any], dict[str, Any]]
    paths: list[str | None] | None = None
    image_cause: str = ""

    def check(self, size: int, of: str = "a batch", smaller: str = "") -> None:
        """Checks that there are records for a batch.

        Args:
            size: how many it needs.
            of: what needs them, for the message.
            smaller: what else may be smaller than a batch's size, for the message.

        Raises:
            ValueError: there are fewer; the message names the source.
        """
        count = self.count
        if count is None:
            count = sum(1 for _ in self.elements(None).take(size))
        if count < size:
            raise ValueError(
                f"{self.name}: {count} records, expected {size} or more for {of}, or a smaller "
                f"{smaller}batch_size"
            )


def choose_key(
    name: str,
    what: str,
    key: str | None,
    usual: Sequence[str],
    found: Iterable[str],
    needed: bool = True,
) -> str | None:
    """Returns the column, feature or key that holds the images or the captions."""
    found = list(found)
    for candidate in usual if key is None else (key,):
        if candidate in found:
            return candidate
    if key is None and not needed:
        return None
    expected = repr(key) if key is not None else f"one of {', '.join(usual)}"
    raise ValueError(
        f"{name}: no {what}s: expected {expected}, or the name of another by {what}_key; "
        f"found {', '.join(map(str, found)) or 'nothing'}"
    )


def read_captions(
    path: str, content: bytes, caption_key: str | None, foreign: list[str]
) -> list[str]:
    """Reads a caption file: a .txt is one caption, a .json one or several; broken ones are none.

    Args:
        path: of the file.
        content: of the file.
        caption_key: of the captions in a .json.
        foreign: gets the path of a file that is not Unicode; see `tell_foreign`.
    """
    text, is_unicode = decode_text(content)
    foreign += [] if is_unicode else [path]
    if os.path.splitext(path)[1].lower() != ".json":
        return [text.strip()]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if isinstance(value, dict):
        keys = JSON_KEYS if caption_key is None else (caption_key,)
        value = next((value[key] for key in keys if key in value), None)
    return strings_in(value)


def tell_foreign(name: str, foreign: list[str]) -> None:
    """Says on stderr, once of a source, which of its texts were not Unicode."""
    if foreign:
        more = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
        first = readable(foreign[0])
        say_once(f"{readable(name)}: not UTF-8, so read as Windows-1252: {first}{more}")


def strings_in(value: Any) -> list[str]:
    """Takes a caption or a list of captions, as JSON or a table gives it, to the strings in it."""
    values = value if isinstance(value, list) else [value]
    return [readable(text).strip() for text in values if isinstance(text, str)]


def open_parquet(file: Place) -> Any:
    """Opens a Parquet file as a `pyarrow.parquet.ParquetFile`."""
    with extra("data", f"{file.name} needs pyarrow to be read"):
        import pyarrow.parquet
    try:
        return pyarrow.parquet.ParquetFile(addresses.opened(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a whole Parquet file: {error}") from error


def parquet_rows(
    file: Place, batch_size: int, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Parquet file, of which so many are in memory at a time.

    Raises:
        OSError: the file is damaged.
    """
    table = open_parquet(file)
    import pyarrow

    try:
        for batch in table.iter_batches(batch_size=batch_size, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(f"{file}: a damaged Parquet file: {error}") from error
