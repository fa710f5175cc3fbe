"""What image-text records are read from: a source, and the names of its images and captions."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from align_tf.extras import extra

IMAGE = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
CAPTION = (".txt", ".caption", ".json")  # of one name, the first is taken

# Names that are looked for where image_key or caption_key is None, the first found is taken.
IMAGE_KEYS = ("jpg", "png", "webp", "image", "image/encoded", "image_bytes")
PATH_KEYS = ("path", "image", "image_path", "file_name", "filename", "filepath", "file")
CAPTION_KEYS = ("txt", "caption", "captions", "text", "caption/text", "title")
JSON_KEYS = ("caption", "captions", "text")


class Keys(NamedTuple):
    """The names of images and of captions to look for; None finds the usual ones."""

    image: str | None
    caption: str | None
    need_captions: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from.

    Attributes:
        name: for messages.
        count: its records; None where only reading it through would tell.
        elements: takes None, or the seed of an epoch's order, int64 (2,), to a dataset of the
            elements that stand for the records: row numbers, or records still encoded. With
            `first` it leaves out so many, and does not open the files they fill.
        load: takes a batch of elements to `key` (n,), `image_bytes` (n,) and `captions`, ragged
            (n, None). What could not be read has no image and no caption.
        paths: the image file of each record, where the images are files.
        image_cause: why images are usually missing in such a source; "" where nothing is usual.
        caption_cause: why captions are.
    """

    name: str
    count: int | None
    elements: Callable[..., tf.data.Dataset]
    load: Callable[[Any], dict[str, Any]]
    paths: list[str] | None = None
    image_cause: str = ""
    caption_cause: str = ""


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


def read_captions(suffix: str, content: bytes, caption_key: str | None) -> list[str]:
    """Reads a caption file: a .txt is one caption, a .json one or several; broken ones are none."""
    text = content.decode("utf-8", errors="ignore")
    if suffix != ".json":
        return [text.strip()]
    try:
        value = json.loads(text)
    except ValueError:
        return []
    if isinstance(value, dict):
        keys = JSON_KEYS if caption_key is None else (caption_key,)
        value = next((value[key] for key in keys if key in value), None)
    return strings_in(value)


def strings_in(value: Any) -> list[str]:
    """Takes a caption or a list of captions, as JSON or a table gives it, to the strings in it."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str)]


def open_parquet(file: pathlib.Path) -> Any:
    """Opens a Parquet file as a `pyarrow.parquet.ParquetFile`."""
    with extra("data", f"{file.name} needs pyarrow to be read"):
        import pyarrow.parquet
    return pyarrow.parquet.ParquetFile(file)
