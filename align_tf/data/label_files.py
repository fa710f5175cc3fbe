"""The labels of `--labels`: themselves, or one file of them, lines or a table with a header."""

import csv
import os
import pathlib
from collections.abc import Sequence

from align_tf import addresses
from align_tf.files import read_lines

SUFFIXES = (".txt", ".csv", ".tsv", ".lst")  # of what is meant for a file, not for a label
# The columns of a table, the first that it has; and what the folders of classes are called.
LABEL_COLUMNS = ("label", "labels", "class_name", "classname", "name", "caption", "text", "class")
FOLDER_COLUMNS = ("folder", "directory", "synset", "wnid", "class", "id")


def is_file_of_labels(given: Sequence[str]) -> bool:
    """Says whether what was given is one file, there or not, and not labels.

    Raises:
        IsADirectoryError: it is a folder, or several folders by their paths.
    """
    for label in given:
        if pathlib.Path(label).expanduser().is_dir() and (len(given) == 1 or "/" in label):
            raise IsADirectoryError(
                f"--labels: {label!r} is a folder; expected labels, or one file of them"
            )
    file = pathlib.Path(given[0]).expanduser()
    return len(given) == 1 and (file.is_file() or file.suffix.lower() in SUFFIXES)


def read_labels(name: str) -> list[tuple[str | None, str]]:
    """Reads a file of labels.

    Args:
        name: of a file of lines, each a label, or the folder of a class and, after a tab, its
            label; or a .csv with a label alone in each row; or a .csv or .tsv with a header that
            names the column of the labels, and may name that of the folders.

    Returns:
        The folder, None where none is named, and the label of each.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, is empty, or no column of it is that of the labels.
    """
    file = addresses.place(os.path.expanduser(name))
    lines = read_lines(str(file))
    if file.suffix.lower() != ".csv":
        rows = [line.split("\t") for line in lines]
        if file.suffix.lower() != ".tsv" or not _has_header(rows):
            pairs = (line.rpartition("\t") for line in lines)
            return [(folder or None, label) for folder, _, label in pairs]
    else:
        try:
            # Excel separates by semicolons where the comma is that of numbers.
            semicolons = _has_header([lines[0].split(";")])
            delimiter = ";" if semicolons and "," not in lines[0] else ","
            rows = list(csv.reader(lines, strict=True, delimiter=delimiter))
        except csv.Error as error:
            raise ValueError(f"{file}: not a .csv: {error}") from error
    header = [cell.strip().lower() for cell in rows[0]]
    if not _has_header(rows):
        wide = next((place for place, row in enumerate(rows, 1) if len(row) > 1), None)
        if wide is not None:
            raise ValueError(
                f"{file}, line {wide}: {len(rows[wide - 1])} values; expected one label a line, or "
                f"a header with a column {' or '.join(map(repr, LABEL_COLUMNS[:2]))}"
            )
        return [(None, row[0]) for row in rows]
    column = next(header.index(key) for key in LABEL_COLUMNS if key in header)
    folders = (header.index(key) for key in FOLDER_COLUMNS if key in header)
    folder = next((place for place in folders if place != column), None)
    rows = [row + [""] * (len(header) - len(row)) for row in rows[1:]]
    if not rows:
        raise ValueError(f"{file}: a header alone, expected labels below it")
    return [(None if folder is None else row[folder] or None, row[column]) for row in rows]


def _has_header(rows: list[list[str]]) -> bool:
    return any(cell.strip().lower() in LABEL_COLUMNS for cell in rows[0])
