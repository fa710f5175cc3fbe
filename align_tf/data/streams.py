"""Image-text records that come in a row: TFRecord, tar shards, images in Parquet, tf.data."""

import collections
import contextlib
import functools
import gzip
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from align_tf.addresses import Place, fetched, is_local, place
from align_tf.data.counting import Count, count_shards
from align_tf.data.folders import tell_unread
from align_tf.data.sources import (
    CAPTION_KEYS,
    IMAGE,
    IMAGE_KEYS,
    JSON_KEYS,
    Keys,
    Source,
    choose_key,
    open_parquet,
    parquet_rows,
    strings_in,
)
from align_tf.data.tars import READ_ERRORS, count_tar, tar_records
from align_tf.files import decode_text, readable
from align_tf.terminal import say_once

FILES_AT_A_TIME = 4  # of a shuffled stream, read in turn
SHUFFLE_BUFFER = 4096  # records of a shuffled stream held in memory, undecoded
CHUNK = 16  # records that a Python reader hands over at once
FIRST_RECORDS = 100  # of a TFRecord file, one of which tells its features
CHUNK_BYTES = 1 << 24  # of such records: those that have more come alone


# --- records that come in a row: TFRecord -----------------------------------------------------


def _stream(
    name: str,
    files: list[Place],
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
    names, counts = (
        tf.constant([os.fsencode(str(file)) for file in files]),
        tf.constant(counts, tf.int64),
    )

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


def open_tfrecords(
    name: str,
    files: list[Place],
    keys: Keys,
) -> Source:
    """Opens TFRecord files of tf.train.Example."""
    way = ["tfrecord"]
    counts = [one.records for one in count_shards(name, files, way, _count_tfrecord, keys.index)]
    first = next((file for file, count in zip(files, counts, strict=True) if count), None)
    if first is None:
        raise ValueError(f"{name}: empty, expected one record or more")
    with fetched(first) as local:
        features = _features(local, str(first))
    image = choose_key(str(first), "image", keys.image, IMAGE_KEYS, features)
    caption = choose_key(
        str(first), "caption", keys.caption, CAPTION_KEYS, features, keys.need_captions
    )
    remote = not all(map(is_local, files))
    spec = {
        "key": tf.io.FixedLenFeature([], tf.string, ""),
        image: tf.io.FixedLenFeature([], tf.string, ""),
        # A feature that is not there has no values.
        caption or "caption": tf.io.RaggedFeature(tf.string, row_splits_dtype=tf.int64),
    }

    def parse(place: tf.Tensor, record: tf.Tensor) -> tuple[tf.Tensor, ...]:
        parsed = tf.io.parse_single_example(record, spec)
        key = tf.where(parsed["key"] == "", place, parsed["key"])
        return key, parsed[image], parsed[caption or "caption"]

    def read(file: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        zipped = tf.strings.regex_full_match(file, r".*\.gz")

        def parsed(local: tf.Tensor) -> tf.data.Dataset:
            records = tf.data.TFRecordDataset(local, tf.where(zipped, "GZIP", "")).ignore_errors()
            numbered = tf.data.Dataset.zip(tf.data.Dataset.range(count), records)
            records = numbered.map(lambda number, record: parse(_place(file, number), record))
            return records.ignore_errors()

        found = _copy(file).flat_map(parsed) if remote else parsed(file)
        none = tf.boolean_mask([""], [False])  # of a length that is not known in the graph
        damaged = tf.data.Dataset.range(count).map(lambda i: (_damaged(file, i), "", none))
        return found.concatenate(damaged).take(count)

    return _stream(name, files, counts, read, _load_any_text(name))


def _copy(file: tf.Tensor) -> tf.data.Dataset:
    """Takes the address of a file to the path of its copy, which is there until the next."""

    def copy(file: bytes) -> Iterator[bytes]:
        with fetched(place(os.fsdecode(file))) as local:
            yield os.fsencode(local)

    signature = tf.TensorSpec([], tf.string)
    return tf.data.Dataset.from_generator(copy, args=(file,), output_signature=signature)


def _place(file: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Names a record that has no key."""
    return tf.strings.join([file, "[", tf.strings.as_string(number), "]"])


def _damaged(file: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Names one of the records that a damaged file lost."""
    return tf.strings.join([file, ", lost record ", tf.strings.as_string(number + 1)])


def _count_tfrecord(file: Place) -> Count:
    """Counts records by their headers; the one that a cut-off file ends in is a record too."""
    with fetched(file) as local:
        return Count(_headers(local))


def _headers(file: pathlib.Path) -> int:
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


def _features(file: pathlib.Path, name: str) -> list[str]:
    """Returns the names of the features in a file's first record that is not broken."""
    compression = "GZIP" if file.suffix == ".gz" else ""
    records = tf.data.TFRecordDataset(os.fsencode(file), compression).ignore_errors()
    for record in records.take(FIRST_RECORDS):
        with contextlib.suppress(Exception):  # protobuf's own errors
            if features := tf.train.Example.FromString(record.numpy()).features.feature:
                return sorted(features)
    raise ValueError(f"{name}: not a TFRecord file of tf.train.Example")


# --- records that Python reads: tar and Parquet -----------------------------------------------

Record = tuple[str, bytes, list[str]]


def open_tars(
    name: str,
    files: list[Place],
    keys: Keys,
) -> Source:
    """Opens webdataset shards."""
    images = IMAGE if keys.image is None else (f".{keys.image}",)
    count = functools.partial(count_tar, images=images, need_captions=keys.need_captions)
    counts = count_shards(name, files, ["tar", keys.image, keys.need_captions], count, keys.index)
    records = functools.partial(tar_records, images=images, caption_key=keys.caption)
    opened = _open_files(name, files, counts, records)
    tell_unread(
        name, sum((collections.Counter(one.unread) for one in counts), collections.Counter())
    )
    if dotted := sum(one.dotted for one in counts):
        example = next(one.example for one in counts if one.dotted)
        say_once(
            f"{readable(name)}: left out {dotted:,} images with a dot before the last one, "
            f"such as {readable(example)}: in webdataset a key ends at the first dot"
        )
    return opened


def open_image_tables(
    name: str,
    files: list[Place],
    keys: Keys,
) -> Source:
    """Opens Parquet files with the encoded images in them."""
    count = functools.partial(_count_parquet, keys=keys)
    counts = count_shards(name, files, ["parquet", *keys[:3]], count, keys.index)
    return _open_files(name, files, counts, functools.partial(_parquet_records, keys=keys))


def _open_files(
    name: str,
    files: list[Place],
    counts: list[Count],
    records: Callable[[Place], Iterator[Record]],
) -> Source:
    string = tf.TensorSpec([None], tf.string)

    def chunks(file: bytes) -> Iterator[tuple[Any, ...]]:
        intact = _until_damage(records(place(os.fsdecode(file))))
        for chunk in _chunks(intact):
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

    return _stream(name, files, [one.records for one in counts], read, _load_record)


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    chunk, size = [], 0
    for record in records:
        chunk.append(record)
        size += len(record[1])
        if len(chunk) == CHUNK or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _until_damage(records: Iterator[Record]) -> Iterator[Record]:
    # What a damaged file lost becomes rows without an image.
    with contextlib.suppress(*READ_ERRORS):
        yield from records


def image_column(file: Place, image_key: str | None) -> str | None:
    """Returns the column of a Parquet file that holds encoded images, or structs with `bytes`."""
    if file.suffix.lower() != ".parquet":
        return None
    for field in open_parquet(file).schema_arrow:
        inline = str(field.type) in ("binary", "large_binary") or (
            str(field.type).startswith("struct<") and field.type.get_field_index("bytes") >= 0
        )
        if inline and field.name in (IMAGE_KEYS if image_key is None else (image_key,)):
            return field.name
    return None


def _parquet_records(file: Place, keys: Keys) -> Iterator[Record]:
    names = open_parquet(file).schema_arrow.names
    image = image_column(file, keys.image)
    caption = choose_key(
        str(file), "caption", keys.caption, CAPTION_KEYS, names, keys.need_captions
    )
    columns = [image, *({caption, "key"} & set(names))]
    with fetched(file) as local:
        for number, row in enumerate(parquet_rows(local, CHUNK, columns)):
            content, key = row[image], row.get("key")
            if isinstance(content, dict):  # as Hugging Face's datasets writes them
                key = key or os.path.splitext(content.get("path") or "")[0]
                content = content["bytes"]
            yield str(key or f"{file}[{number}]"), content or b"", strings_in(row.get(caption))


def _count_parquet(file: Place, keys: Keys) -> Count:
    table = open_parquet(file)
    if image_column(file, keys.image) is None:
        raise ValueError(f"{file}: expected images in it, as in the files before")
    names = table.schema_arrow.names
    choose_key(str(file), "caption", keys.caption, CAPTION_KEYS, names, keys.need_captions)
    return Count(table.metadata.num_rows)


# --- a tf.data.Dataset ------------------------------------------------------------------------


def open_dataset(
    dataset: tf.data.Dataset,
    keys: Keys,
) -> Source:
    """Opens a dataset of TensorFlow Datasets' features."""
    spec, name = dataset.element_spec, "the dataset"
    if not isinstance(spec, dict):
        raise ValueError(f"{name}: expected dicts with an image and captions, found {spec}")
    image_key = choose_key(name, "image", keys.image, IMAGE_KEYS, spec)
    caption_key = choose_key(name, "caption", keys.caption, CAPTION_KEYS, spec, keys.need_captions)
    inner = None  # as in TensorFlow Datasets' coco_captions
    if caption_key and isinstance(spec[caption_key], dict):
        inner = choose_key(f"{name}'s {caption_key}", "caption", None, JSON_KEYS, spec[caption_key])
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
        captions = tf.reshape(captions[inner] if inner else captions, [-1])
        captions = tf.boolean_mask(captions, captions != "")  # of a length not known, as above
        key = features.get("key", _place(tf.constant(name), number))
        return key, image, captions

    records = dataset.enumerate().map(element)
    return Source(
        name,
        None if count == tf.data.UNKNOWN_CARDINALITY else count,
        lambda seed, first=0: _shuffled(records, seed).skip(first),
        _load_any_text(name),
    )


def _load_record(batch: tuple[Any, Any, Any]) -> dict[str, Any]:
    return dict(zip(("key", "image_bytes", "captions"), batch, strict=True))


def _load_any_text(name: str) -> Callable[[Any], dict[str, Any]]:
    """Makes the `load` of a source of bytes, whose captions need not be UTF-8."""
    told = []

    def decode(keys: np.ndarray, rows: np.ndarray, texts: np.ndarray) -> np.ndarray:
        decoded = [decode_text(text) for text in texts]
        foreign = [
            row for row, (_, is_unicode) in zip(rows, decoded, strict=True) if not is_unicode
        ]
        if len(foreign) and not told:
            told.append(True)
            key = readable(os.fsdecode(keys[foreign[0]]))
            say_once(
                f"{readable(name)}: captions that are not UTF-8 are read as Windows-1252, such as "
                f"that of {key}"
            )
        return np.array([text.encode() for text, _ in decoded], object)

    def load(batch: tuple[Any, Any, Any]) -> dict[str, Any]:
        record = _load_record(batch)
        captions = record["captions"]
        texts = captions.flat_values
        unicode = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8")
        inputs = (record["key"], captions.value_rowids(), texts)
        texts = tf.cond(
            tf.reduce_all(unicode == texts),
            lambda: texts,
            lambda: tf.ensure_shape(tf.numpy_function(decode, inputs, tf.string), texts.shape),
        )
        return {**record, "captions": captions.with_flat_values(texts)}

    return load
