"""Tables of image paths and captions, row by row: .csv, .tsv, .jsonl, and .parquet of paths."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from align_tf.addresses import Place, fetched, is_remote
from align_tf.data.sources import (
    CAPTION_KEYS,
    PATH_KEYS,
    Keys,
    choose_key,
    parquet_rows,
    strings_in,
    tell_foreign,
)
from align_tf.files import readable, text_format

ROWS_AT_A_TIME = 4096  # of a .parquet
LONGEST_VALUE = 2**31 - 1  # of a .csv, in characters: Python's own limit is 128 KiB
# A .tsv has no quotes: what looks like one belongs to a caption.
SEPARATED = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}

# A number, and the values by column; None where the row cannot be read.
Row = tuple[int, dict[str, Any] | None]


def image_rows(file: Place, keys: Keys) -> Iterator[tuple[str, str, list[str]]]:
    """Yields the name, the path and the captions of each row of a table.

    Raises:
        ValueError: a row does not fit the table; the message names its line.
    """
    unit = "row" if file.suffix.lower() == ".parquet" else "line"
    image = caption = None
    for number, row in _rows(file):
        place = f"{file}, {unit} {number}"
        if row is None:
            yield place, place, []
            continue
        if image is None:
            image = choose_key(str(file), "image", keys.image, PATH_KEYS, row)
            caption = choose_key(
                str(file), "caption", keys.caption, CAPTION_KEYS, row, keys.need_captions
            )
        path = row.get(image)
        if not isinstance(path, str):
            raise ValueError(f"{place}: expected a path in column {image!r}")
        texts = strings_in(row.get(caption)) if caption else []
        yield readable(os.path.splitext(path)[0]), _path(file.parent, path), texts


def _path(folder: Place, named: str) -> str:
    """Returns the path or the address of an image that a table names."""
    if is_remote(named):
        return named
    if is_remote(folder):
        return f"{folder}/{named}"
    path = os.path.join(folder, named)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half an emoji
        path = path.encode("utf-8", "backslashreplace").decode()
    # A table that is not UTF-8 may name files whose names are not, and files whose names are.
    path = path if os.path.lexists(path) else readable(path)
    return path.replace("\0", "\\0")


def _rows(file: Place) -> Iterator[Row]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        with fetched(file) as local:
            yield from enumerate(parquet_rows(local, ROWS_AT_A_TIME), 1)
        return
    foreign: list[str] = []
    with fetched(file) as local:
        with open(local, "rb") as start:
            encoding = text_format(start.read(2))
        with open(local, newline="", **encoding) as text:
            lines = _noted(text, foreign)
            rows = _json_rows if suffix == ".jsonl" else _separated_rows
            yield from rows(file, lines)
    tell_foreign(str(file), foreign)


def _noted(lines: Iterable[str], foreign: list[str]) -> Iterator[str]:
    """Passes lines on, and notes those that are not Unicode."""
    for number, line in enumerate(lines, 1):
        if readable(line) is not line:
            foreign.append(f"line {number}")
        yield line


def _json_rows(file: Place, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:  # nested deeper than Python can follow
            yield number, None
            continue
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{file}, line {number}: expected a JSON object, found {type(row).__name__}"
            )
        yield number, row


def _separated_rows(file: Place, lines: Iterable[str]) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_VALUE)
    reader = csv.reader(lines, **SEPARATED[file.suffix.lower()])
    columns, start = None, 1  # the line that a row starts in
    try:
        for values in reader:
            if columns is None:
                columns = values
            elif values:
                if any(values[len(columns) :]):
                    raise ValueError(
                        f"{file}, line {start}: {len(values)} values, expected "
                        f"{len(columns)}: {', '.join(columns)}"
                    )
                yield start, dict(zip(columns, values, strict=False))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{file}, line {start}: quotes that do not pair up ({error}); in a .csv a quote within "
            'quotes is written twice, ""'
        ) from error
