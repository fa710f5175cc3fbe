"""Image-text pairs to TFRecord files, which `make_dataset` reads at the speed of the disk."""

import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence

import tensorflow as tf

from align_tf import addresses
from align_tf.files import replacing
from align_tf.progress import track

PAIRS_PER_FILE = 4096

Image = str | os.PathLike | bytes
Pair = tuple[Image, str | Sequence[str]]


def write_tfrecords(
    pairs: Iterable[Pair],
    folder: str | os.PathLike,
    *,
    pairs_per_file: int = PAIRS_PER_FILE,
    progress: bool = True,
) -> list[addresses.Place]:
    """Writes images and their captions as TFRecord files, for `make_dataset(folder, ...)`.

    The images go in as they are encoded. Each file appears under its name when it is whole, and
    the last of them after all others.

    Args:
        pairs: (image, captions) one after the other: an image is a path or the bytes of a file,
            the captions are one string or several.
        folder: where the files go, new or empty; also a remote one, such as `gs://bucket/pairs`.
        pairs_per_file: pairs in one file; training reads several files in turn.
        progress: show it on stderr.

    Returns:
        The files, `00000.tfrecord` and on; their records hold `key`, `image_bytes`, `captions`.

    Raises:
        FileExistsError: the folder holds files already.
        FileNotFoundError: a path is no file.
        ValueError: there is no pair, or pairs_per_file is not a positive number.
        TypeError: an image or its captions are none of these.
    """
    folder = addresses.place(folder)
    if pairs_per_file < 1:
        raise ValueError(f"pairs_per_file={pairs_per_file}: expected a positive number")
    if addresses.names(folder):
        raise FileExistsError(f"{folder}: not empty, expected a folder of its own for the files")
    records = enumerate(track(pairs, "Writing TFRecord", show=progress))
    files = []
    while some := list(itertools.islice(records, pairs_per_file)):
        files.append(folder / f"{len(files):05}.tfrecord")
        with replacing(files[-1]) as path, tf.io.TFRecordWriter(str(path)) as writer:
            for number, pair in some:
                writer.write(_example(number, *pair))
    if not files:
        raise ValueError("pairs: expected one or more, found none")
    return files


def _example(number: int, image: Image, captions: str | Sequence[str]) -> bytes:
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"pair {number}: captions={captions!r}: expected a string or several")
    if isinstance(image, bytes):
        key = f"{number:09}"
    elif isinstance(image, str | os.PathLike):
        key, image = os.path.splitext(image)[0], pathlib.Path(image).read_bytes()
    else:
        raise TypeError(
            f"pair {number}: image of {type(image).__name__}: expected a path or a file's bytes"
        )
    features = {
        "key": [key.encode()],
        "image_bytes": [image],
        "captions": [text.encode() for text in texts],
    }
    return tf.train.Example(
        features=tf.train.Features(
            feature={
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
                for name, values in features.items()
            }
        )
    ).SerializeToString()
