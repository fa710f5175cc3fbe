"""Image-text data in the field's file formats, as records that are not decoded yet."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from align_tf import addresses
from align_tf.data.folders import ends, pictures
from align_tf.data.listing import Listing
from align_tf.data.mixing import Mixture
from align_tf.data.patterns import matching
from align_tf.data.sources import CAPTION, Keys, Source, read_captions, tell_foreign
from align_tf.data.streams import (
    image_column,
    open_dataset,
    open_image_tables,
    open_tars,
    open_tfrecords,
)
from align_tf.data.tables import image_rows
from align_tf.data.weights import WEIGHTS, is_weight, shares_of
from align_tf.files import readable
from align_tf.progress import counted
from align_tf.terminal import say_once

TFRECORD = (".tfrecord", ".tfrecord.gz", ".tfrecords", ".tfrecords.gz")
TAR = (".tar", ".tar.gz", ".tgz")
TABLE = (".csv", ".tsv", ".jsonl", ".parquet")
KINDS = {"tfrecord": TFRECORD, "tar": TAR, "table": TABLE}
CAPTIONS_AT_A_TIME = 256  # files
ONE_KIND = "expected one kind of file"
PathOrPaths = str | os.PathLike | Sequence[str | os.PathLike]
EXPECTED = (
    "a folder of images beside .txt or .json captions, or files that end in "
    f"{', '.join((*TFRECORD[:2], *TAR[:2], *TABLE))}"
)


def open_source(
    source: Any,
    image_key: str | None = None,
    caption_key: str | None = None,
    need_captions: bool = True,
    index: addresses.Place | None = None,
) -> Source:
    """Finds out what a source is and lists or counts its records.

    Args:
        source: see `align_tf.data.make_dataset`.
        image_key: name of the image's column, feature or key; None looks for the usual ones.
        caption_key: name of the caption's.
        need_captions: False opens images alone too.
        index: a file that keeps how many records each shard holds, so that those that have not
            changed are not counted again; None keeps that in this process alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, of no known kind, or has no captions that are needed; or it is
            remote and cannot be reached.
        ModuleNotFoundError: a Parquet file, and pyarrow is not installed.
    """
    keys = Keys(image_key, caption_key, need_captions, index)
    addresses.look_again()
    if isinstance(source, tf.data.Dataset):
        return open_dataset(source, keys)
    name, kind, paths = _found(source, keys)
    return OPENERS[kind](name, paths, keys)


def open_sources(
    source: Any,
    weights: Sequence[float] | None,
    image_key: str | None = None,
    caption_key: str | None = None,
    index: addresses.Place | None = None,
) -> Source | Mixture:
    """Does the same of several sources with weights; one alone is as one without a weight.

    Args:
        source: one source, or with weights a list of them.
        weights: a number above 0 for each; None opens one source.
        image_key: as in `open_source`.
        caption_key: as in `open_source`.
        index: as in `open_source`.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `open_source`; or weights are none.
    """
    if weights is None:
        return open_source(source, image_key, caption_key, index=index)
    several = list(source) if isinstance(source, list | tuple) else [source]
    if np.ndim(weights) != 1 or not several:
        raise ValueError(f"weights={weights!r}: expected {WEIGHTS}, in a list as the sources are")
    if len(weights) != len(several) or not all(map(is_weight, weights)):
        found = f"{len(several)} sources" if len(several) > 1 else "one source"
        raise ValueError(f"weights={list(weights)}: expected {WEIGHTS}, of which here is {found}")
    opened = [open_source(one, image_key, caption_key, index=index) for one in several]
    return opened[0] if len(opened) == 1 else Mixture(opened, shares_of(weights))


def list_files(source: PathOrPaths, image_key: str | None = None) -> Listing:
    """Lists the files of a source with their sizes and times, without opening the images.

    An image of a folder counts with the caption file that is read with it, a table with the images
    that it names. Shards count without their times, which many a copy of them does not keep.

    Args:
        source: see `align_tf.data.make_dataset`; no tf.data.Dataset, which has no files.
        image_key: as in `open_source`.

    Returns:
        The listing; `digest` tells it from another, `changes` says what another has.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `open_source`.
    """
    keys = Keys(image_key, None, False)
    addresses.look_again()
    name, kind, paths = _found(source, keys)
    listing = Listing()
    for file, timed in counted(_files(kind, paths, keys), f"Listing {name}", "files"):
        listing.add(file, timed)
    return listing


def _files(kind: str, paths: list[addresses.Place], keys: Keys) -> Iterator[tuple[str, bool]]:
    """Yields the files of a source, each with whether its time counts."""
    if kind == "folder":
        for folder in paths:
            for image, beside in pictures(folder):
                yield from ((file, True) for file in (image, _caption_file(image, beside)) if file)
        return
    yield from ((str(path), kind == "table") for path in paths)
    if kind == "table":
        images = (image for path in paths for _, image, _ in image_rows(path, keys))
        yield from ((image, True) for image in dict.fromkeys(images))


# --- finding files -------------------------------------------------------------------------


def _found(source: Any, keys: Keys) -> tuple[str, str, list[addresses.Place]]:
    """Returns the name of a source for messages, a key of OPENERS, and its files or folders."""
    paths = _find(source)
    name = str(source) if addresses.is_path(source) else f"{paths[0]}, ..."
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        found = ", ".join(sorted(kinds))
        raise ValueError(f"{name}: {ONE_KIND}, found {found}; in training, several take weights")
    kind = kinds.pop()
    if kind == "table" and any(image_column(path, keys.image) for path in paths):
        kind = "images in tables"
    return name, kind, paths


def _find(source: Any) -> list[addresses.Place]:
    """Takes a path, a glob or a list of them to files, or to folders of images."""
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("source: expected one path or more, found an empty list")
        return [path for part in source for path in _find(part)]
    if not addresses.is_path(source):
        raise ValueError(
            f"source: expected a path, a list of paths or a tf.data.Dataset, found "
            f"{type(source).__name__}"
        )
    path = addresses.place(source)
    if _is_folder(path):
        return _find_in(path)
    matches = [addresses.place(match) for match in matching(str(source))]
    if not matches:
        raise FileNotFoundError(f"{source}: no such file or folder; expected {EXPECTED}")
    return matches


def _find_in(folder: addresses.Place) -> list[addresses.Place]:
    """Takes a folder to itself, where it has images, or to the shards that lie in it."""
    files = [folder / name for name in addresses.names(folder)]
    beside = {kind: [file for file in files if ends(file, KINDS[kind])] for kind in KINDS}
    if any(True for _ in pictures(folder)):
        named = [readable(file.name) for found in beside.values() for file in found]
        if named:
            more = f" and {len(named) - 1:,} more" if len(named) > 1 else ""
            say_once(
                f"{readable(str(folder))}: its images are read; beside them, not read unless "
                f"named: {named[0]}{more}"
            )
        return [folder]
    beside["table"] = [file for file in beside["table"] if ends(file, (".parquet",))]
    found = [kind for kind in KINDS if beside[kind]]
    if not found:
        raise ValueError(f"{folder}: empty, expected {EXPECTED}")
    if len(found) > 1:
        raise ValueError(
            f"{folder}: {ONE_KIND}, found {', '.join(sorted(found))}; name one's files"
        )
    return beside[found[0]]


def _is_folder(path: addresses.Place) -> bool:
    if addresses.is_local(path):
        return path.is_dir()
    # To ask of each of many shards would take long.
    with addresses.told(path):
        return not path.name.lower().endswith((*TFRECORD, *TAR, *TABLE)) and path.is_dir()


def _kind(path: addresses.Place) -> str:
    if _is_folder(path):
        return "folder"
    for kind, suffixes in KINDS.items():
        if path.name.lower().endswith(suffixes):
            return kind
    raise ValueError(f"{path}: expected {EXPECTED}")


# --- rows that are known by their paths: folders and tables -----------------------------------


def _open_listed(
    name: str, names: list[str], files: list[str], captions: list[list[str]], need_captions: bool
) -> Source:
    if not names:
        raise ValueError(f"{name}: empty, expected one image or more")
    lengths = [len(of_image) for of_image in captions]
    if need_captions and not any(lengths):
        raise ValueError(f"{name}: no captions")
    names, paths = tf.constant(names), tf.constant([os.fsencode(file) for file in files])
    read = _read_addresses if any(map(addresses.is_remote, files)) else _read_files
    flat = tf.constant(list(itertools.chain.from_iterable(captions)), tf.string)
    captions = tf.RaggedTensor.from_row_lengths(flat, tf.constant(lengths, tf.int64))
    count = len(lengths)

    def elements(seed: tf.Tensor | None, first: int = 0) -> tf.data.Dataset:
        rows = tf.range(count)
        if seed is not None:
            rows = tf.random.experimental.stateless_shuffle(rows, seed)
        return tf.data.Dataset.from_tensor_slices(rows[first:])

    def load(rows: tf.Tensor) -> dict[str, Any]:
        return {
            "key": tf.gather(names, rows),
            "image_bytes": read(tf.gather(paths, rows)),
            "captions": tf.gather(captions, rows),
        }

    # A path that is not UTF-8 cannot be kept: such an image is one of those that have no file.
    known = [file if readable(file) is file else None for file in files]
    return Source(name, count, elements, load, known)


def _read_files(paths: tf.Tensor) -> tf.Tensor:
    """Reads files (n,); one that cannot be read gives an empty string."""
    rows = (
        tf.data.Dataset.from_tensor_slices((tf.range(tf.size(paths)), paths))
        .map(lambda row, path: (row, tf.io.read_file(path)), num_parallel_calls=8)
        .ignore_errors()
        .concatenate(tf.data.Dataset.from_tensors((-1, "")))  # so that there is a batch
        .batch(tf.cast(tf.size(paths), tf.int64) + 1)
    )
    row, content = (value[:-1] for value in rows.get_single_element())
    return tf.tensor_scatter_nd_update(tf.fill(tf.shape(paths), ""), row[:, None], content)


def _read_addresses(paths: tf.Tensor) -> tf.Tensor:
    """Does the same where some of the files are remote."""

    def read(paths: np.ndarray) -> np.ndarray:
        names = [os.fsdecode(path) for path in paths]
        found = iter(addresses.contents([name for name in names if addresses.is_remote(name)]))
        read = [next(found) if addresses.is_remote(name) else _content(name) for name in names]
        return np.array([content or b"" for content in read], object)

    return tf.ensure_shape(tf.numpy_function(read, [paths], tf.string), paths.shape)


def _content(path: str) -> bytes | None:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError:
        return None


def _open_folders(name: str, folders: list[addresses.Place], keys: Keys) -> Source:
    names, paths, captions, foreign = [], [], [], []
    for folder in folders:
        found = counted(pictures(folder), f"Listing {folder}", "images")
        while some := list(itertools.islice(found, CAPTIONS_AT_A_TIME)):
            images = [image for image, _ in some]
            names += [
                readable(os.path.splitext(os.path.relpath(i, str(folder)))[0]) for i in images
            ]
            paths += images
            captions += _captions_beside(some, keys.caption, foreign)
    tell_foreign(name, foreign)
    if keys.need_captions and names and not any(captions):
        raise ValueError(f"{name}: no captions: expected a .txt or a .json beside each image")
    return _open_listed(name, names, paths, captions, keys.need_captions)


def _caption_file(image: str, beside: set[str]) -> str | None:
    """Finds the file of an image's captions."""
    stem = os.path.splitext(image)[0]
    found = (suffix for suffix in CAPTION if os.path.basename(stem) + suffix in beside)
    suffix = next(found, None)
    return suffix and stem + suffix


def _captions_beside(
    images: list[tuple[str, set[str]]], caption_key: str | None, foreign: list[str]
) -> list[list[str]]:
    """Reads the captions of images, each given with the names beside it."""
    files = [_caption_file(image, beside) for image, beside in images]
    found = iter(addresses.contents([file for file in files if file]))
    return [
        read_captions(file, next(found) or b"", caption_key, foreign) if file else []
        for file in files
    ]


def _open_tables(
    name: str,
    files: list[addresses.Place],
    keys: Keys,
) -> Source:
    captions: dict[str, list[str]] = {}  # of each path, in the order of its first row
    names: dict[str, str] = {}
    for file in files:
        rows = counted(image_rows(file, keys), f"Reading {file}", "rows")
        for name_of_image, path, texts in rows:
            names.setdefault(path, name_of_image)
            captions.setdefault(path, []).extend(texts)
    opened = _open_listed(
        name, list(names.values()), list(captions), list(captions.values()), keys.need_captions
    )
    folders = ", ".join(dict.fromkeys(addresses.absolute(file.parent) for file in files))
    cause = f"paths are taken relative to the folder of the table, {folders}"
    return dataclasses.replace(opened, image_cause=cause)


OPENERS = {
    "tfrecord": open_tfrecords,
    "tar": open_tars,
    "folder": _open_folders,
    "table": _open_tables,
    "images in tables": open_image_tables,
}
