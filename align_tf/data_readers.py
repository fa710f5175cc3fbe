"""Image-text data in the field's file formats, as records that are not decoded yet."""

import contextlib
import csv
import dataclasses
import functools
import glob
import gzip
import importlib
import itertools
import json
import os
import pathlib
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

TFRECORD = (".tfrecord", ".tfrecord.gz", ".tfrecords", ".tfrecords.gz")
TAR = (".tar", ".tar.gz", ".tgz")
TABLE = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGE = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
CAPTION = (".txt", ".caption", ".json")  # of one name, the first is taken
EXPECTED = (
    "a folder of images beside .txt or .json captions, or files that end in "
    f"{', '.join((*TFRECORD[:2], *TAR[:2], *TABLE))}"
)

# Names that are looked for where image_key or caption_key is None, the first found is taken.
IMAGE_KEYS = ("jpg", "png", "webp", "image", "image/encoded", "image_bytes")
PATH_KEYS = ("path", "image", "image_path", "file_name", "filename", "filepath", "file")
CAPTION_KEYS = ("txt", "caption", "captions", "text", "caption/text", "title")
JSON_KEYS = ("caption", "captions", "text")

FILES_AT_A_TIME = 4  # of a shuffled stream, read in turn
SHUFFLE_BUFFER = 4096  # records of a shuffled stream held in memory, undecoded
CHUNK = 16  # records that a Python reader hands over at once
PROGRESS_SECONDS = 2.0
READ_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError)

_graph = tf.autograph.experimental.do_not_convert


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
    """

    name: str
    count: int | None
    elements: Callable[..., tf.data.Dataset]
    load: Callable[[Any], dict[str, Any]]
    paths: list[str] | None = None


def open_source(
    source: Any,
    image_key: str | None = None,
    caption_key: str | None = None,
    need_captions: bool = True,
) -> Source:
    """Finds out what a source is and lists or counts its records.

    Args:
        source: see `align_tf.data.make_dataset`.
        image_key: name of the image's column, feature or key; None looks for the usual ones.
        caption_key: name of the caption's.
        need_captions: False opens images alone too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, of no known kind, or has no captions that are needed.
        ModuleNotFoundError: a Parquet file, and pyarrow is not installed.
    """
    if isinstance(source, tf.data.Dataset):
        return _open_dataset(source, image_key, caption_key, need_captions)
    paths = _find(source)
    name = str(source) if isinstance(source, str | os.PathLike) else f"{paths[0]}, ..."
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"{name}: expected one kind of file, found {', '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind == "tfrecord":
        return _open_tfrecords(name, paths, image_key, caption_key, need_captions)
    if kind == "tar":
        images = IMAGE if image_key is None else (f".{image_key}",)
        return _open_generated(
            name,
            paths,
            functools.partial(_count_tar, images=images, need_captions=need_captions),
            functools.partial(_tar_records, images=images, caption_key=caption_key),
        )
    if kind == "folder":
        return _open_folders(name, paths, caption_key, need_captions)
    return _open_tables(name, paths, image_key, caption_key, need_captions)


# --- finding files -------------------------------------------------------------------------


def _find(source: Any) -> list[pathlib.Path]:
    """Takes a path, a glob or a list of them to files, or to folders of images."""
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("source: expected one path or more, found an empty list")
        return [path for part in source for path in _find(part)]
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"source: expected a path, a list of paths or a tf.data.Dataset, found "
            f"{type(source).__name__}"
        )
    path = pathlib.Path(source)
    if path.is_dir():
        for suffixes in (TAR, TFRECORD):
            shards = sorted(file for file in path.iterdir() if _ends(file, suffixes))
            if shards:
                return shards
        if not any(_ends(file, IMAGE) for _, _, files in os.walk(path) for file in files):
            tables = sorted(file for file in path.iterdir() if _ends(file, (".parquet",)))
            if not tables:
                raise ValueError(f"{path}: empty, expected {EXPECTED}")
            return tables
        return [path]
    if path.exists():
        return [path]
    matches = sorted(map(pathlib.Path, glob.glob(str(source), recursive=True)))
    if not matches:
        raise FileNotFoundError(f"{source}: no such file or folder; expected {EXPECTED}")
    return matches


def _ends(path: str | os.PathLike, suffixes: tuple[str, ...]) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(suffixes) and not name.startswith(".")


def _kind(path: pathlib.Path) -> str:
    if path.is_dir():
        return "folder"
    for kind, suffixes in (("tfrecord", TFRECORD), ("tar", TAR), ("table", TABLE)):
        if path.name.lower().endswith(suffixes):
            return kind
    raise ValueError(f"{path}: expected {EXPECTED}")


def _progress(items: Iterable[Any], what: str) -> Iterator[Any]:
    """Passes items on, and says on stderr how many there have been where it takes long."""
    said = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            print(f"{what}: {number:,}", file=sys.stderr, flush=True)


def _choose(
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


# --- rows that are known by their paths: folders and tables -----------------------------------


def _open_listed(
    name: str, keys: list[str], files: list[str], captions: list[list[str]], need_captions: bool
) -> Source:
    if not keys:
        raise ValueError(f"{name}: empty, expected one image or more")
    lengths = [len(of_image) for of_image in captions]
    if need_captions and not any(lengths):
        raise ValueError(f"{name}: no captions")
    keys, paths = tf.constant(keys), tf.constant(files)
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
            "key": tf.gather(keys, rows),
            "image_bytes": _read_files(tf.gather(paths, rows)),
            "captions": tf.gather(captions, rows),
        }

    return Source(name, count, elements, load, files)


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


def _open_folders(
    name: str, folders: list[pathlib.Path], caption_key: str | None, need_captions: bool
) -> Source:
    keys, paths, captions = [], [], []
    for folder in folders:
        for image, beside in _progress(_images(folder), f"Listing {folder}"):
            keys.append(os.path.splitext(os.path.relpath(image, folder))[0])
            paths.append(image)
            captions.append(_captions_beside(image, beside, caption_key))
    if need_captions and keys and not any(captions):
        raise ValueError(f"{name}: no captions: expected a .txt or a .json beside each image")
    return _open_listed(name, keys, paths, captions, need_captions)


def _images(folder: pathlib.Path) -> Iterator[tuple[str, set[str]]]:
    """Yields the images of a folder and those within, in order, with the names beside each."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        beside = set(files)
        for file in sorted(files):
            if _ends(file, IMAGE):
                yield os.path.join(root, file), beside


def _captions_beside(image: str, beside: set[str], caption_key: str | None) -> list[str]:
    stem = os.path.splitext(image)[0]
    for suffix in CAPTION:
        if os.path.basename(stem) + suffix in beside:
            with open(stem + suffix, "rb") as file:
                return _captions(suffix, file.read(), caption_key)
    return []


def _captions(suffix: str, content: bytes, caption_key: str | None) -> list[str]:
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
    return _strings(value)


def _strings(value: Any) -> list[str]:
    """Takes a caption or a list of captions, as JSON or a table gives it, to the strings in it."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str)]


def _open_tables(
    name: str,
    files: list[pathlib.Path],
    image_key: str | None,
    caption_key: str | None,
    need_captions: bool,
) -> Source:
    if any(_image_column(file, image_key) for file in files):
        keys = {
            "image_key": image_key,
            "caption_key": caption_key,
            "need_captions": need_captions,
        }
        count = functools.partial(_count_parquet, **keys)
        read = functools.partial(_parquet_records, **keys)
        return _open_generated(name, files, count, read)
    captions: dict[str, list[str]] = {}  # of each path, in the order of its first row
    keys: dict[str, str] = {}
    for file in files:
        rows = _table_rows(file)
        first = next(rows, None)
        if first is None:
            continue
        image = _choose(str(file), "image", image_key, PATH_KEYS, first)
        caption = _choose(str(file), "caption", caption_key, CAPTION_KEYS, first, need_captions)
        for row in _progress(itertools.chain([first], rows), f"Reading {file}"):
            if not isinstance(row.get(image), str):
                raise ValueError(f"{file}: expected a path in column {image!r} of each row")
            path = os.path.join(file.parent, row[image])
            keys.setdefault(path, os.path.splitext(row[image])[0])
            texts = _strings(row.get(caption)) if caption else []
            captions.setdefault(path, []).extend(texts)
    return _open_listed(
        name, list(keys.values()), list(captions), list(captions.values()), need_captions
    )


def _table_rows(file: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        for batch in _parquet(file).iter_batches():
            yield from batch.to_pylist()
        return
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: not valid JSON: {error}") from error
        else:
            yield from csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")


# --- records that come in a row: TFRecord -----------------------------------------------------


def _stream(
    name: str,
    files: list[pathlib.Path],
    counts: list[int],
    read: Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset],
    load: Callable[[Any], dict[str, Any]],
) -> Source:
    """Makes a source of files that are read from their beginnings.

    Args:
        name: for messages.
        files: of it.
        counts: records of each.
        read: takes a file's name and count to a dataset of that many elements.
        load: as in `Source`.
    """
    count = sum(counts)
    if not count:
        raise ValueError(f"{name}: empty, expected one record or more")
    ends = np.cumsum(counts)
    names, counts = tf.constant([str(file) for file in files]), tf.constant(counts, tf.int64)

    def elements(seed: tf.Tensor | None, first: int = 0) -> tf.data.Dataset:
        order = tf.range(len(files))
        if seed is not None:
            order = tf.random.experimental.stateless_shuffle(order, seed)
        elif first:
            passed = int(np.searchsorted(ends, first, side="right"))
            order = order[passed:]
            first -= int(ends[passed - 1]) if passed else 0
        dataset = tf.data.Dataset.from_tensor_slices(order).interleave(
            lambda file: read(names[file], counts[file]),
            cycle_length=1 if seed is None else min(FILES_AT_A_TIME, len(files)),
            num_parallel_calls=1 if seed is None else tf.data.AUTOTUNE,
            deterministic=True,
        )
        return _shuffled(dataset, seed).skip(first)

    return Source(name, count, elements, load)


def _shuffled(dataset: tf.data.Dataset, seed: tf.Tensor | None) -> tf.data.Dataset:
    if seed is None:
        return dataset
    # An epoch's order is traced within a dataset: what is set here is the seed of that graph,
    # which would otherwise be the global one and change the order with it.
    tf.random.set_seed(1)
    number = tf.random.stateless_uniform([], seed, None, None, tf.int64)
    return dataset.shuffle(SHUFFLE_BUFFER, seed=number, reshuffle_each_iteration=False)


def _open_tfrecords(
    name: str,
    files: list[pathlib.Path],
    image_key: str | None,
    caption_key: str | None,
    need_captions: bool,
) -> Source:
    counts = [_count_tfrecord(file) for file in _progress(files, f"Counting {name}, files")]
    first = next((file for file, count in zip(files, counts, strict=True) if count), None)
    if first is None:
        raise ValueError(f"{name}: empty, expected one record or more")
    features = _features(first)
    image_key = _choose(str(first), "image", image_key, IMAGE_KEYS, features)
    caption_key = _choose(str(first), "caption", caption_key, CAPTION_KEYS, features, need_captions)
    spec = {
        "key": tf.io.FixedLenFeature([], tf.string, ""),
        image_key: tf.io.FixedLenFeature([], tf.string, ""),
        # A feature that is not there has no values.
        caption_key or "caption": tf.io.RaggedFeature(tf.string, row_splits_dtype=tf.int64),
    }

    def read(file: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        zipped = tf.strings.regex_full_match(file, r".*\.gz")
        records = tf.data.TFRecordDataset(file, tf.where(zipped, "GZIP", "")).ignore_errors()
        numbered = tf.data.Dataset.zip(tf.data.Dataset.range(count), records)
        records = numbered.map(lambda number, record: (_place(file, number), record))
        damaged = tf.data.Dataset.range(count).map(lambda i: (_damaged(file, i), ""))
        return records.concatenate(damaged).take(count)

    def load(batch: tuple[tf.Tensor, tf.Tensor]) -> dict[str, Any]:
        place, records = batch
        parsed = tf.io.parse_example(records, spec)
        return {
            "key": tf.where(parsed["key"] == "", place, parsed["key"]),
            "image_bytes": parsed[image_key],
            "captions": parsed[caption_key or "caption"],
        }

    return _stream(name, files, counts, read, load)


def _place(file: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Names a record that has no key."""
    return tf.strings.join([file, "[", tf.strings.as_string(number), "]"])


def _damaged(file: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Names one of the records that a damaged file lost."""
    return tf.strings.join([file, ", lost record ", tf.strings.as_string(number + 1)])


def _count_tfrecord(file: pathlib.Path) -> int:
    """Counts records by their headers; the one that a cut-off file ends in is a record too."""
    count, zipped = 0, file.suffix == ".gz"
    left = float("inf") if zipped else file.stat().st_size
    open_file = gzip.open if zipped else open
    with open_file(file, "rb") as data, contextlib.suppress(*READ_ERRORS):
        while left > 0 and len(header := data.read(12)) == 12:  # length, and its checksum
            count += 1
            length = int.from_bytes(header[:8], "little") + 4
            left -= 12 + length
            if left > 0:
                data.seek(length, os.SEEK_CUR)
    return count


def _features(file: pathlib.Path) -> list[str]:
    """Returns the names of the features in a file's first record."""
    compression = "GZIP" if file.suffix == ".gz" else ""
    try:
        record = next(iter(tf.data.TFRecordDataset(str(file), compression))).numpy()
        example = tf.train.Example.FromString(record)
    except Exception as error:
        raise ValueError(f"{file}: not a TFRecord file of tf.train.Example") from error
    return sorted(example.features.feature)


# --- records that Python reads: tar and Parquet -----------------------------------------------

Record = tuple[str, bytes, list[str]]


def _open_generated(
    name: str,
    files: list[pathlib.Path],
    count: Callable[[pathlib.Path], int],
    records: Callable[[pathlib.Path], Iterator[Record]],
) -> Source:
    counts = [count(file) for file in _progress(files, f"Counting {name}, files")]
    string = tf.TensorSpec([None], tf.string)

    def chunks(file: bytes) -> Iterator[tuple[Any, ...]]:
        intact = _until_damage(records(pathlib.Path(file.decode())))
        while chunk := list(itertools.islice(intact, CHUNK)):
            keys, images, captions = zip(*chunk, strict=True)
            flat = [text.encode() for texts in captions for text in texts]
            yield (
                np.array([key.encode() for key in keys], object),
                np.array(images, object),
                np.array(flat, object),
                np.array([len(texts) for texts in captions], np.int64),
            )

    def element(keys: Any, images: Any, flat: Any, lengths: Any) -> tf.data.Dataset:
        captions = tf.RaggedTensor.from_row_lengths(flat, lengths)
        return tf.data.Dataset.from_tensor_slices((keys, images, captions))

    def read(file: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        found = tf.data.Dataset.from_generator(
            chunks,
            args=(file,),
            output_signature=(string, string, string, tf.TensorSpec([None], tf.int64)),
        ).flat_map(element)
        none = tf.RaggedTensor.from_row_lengths(
            tf.constant([], tf.string), tf.constant([0], tf.int64)
        )
        damaged = tf.data.Dataset.range(count).flat_map(
            lambda i: tf.data.Dataset.from_tensor_slices(([_damaged(file, i)], [""], none))
        )
        return found.concatenate(damaged).take(count)

    return _stream(name, files, counts, read, _load_record)


def _until_damage(records: Iterator[Record]) -> Iterator[Record]:
    # What a damaged file lost becomes rows without an image.
    with contextlib.suppress(*READ_ERRORS):
        yield from records


def _tar_groups(
    tar: tarfile.TarFile,
) -> Iterator[tuple[str, Iterator[tuple[str, tarfile.TarInfo]]]]:
    """Yields the key of each record of a webdataset shard, and its members by suffix."""
    named = ((*_split(member.name), member) for member in tar if member.isfile())
    for key, members in itertools.groupby(named, lambda parts: parts[0]):
        yield key, ((suffix, member) for _, suffix, member in members)


def _split(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last part, as webdataset does."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = file.partition(".")
    return os.path.join(folder, stem), dot + suffix.lower()


def _tar_records(
    file: pathlib.Path, images: tuple[str, ...], caption_key: str | None
) -> Iterator[Record]:
    with tarfile.open(file, "r|*") as tar:
        for key, members in _tar_groups(tar):
            wanted = {
                suffix: tar.extractfile(member).read()
                for suffix, member in members
                if suffix in (*images, *CAPTION)
            }
            if wanted:
                image = next((wanted[suffix] for suffix in images if suffix in wanted), b"")
                suffix = next((suffix for suffix in CAPTION if suffix in wanted), None)
                captions = _captions(suffix, wanted[suffix], caption_key) if suffix else []
                yield key, image, captions


def _count_tar(file: pathlib.Path, images: tuple[str, ...], need_captions: bool) -> int:
    """Counts records by the names of their members; the one that is cut off is a record too."""
    count, suffixes = 0, set()
    try:
        with tarfile.open(file) as tar:
            for _, members in _tar_groups(tar):
                of_record = {suffix for suffix, _ in members}
                suffixes |= of_record
                count += not of_record.isdisjoint((*images, *CAPTION))
    except READ_ERRORS as error:
        if not suffixes:
            raise ValueError(f"{file}: not a tar file") from error
        count += 1
    needed = (("images", images), ("captions", CAPTION))
    for what, expected in needed if need_captions else needed[:1]:
        if suffixes and suffixes.isdisjoint(expected):
            raise ValueError(
                f"{file}: no {what}: expected members that end in {', '.join(expected)}, "
                f"found {', '.join(sorted(suffixes))}"
            )
    return count


def _parquet(file: pathlib.Path) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{file.name} needs pyarrow to be read: pip install "align-tf[data]"', name=error.name
        ) from error
    return parquet.ParquetFile(file)


def _image_column(file: pathlib.Path, image_key: str | None) -> str | None:
    """Returns the column of a Parquet file that holds encoded images, or structs with `bytes`."""
    if file.suffix.lower() != ".parquet":
        return None
    for field in _parquet(file).schema_arrow:
        inline = str(field.type) in ("binary", "large_binary") or (
            str(field.type).startswith("struct<") and field.type.get_field_index("bytes") >= 0
        )
        if inline and field.name in (IMAGE_KEYS if image_key is None else (image_key,)):
            return field.name
    return None


def _parquet_records(
    file: pathlib.Path, image_key: str | None, caption_key: str | None, need_captions: bool
) -> Iterator[Record]:
    table = _parquet(file)
    names = table.schema_arrow.names
    image = _image_column(file, image_key)
    caption = _choose(str(file), "caption", caption_key, CAPTION_KEYS, names, need_captions)
    columns = [image, *({caption, "key"} & set(names))]
    batches = table.iter_batches(batch_size=CHUNK, columns=columns)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows):
        content, key = row[image], row.get("key")
        if isinstance(content, dict):  # as Hugging Face's datasets writes them
            key = key or os.path.splitext(content.get("path") or "")[0]
            content = content["bytes"]
        yield str(key or f"{file}[{number}]"), content or b"", _strings(row.get(caption))


def _count_parquet(
    file: pathlib.Path, image_key: str | None, caption_key: str | None, need_captions: bool
) -> int:
    table = _parquet(file)
    if _image_column(file, image_key) is None:
        raise ValueError(f"{file}: expected images in it, as in the files before")
    names = table.schema_arrow.names
    _choose(str(file), "caption", caption_key, CAPTION_KEYS, names, need_captions)
    return table.metadata.num_rows


# --- a tf.data.Dataset ------------------------------------------------------------------------


def _open_dataset(
    dataset: tf.data.Dataset,
    image_key: str | None,
    caption_key: str | None,
    need_captions: bool,
) -> Source:
    spec, name = dataset.element_spec, "the dataset"
    if not isinstance(spec, dict):
        raise ValueError(f"{name}: expected dicts with an image and captions, found {spec}")
    image_key = _choose(name, "image", image_key, IMAGE_KEYS, spec)
    caption_key = _choose(name, "caption", caption_key, CAPTION_KEYS, spec, need_captions)
    inner = None  # as in TensorFlow Datasets' coco_captions
    if caption_key and isinstance(spec[caption_key], dict):
        inner = _choose(f"{name}'s {caption_key}", "caption", None, JSON_KEYS, spec[caption_key])
    count = int(dataset.cardinality())
    if count == tf.data.INFINITE_CARDINALITY:
        raise ValueError(f"{name}: endless, expected one pass")
    if count == 0:
        raise ValueError(f"{name}: empty, expected one record or more")

    def element(number: tf.Tensor, features: dict[str, Any]) -> tuple[Any, Any, Any]:
        image = features[image_key]
        # None, of a length that is not known in the graph: so that batches of them are ragged.
        captions = features[caption_key] if caption_key else tf.boolean_mask([""], [False])
        if image.dtype != tf.string:
            image = tf.io.encode_png(image, compression=0)  # stored: quick, and exact
        captions = captions[inner] if inner else captions
        key = features.get("key", _place(tf.constant(name), number))
        return key, image, tf.reshape(captions, [-1])

    records = dataset.enumerate().map(element)
    return Source(
        name,
        None if count == tf.data.UNKNOWN_CARDINALITY else count,
        lambda seed, first=0: _shuffled(records, seed).skip(first),
        _load_record,
    )


def _load_record(batch: tuple[Any, Any, Any]) -> dict[str, Any]:
    return dict(zip(("key", "image_bytes", "captions"), batch, strict=True))
