"""Readers and batches: real files in each format, the order, what is left out, the augmentation."""

import csv
import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from png_reading import ImagesOfPng
from quick_xla import QUICK_XLA

from align_tf import AlignImageProcessor, AlignProcessor, AlignTokenizer
from align_tf.data import dataset as dataset_module, make_dataset, records
from align_tf.data.readers import open_source

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "red", "a"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
ANIMALS = WORDS[:10]
BUCKETS = (4, 8, 16)
SIDE, CROP = 12, 8


def encoded(number: int, format: str = "PNG", side: int = SIDE) -> bytes:
    """A picture that tells where each of its pixels came from: row, column, number."""
    row, column = np.mgrid[:side, :side]
    pixels = np.stack([10 * row, 10 * column, np.full_like(row, number)], axis=-1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, format)
    return file.getvalue()


# key, image, captions
RECORDS = [
    (f"part{i // 5}/{name}", encoded(i), [name, f"a red {name}"] if i % 2 else [name])
    for i, name in enumerate(ANIMALS)
]


def example(**features: list[bytes]) -> bytes:
    lists = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=value))
        for name, value in features.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=lists)).SerializeToString()


def write_folder(path: pathlib.Path) -> pathlib.Path:
    for key, image, captions in RECORDS:
        file = path / f"{key}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
        if len(captions) == 1:
            file.with_suffix(".txt").write_text(f"{captions[0]}\n")
        else:
            value = captions if key.endswith("bee") else {"captions": captions}
            file.with_suffix(".json").write_text(json.dumps(value))
    return path


def write_tar(path: pathlib.Path, rows: list = RECORDS) -> pathlib.Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for key, image, captions in rows:
            members = {
                "png": image,
                "json": json.dumps({"caption": captions, "width": 3}).encode(),
                "cls": b"7",
            }
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"./{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_tfrecord(path: pathlib.Path, rows: list = RECORDS) -> pathlib.Path:
    options = "GZIP" if path.suffix == ".gz" else None
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for key, image, captions in rows:
            texts = [text.encode() for text in captions]
            writer.write(example(key=[key.encode()], jpg=[image], txt=texts))
    return path


def write_table(path: pathlib.Path, columns: tuple[str, str] = ("path", "caption")) -> pathlib.Path:
    write_folder(path.parent)
    rows = [(f"{key}.png", text) for key, _, captions in RECORDS for text in captions]
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        path.write_text("\n".join(lines))
    elif path.suffix == ".parquet":
        write_parquet(path, dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    return path


def write_parquet(path: pathlib.Path, columns: dict[str, list]) -> pathlib.Path:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_inline_parquet(path: pathlib.Path) -> pathlib.Path:
    keys, images, captions = map(list, zip(*RECORDS, strict=True))
    return write_parquet(path, {"key": keys, "jpg": images, "caption": captions})


def write_hugging_face_parquet(path: pathlib.Path) -> pathlib.Path:
    keys, images, captions = zip(*RECORDS, strict=True)
    structs = [{"bytes": b, "path": f"{k}.png"} for k, b in zip(keys, images, strict=True)]
    return write_parquet(path, {"image": structs, "text": list(captions)})


def tfds_like(path: pathlib.Path) -> tf.data.Dataset:
    """Features as TensorFlow Datasets' coco_captions has them, of a length that is not known."""
    arrays = [np.asarray(Image.open(io.BytesIO(image))) for _, image, _ in RECORDS]

    def features():
        for (key, _, captions), array in zip(RECORDS, arrays, strict=True):
            yield {"key": key, "image": array, "captions": {"text": captions}}

    signature = {
        "key": tf.TensorSpec([], tf.string),
        "image": tf.TensorSpec([None, None, 3], tf.uint8),
        "captions": {"text": tf.TensorSpec([None], tf.string)},
    }
    return tf.data.Dataset.from_generator(features, output_signature=signature)


FORMATS = {
    "folder": (write_folder, "files"),
    "tar": (write_tar, "00000.tar"),
    "tar.gz": (write_tar, "00000.tar.gz"),
    "tfrecord": (write_tfrecord, "00000.tfrecord"),
    "tfrecord.gz": (write_tfrecord, "00000.tfrecord.gz"),
    "csv": (write_table, "table/train.csv"),
    "tsv": (write_table, "table/train.tsv"),
    "jsonl": (write_table, "table/train.jsonl"),
    "parquet": (write_table, "table/train.parquet"),
    "inline parquet": (write_inline_parquet, "00000.parquet"),
    "datasets' parquet": (write_hugging_face_parquet, "00000.parquet"),
    "dataset": (tfds_like, ""),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Writes the ten records in a format, once."""
    written = {}

    def get(name: str):
        if name not in written:
            write, file = FORMATS[name]
            written[name] = write(tmp_path_factory.mktemp("data") / file)
        return written[name]

    return get


SCALE = {"rescale_factor": 1.0, "rescale_offset": False}


@pytest.fixture(scope="module")
def full_processor() -> AlignProcessor:
    images = AlignImageProcessor(size=SIDE, crop_size=CROP, max_image_pixels=SIDE * SIDE, **SCALE)
    return AlignProcessor(images, AlignTokenizer(VOCAB))


@pytest.fixture(scope="module")
def png_processor(full_processor) -> AlignProcessor:
    """Gives what `full_processor` does, of intact PNG files."""
    return AlignProcessor(
        ImagesOfPng(do_resize=False, crop_size=CROP, **SCALE), full_processor.tokenizer
    )


@pytest.fixture
def batches(png_processor):
    """Makes a dataset and lists its batches; endless ones must be cut by `take`."""

    def get(source, take: int = -1, **options) -> list[dict[str, np.ndarray]]:
        settings = {
            "processor": png_processor,
            "batch_size": 4,
            "length_buckets": BUCKETS,
            **options,
        }
        return list(make_dataset(source, **settings).take(take).as_numpy_iterator())

    return get


def texts(batch: dict[str, np.ndarray]) -> list[str]:
    return [" ".join(VOCAB[i] for i in row if i > 4) for row in batch["input_ids"]]


def animals(list_of_batches: list) -> list[list[str]]:
    """Returns which animal each row of each batch shows, by its image."""
    return [[ANIMALS[int(row[0, 0, 2])] for row in b["pixel_values"]] for b in list_of_batches]


def assert_equal(left: list, right: list) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# --- formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_records(source, name):
    found = list(records(source(name)).as_numpy_iterator())
    assert [record["key"].decode() for record in found] == [key for key, _, _ in RECORDS]
    captions = [[text.decode() for text in record["captions"]] for record in found]
    assert captions[:2] == [["ant"], ["bee", "a red bee"]]
    assert captions == [texts for _, _, texts in RECORDS]
    if name == "dataset":  # its images were arrays
        pixels = [np.asarray(Image.open(io.BytesIO(r["image_bytes"]))) for r in found]
        expected = [np.asarray(Image.open(io.BytesIO(image))) for _, image, _ in RECORDS]
        np.testing.assert_array_equal(pixels, expected)
    else:
        assert [record["image_bytes"] for record in found] == [image for _, image, _ in RECORDS]


@pytest.mark.parametrize("name", FORMATS)
def test_the_first_records_can_be_left_out(source, name):
    opened = open_source(source(name))
    expected = [key for key, _, _ in RECORDS]
    for first in (0, 3, 10):
        batches = opened.elements(None, first).ragged_batch(4).enumerate()
        loaded = batches.map(lambda _, elements: opened.load(elements)["key"])
        keys = [key.decode() for batch in loaded.as_numpy_iterator() for key in batch]
        assert keys == expected[first:]


def test_the_files_before_the_first_record_are_not_opened(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", RECORDS[3 * number : 3 * number + 3])
    opened = open_source(tmp_path)
    (tmp_path / "0.tar").unlink()
    (tmp_path / "1.tar").unlink()
    for first, expected in ((6, ["gnu", "hen", "ibis"]), (8, ["ibis"])):
        found = [key.decode() for key, _, _ in opened.elements(None, first).as_numpy_iterator()]
        assert [key.rpartition("/")[2] for key in found] == expected


def without_captions(name: str, path: pathlib.Path) -> str | tf.data.Dataset:
    """The first three records, images alone."""
    keys, images, _ = map(list, zip(*RECORDS[:3], strict=True))
    if name == "dataset":
        return tf.data.Dataset.from_tensor_slices({"key": keys, "image": images})
    if name == "parquet":
        write_parquet(path / "0.parquet", {"key": keys, "jpg": images})
    elif name == "csv":
        (path / "0.csv").write_text("\n".join(["path", *(f"{key}.png" for key in keys)]))
    for key, image in zip(keys, images, strict=True):
        if name == "tar":
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(image)
            with tarfile.open(path / "0.tar", "a") as tar:
                tar.addfile(member, io.BytesIO(image))
        elif name in ("folder", "csv"):
            (path / key).parent.mkdir(exist_ok=True)
            (path / f"{key}.png").write_bytes(image)
    if name == "tfrecord":
        with tf.io.TFRecordWriter(str(path / "0.tfrecord")) as writer:
            for key, image in zip(keys, images, strict=True):
                writer.write(example(key=[key.encode()], jpg=[image]))
    return str(path / "0.csv" if name == "csv" else path)


@pytest.mark.parametrize("name", ["folder", "csv", "tar", "tfrecord", "parquet", "dataset"])
def test_images_alone_are_read_where_captions_are_not_needed(tmp_path, name):
    source = without_captions(name, tmp_path)
    with pytest.raises(ValueError, match="no captions"):
        open_source(source)
    opened = open_source(source, need_captions=False)
    batches = opened.elements(None).ragged_batch(2).enumerate()
    loaded = list(batches.map(lambda _, elements: opened.load(elements)))
    keys = [key.decode() for batch in loaded for key in batch["key"].numpy()]
    assert keys == [key for key, _, _ in RECORDS[:3]]
    assert [image for batch in loaded for image in batch["image_bytes"].numpy()] == [
        image for _, image, _ in RECORDS[:3]
    ]
    assert [texts for batch in loaded for texts in batch["captions"].to_list()] == [[], [], []]


@pytest.mark.parametrize(("captions", "expected"), [(b"a", [b"a"]), ([b"a", b"b"], [b"a", b"b"])])
def test_captions_of_a_data_set_that_are_one_or_a_fixed_number(captions, expected):
    features = {"image": [encoded(0)], "caption": [captions]}
    (record,) = records(tf.data.Dataset.from_tensor_slices(features)).as_numpy_iterator()
    assert record["captions"].tolist() == expected


def test_records_are_plain_tensors(source):
    dataset = records(source("tar"))
    assert len(dataset) == 10
    assert dataset.element_spec == {
        "key": tf.TensorSpec([], tf.string),
        "image_bytes": tf.TensorSpec([], tf.string),
        "captions": tf.TensorSpec([None], tf.string),
    }


def test_shards_are_found_by_folder_glob_and_list(tmp_path):
    for i in (0, 1):
        write_tar(tmp_path / f"{i:05d}.tar", RECORDS[5 * i : 5 * i + 5])
    (tmp_path / "00000_stats.json").write_text("{}")
    shards = [tmp_path / "00000.tar", str(tmp_path / "00001.tar")]
    for source in (tmp_path, str(tmp_path / "*.tar"), shards):
        assert open_source(source).count == 10
        assert [record["key"] for record in records(source).as_numpy_iterator()] == [
            key.encode() for key, _, _ in RECORDS
        ]


def test_columns_and_features_of_other_names(tmp_path):
    table = write_table(tmp_path / "t" / "train.csv", ("picture", "alt"))
    with pytest.raises(ValueError, match=r"no images: expected one of path, .*found picture, alt"):
        open_source(table)
    with pytest.raises(ValueError, match=r"no captions: expected .*caption_key; found picture"):
        open_source(table, image_key="picture")
    assert open_source(table, image_key="picture", caption_key="alt").count == 10
    file = tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(example(photo=[encoded(3)], alt=[b"dog"]))
    with pytest.raises(ValueError, match="found alt, photo"):
        open_source(file)
    (record,) = records(file, image_key="photo", caption_key="alt").as_numpy_iterator()
    assert record["key"].decode() == f"{file}[0]"
    assert record["captions"].tolist() == [b"dog"]


def empty_folder(path):
    return path


def folder_without_captions(path):
    (path / "a.png").write_bytes(encoded(0))
    return path


def empty_tfrecord(path):
    (path / "a.tfrecord").touch()
    return path / "a.tfrecord"


def no_tfrecord(path):
    (path / "a.tfrecord").write_bytes(b"not a TFRecord file, though it is named so")
    return path / "a.tfrecord"


def no_tar(path):
    (path / "a.tar").write_bytes(b"not a tar file" * 100)
    return path / "a.tar"


def tar_without_captions(path):
    with tarfile.open(path / "a.tar", "w") as tar:
        (path / "a.png").write_bytes(encoded(0))
        tar.add(path / "a.png", "a.png")
    return path / "a.tar"


def empty_table(path):
    (path / "a.csv").write_text("path,caption\n")
    return path / "a.csv"


def broken_lines(path):
    (path / "a.jsonl").write_text('{"path": "a.png", "caption": "ant"}\n{"path": \n')
    return path / "a.jsonl"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path / "none.tar", FileNotFoundError, "none.tar: no such file"),
        (lambda path: str(path / "*.tfrecord"), FileNotFoundError, r"\*.tfrecord: no such file"),
        (lambda path: [], ValueError, "found an empty list"),
        (lambda path: 3, ValueError, "found int"),
        (lambda path: __file__, ValueError, "test_dataset.py: expected a folder of images"),
        (empty_folder, ValueError, "empty, expected a folder of images"),
        (folder_without_captions, ValueError, "no captions: expected a .txt or a .json"),
        (empty_tfrecord, ValueError, "empty, expected one record or more"),
        (no_tfrecord, ValueError, "not a TFRecord file"),
        (no_tar, ValueError, "not a tar file"),
        (tar_without_captions, ValueError, "no captions: expected members that end in .txt"),
        (empty_table, ValueError, "empty, expected one image or more"),
        (broken_lines, ValueError, "line 2: not valid JSON"),
        (lambda path: tf.data.Dataset.range(3), ValueError, "expected dicts"),
    ],
)
def test_a_source_that_is_none_is_named(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        open_source(make(tmp_path))


def test_files_of_two_kinds_are_refused(source):
    with pytest.raises(ValueError, match="expected one kind of file, found tar, tfrecord"):
        open_source([source("tar"), source("tfrecord")])


# --- batches in order -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "dataset"])
def test_evaluation_is_in_order_and_filled_up(batches, full_processor, png_processor, source, name):
    reading = full_processor if name == "folder" else png_processor
    first, _, last = found = batches(source(name), processor=reading)
    assert texts(first) == ["ant", "bee", "cat", "dog"]
    assert texts(last) == ["ibis", "jay", "", ""]
    assert [batch["sample_weight"].tolist() for batch in found] == [[1.0] * 4] * 2 + [[1, 1, 0, 0]]
    # [CLS] ant [SEP], padded to the shortest bucket
    assert first["input_ids"].tolist()[0] == [2, 5, 3, 0]
    assert first["attention_mask"].tolist()[0] == [1, 1, 1, 0]
    assert first["token_type_ids"].tolist()[0] == [0, 0, 0, 0]
    # the middle 8 of 12 pixels begin at 2
    assert first["pixel_values"][1, 0, 0].tolist() == [20.0, 20.0, 1.0]
    assert first["pixel_values"].shape == (4, 8, 8, 3)
    dtypes = {name: value.dtype.name for name, value in first.items()}
    assert dtypes == {
        "pixel_values": "float32",
        "input_ids": "int32",
        "token_type_ids": "int32",
        "attention_mask": "int32",
        "image_ids": "int32",
        "text_ids": "int32",
        "sample_weight": "float32",
    }
    assert all(np.isfinite(value).all() for value in last.values())


def test_ids_are_alike_where_image_or_text_is(batches, tmp_path):
    rows = {"a": (0, "a Cat"), "b": (1, "a cat"), "c": (0, "a " * 5), "d": (2, "a " * 99)}
    for name, (number, text) in rows.items():
        (tmp_path / f"{name}.png").write_bytes(encoded(number))
        (tmp_path / f"{name}.txt").write_text(text)
    found = batches(tmp_path, batch_size=1)
    a, b, c, d = (int(batch["image_ids"][0]) for batch in found)
    assert a == c
    assert len({a, b, d}) == 3
    # Text is padded to the bucket of the longest in its batch, or cut; the id does not tell.
    assert [batch["input_ids"].shape[1] for batch in found] == [4, 4, 8, 16]
    assert found[3]["input_ids"][0].tolist() == [2, *[16] * 14, 3]
    ids = [int(batch["text_ids"][0]) for batch in found]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    (together,) = batches(tmp_path, batch_size=4)
    assert together["text_ids"].tolist() == ids


def test_buckets_change_no_embedding(batches, source, model):
    (short,), (long,) = (
        batches(source("folder"), batch_size=10, length_buckets=buckets)
        for buckets in (BUCKETS, (16,))
    )
    assert (short["input_ids"].shape, long["input_ids"].shape) == ((10, 4), (10, 16))
    left, right = (
        keras.ops.convert_to_numpy(
            keras.ops.normalize(model.get_text_features(dict(batch, sample_weight=None)))
        )
        for batch in (short, long)
    )
    np.testing.assert_allclose(left, right, atol=1e-5)


# --- order, shards and resume -----------------------------------------------------------------

# Seed 0, batches of 4: the order of two epochs.
ORDER = {
    "folder": [
        ["bee", "gnu", "jay", "fox"],
        ["eel", "hen", "cat", "ibis"],
        ["gnu", "bee", "jay", "ibis"],
        ["eel", "ant", "dog", "fox"],
    ],
    "tar": [
        ["eel", "gnu", "cat", "dog"],
        ["hen", "jay", "fox", "ibis"],
        ["bee", "hen", "ibis", "cat"],
        ["dog", "jay", "ant", "fox"],
    ],
}


def order(source, size=4, training=True, seed=0, epochs=2, start=0) -> list[list[str]]:
    """Returns the names in each batch, without decoding its images."""
    opened = open_source(source)
    dataset, _ = dataset_module._batches(opened, size, training, seed, epochs, start)
    keys = dataset.map(lambda step, elements: dataset_module._load(opened, elements)["key"])
    return [[key.decode().split("/")[-1] for key in batch] for batch in keys.as_numpy_iterator()]


@pytest.mark.parametrize("name", ORDER)
def test_order_is_that_of_the_seed(source, name):
    tf.random.set_seed(17)  # has no part in it
    found = order(source(name))
    assert found == ORDER[name]
    assert len({*found[0], *found[1]}) == len({*found[2], *found[3]}) == 8  # none comes twice
    assert order(source(name), seed=1) != found


def test_shards_of_many_files_are_mixed(tmp_path):
    for i, record in enumerate(RECORDS):
        write_tfrecord(tmp_path / f"{i}.tfrecord", [record])
    first, second = order(tmp_path, size=10)
    assert first != second
    assert sorted(first) == sorted(second) == ANIMALS


@pytest.mark.parametrize("name", ["folder", "tar", "tfrecord", "dataset"])
def test_resume_keeps_the_order(source, name):
    unbroken = order(source(name), epochs=3)  # two batches an epoch
    assert len(unbroken) == 6
    for start in (1, 2, 5):
        assert order(source(name), epochs=3, start=start) == unbroken[start:]


def test_resume_gives_the_batches_of_an_unbroken_run(batches, source):
    unbroken = batches(source("folder"), take=5, training=True)
    assert animals(unbroken) == order(source("folder"), epochs=3)[:5]
    assert_equal(batches(source("folder"), take=2, training=True, start_step=3), unbroken[3:])


@pytest.mark.parametrize(("name", "training"), [("folder", True), ("tfrecord", False)])
def test_workers_share_each_global_batch(batches, source, name, training):
    options = {"training": training, "epochs": 2, "length_buckets": (16,)}
    whole = batches(source(name), **options)
    workers = [batches(source(name), batch_size=2, shard=(i, 2), **options) for i in (0, 1)]
    joined = [
        {name: np.concatenate([a[name], b[name]]) for name in a}
        for a, b in zip(*workers, strict=True)
    ]
    assert_equal(joined, whole)


def test_what_resume_leaves_out_is_not_decoded(batches, tmp_path):
    write_folder(tmp_path)
    (tmp_path / "part0" / "ant.png").write_bytes(b"broken")
    assert len(batches(tmp_path, max_errors=0, start_step=1)) == 2


def test_lengths(source):
    def length(name, training=False, epochs=1, start=0):
        return dataset_module._batches(open_source(source(name)), 4, training, 0, epochs, start)[1]

    assert length("folder") == length("tar") == 3
    assert length("folder", epochs=3) == 9
    assert length("tfrecord", training=True, epochs=3, start=1) == 5
    assert length("folder", training=True, epochs=None) == tf.data.INFINITE_CARDINALITY
    assert length("dataset") is None


@pytest.mark.parametrize("name", ["folder", "dataset"])
def test_too_few_records_for_a_training_batch(full_processor, source, name):
    with pytest.raises(ValueError, match="expected 11 or more for a batch"):
        make_dataset(source(name), full_processor, batch_size=11, training=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "expected a positive batch_size"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"start_step": -1}, "start_step=-1"),
        ({"length_buckets": (1,)}, "expected lengths of 2 tokens or more"),
    ],
)
def test_arguments_out_of_range(full_processor, source, option, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(source("folder"), full_processor, **{"batch_size": 4, **option})


# --- augmentation -----------------------------------------------------------------------------


def test_training_crops_flips_and_draws_captions(batches, full_processor, source):
    found = batches(source("folder"), 8, processor=full_processor, batch_size=10, training=True)
    images = np.concatenate([batch["pixel_values"] for batch in found]).astype(int)  # (80, 8, 8, 3)
    rows, columns = images[..., 0] // 10, images[..., 1] // 10
    flipped = columns[:, 0, 0] > columns[:, 0, -1]
    columns = np.where(flipped[:, None, None], columns[:, :, ::-1], columns)
    tops, lefts = rows[:, 0, 0], columns[:, 0, 0]
    # Whole windows, of all the places that they can take, and one half of them flipped.
    row, column = np.mgrid[:CROP, :CROP]
    np.testing.assert_array_equal(rows, tops[:, None, None] + row)
    np.testing.assert_array_equal(columns, lefts[:, None, None] + column)
    assert set(tops) == set(lefts) == {0, 1, 2, 3, 4}
    assert 25 <= flipped.sum() <= 55
    assert len({*zip(tops, lefts, flipped, strict=True)}) > 25

    drawn = [text for batch in found for text in texts(batch) if text.endswith("bee")]
    assert len(drawn) == 8
    assert set(drawn) == {"bee", "a red bee"}


def test_training_without_augmentation_takes_the_centers(batches, source):
    found = batches(source("folder"), 1, batch_size=10, training=True, augment=False)
    images = found[0]["pixel_values"].astype(int)
    middle = (SIDE - CROP) // 2
    row, column = np.mgrid[middle : middle + CROP, middle : middle + CROP]
    np.testing.assert_array_equal(images[..., 0] // 10, np.broadcast_to(row, images.shape[:3]))
    np.testing.assert_array_equal(images[..., 1] // 10, np.broadcast_to(column, images.shape[:3]))


# --- what is left out -------------------------------------------------------------------------


def test_corrupt_records_have_no_weight_and_are_reported(batches, full_processor, tmp_path, capfd):
    write_folder(tmp_path)
    (tmp_path / "part0" / "bee.png").write_bytes(RECORDS[1][1][:60])
    (tmp_path / "part0" / "cat.txt").write_text(" \n")
    (tmp_path / "part0" / "eel.png").unlink()
    (tmp_path / "part0" / "eel.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "part1" / "fox.png").write_bytes(encoded(5, side=SIDE + 1))
    found = batches(tmp_path, processor=full_processor, epochs=2)
    weights = [batch["sample_weight"].tolist() for batch in found]
    assert weights == [[1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]] * 2
    assert texts(found[0]) == ["ant", "bee", "", "dog"]
    assert all(np.isfinite(batch["pixel_values"]).all() for batch in found)
    lines = sorted(capfd.readouterr().err.split("\n"))
    lines = [line for line in lines if line.startswith(str(tmp_path))]  # TensorFlow has its own
    assert [line.partition(" (")[0] for line in lines] == [
        f"{tmp_path}: left out part0/bee: not a decodable image",
        f"{tmp_path}: left out part0/cat: no caption",
        f"{tmp_path}: left out part0/eel: no image, or its file cannot be read",
        f"{tmp_path}: left out part1/fox: the image declares more pixels than max_image_pixels",
    ]


def test_in_training_what_is_left_out_shows_an_image_of_its_batch(batches, tmp_path):
    """Black ones would move BatchNorm's averages."""
    write_folder(tmp_path)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "part0" / f"{name}.png").write_bytes(b"broken")
    left_out = 0
    for batch in batches(tmp_path, training=True, augment=False, epochs=1, batch_size=5):
        usable = batch["sample_weight"] == 1
        shown = batch["pixel_values"][usable]
        left_out += (~usable).sum()
        for image in batch["pixel_values"][~usable]:
            np.testing.assert_array_equal(image, shown[0])
    assert left_out == 3


def test_too_many_corrupt_records_end_the_dataset(batches, tmp_path):
    write_folder(tmp_path)
    for name in ("ant", "dog"):
        (tmp_path / "part0" / f"{name}.png").write_bytes(b"broken")
    with pytest.raises(tf.errors.InvalidArgumentError, match="part0/ant: not a decodable image"):
        batches(tmp_path, max_errors=0)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"dog: .* 2 records left out; max_err"
    ):
        batches(tmp_path, max_errors=1)


@pytest.mark.parametrize("name", ["a.tar", "a.tfrecord", "a.tar.gz", "a.tfrecord.gz"])
def test_a_file_that_is_cut_off(tmp_path, name):
    write = write_tar if ".tar" in name else write_tfrecord
    content = write(tmp_path / name.removesuffix(".gz")).read_bytes()
    at = content.index(RECORDS[7][1]) + 20  # within the eighth image
    if name.endswith(".gz"):  # stored, so that it ends at the same place
        head = gzip.compress(content[:at], 0)[:-8]
        (tmp_path / name).write_bytes(head)
    else:
        (tmp_path / name).write_bytes(content[:at])
    found = list(records(tmp_path / name).as_numpy_iterator())
    assert [bool(record["image_bytes"]) for record in found] == [True] * 7 + [False]
    assert found[7]["key"].decode() == f"{tmp_path / name}, lost record 1"


def test_a_damaged_tfrecord_keeps_its_place(tmp_path):
    broken = write_tfrecord(tmp_path / "0.tfrecord", RECORDS[:4])
    write_tfrecord(tmp_path / "1.tfrecord", RECORDS[4:])
    content = bytearray(broken.read_bytes())
    content[content.index(RECORDS[2][1]) + 20] ^= 255  # its checksum is wrong now
    broken.write_bytes(content)
    found = list(records(tmp_path).as_numpy_iterator())
    assert [bool(record["image_bytes"]) for record in found] == [True] * 2 + [False] * 2 + [
        True
    ] * 6
    assert found[4]["key"] == b"part0/eel"


# --- training ---------------------------------------------------------------------------------

FIT = """
import sys
import keras
import numpy as np
from align_tf import AlignConfig, AlignModel, AlignProcessor
from align_tf.data import make_dataset

model = AlignModel(AlignConfig.from_pretrained(sys.argv[1]))
processor = AlignProcessor.from_pretrained(sys.argv[1])
train = make_dataset(sys.argv[2], processor, batch_size=4, training=True, length_buckets=(8,))
model.compile(optimizer=keras.optimizers.SGD(0.01))
history = model.fit(train, epochs=2, steps_per_epoch=2, verbose=0).history
assert len(history["loss"]) == 2
assert np.isfinite(history["loss"]).all(), history
print(keras.backend.backend())
"""


@pytest.mark.slow
def test_model_fits_on_jax(source, full_processor, tiny_config, tmp_path):
    pytest.importorskip("jax")
    tiny_config.save_pretrained(tmp_path)
    full_processor.save_pretrained(tmp_path)
    command = [sys.executable, "-c", FIT, str(tmp_path), str(source("folder"))]
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": QUICK_XLA,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "jax"
