"""Pairs written as TFRecord files are the pairs that the readers find."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from align_tf.data import records, write_tfrecords


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_files_hold_the_pairs_in_their_order(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    pairs = [(tmp_path / "a.png", "an ant"), (png(1), ["a bee", "eine Biene"]), (png(2), "a cat")]
    files = write_tfrecords(pairs, tmp_path / "pairs", pairs_per_file=2, progress=False)
    assert [file.name for file in files] == ["00000.tfrecord", "00001.tfrecord"]
    assert sorted((tmp_path / "pairs").iterdir()) == files
    found = list(records(tmp_path / "pairs").as_numpy_iterator())
    assert [record["image_bytes"] for record in found] == [png(0), png(1), png(2)]
    assert [record["captions"].tolist() for record in found] == [
        [b"an ant"],
        [b"a bee", b"eine Biene"],
        [b"a cat"],
    ]
    assert [record["key"].decode() for record in found] == [
        str(tmp_path / "a"),
        "000000001",
        "000000002",
    ]


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_captions_that_are_not_utf8_are_read_as_windows_1252(tmp_path, kind, capsys):
    texts = ["un café".encode("cp1252"), "ein Café".encode(), b"\x80 3"]
    with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as writer:
        for number, text in enumerate(texts):
            features = {"image": [png(number)], "caption": [text, b"plain"]}
            features = {
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
                for name, values in features.items()
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    source, name, key = tmp_path, tmp_path, f"{tmp_path}/0.tfrecord[0]"
    if kind == "dataset":
        images = [png(number) for number in range(3)]
        source = tf.data.Dataset.from_tensor_slices({"image": images, "caption": texts})
        name, key = "the dataset", "the dataset[0]"
    found = [record["captions"][0] for record in records(source).as_numpy_iterator()]
    assert [text.decode() for text in found] == ["un café", "ein Café", "€ 3"]
    assert capsys.readouterr().err == (
        f"{name}: captions that are not UTF-8 are read as Windows-1252, such as that of {key}\n"
    )


def test_a_folder_with_files_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_tfrecords([(png(0), "an ant")], tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_that_is_not_whole_does_not_appear(tmp_path):
    pairs = [(png(0), "an ant"), (png(1), "a bee"), (tmp_path / "missing.png", "a cat")]
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        write_tfrecords(pairs, tmp_path / "pairs", pairs_per_file=2, progress=False)
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["00000.tfrecord"]


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([], ValueError, "found none"),
        ([(np.zeros((4, 4, 3)), "an ant")], TypeError, "pair 0: image of ndarray"),
        ([(b"", 3)], TypeError, "pair 0: captions=3: expected a string or several"),
        ([(b"", ["an ant", b"a bee"])], TypeError, "pair 0: captions="),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, pairs, error, message):
    with pytest.raises(error, match=message):
        write_tfrecords(pairs, tmp_path / "pairs", progress=False)


def test_pairs_per_file_is_positive(tmp_path):
    with pytest.raises(ValueError, match="pairs_per_file=0"):
        write_tfrecords([(png(0), "an ant")], tmp_path / "pairs", pairs_per_file=0)
