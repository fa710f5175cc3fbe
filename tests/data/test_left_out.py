"""Records that are no pairs: how many are too many, and what is said of them."""

import io
import json
import pathlib
import re

import pytest
import tensorflow as tf
from PIL import Image

from align_tf.data import make_dataset
from align_tf.data.left_out import NO_IMAGE, LeftOut
from align_tf.data.readers import open_source
from align_tf.training import Recipe, read_recipe

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_folder(path: pathlib.Path, broken: tuple[str, ...]) -> pathlib.Path:
    for number, name in enumerate(NAMES):
        image = b"broken" if name in broken else encoded(number)
        (path / f"{name}.png").write_bytes(image)
        (path / f"{name}.txt").write_text("a picture")
    return path


def write_table(path: pathlib.Path, rows: int) -> pathlib.Path:
    """A table whose images are not where it says."""
    lines = [json.dumps({"path": f"images/{i}.png", "caption": "a picture"}) for i in range(rows)]
    (path / "table.jsonl").write_text("\n".join(lines))
    return path / "table.jsonl"


@pytest.fixture
def batches(processor):
    """Makes a dataset and lists its batches of four."""

    def get(source, take=-1, **options):
        dataset = make_dataset(source, processor, batch_size=4, length_buckets=(8,), **options)
        return list(dataset.take(take).as_numpy_iterator())

    return get


def failure(make) -> str:
    """The one message that a dataset ends with."""
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        make()
    found = re.search(r"assertion failed: \[(.*)\]\n", error.value.message)
    return found[1]


@pytest.mark.parametrize("training", [False, True])
def test_a_pass_without_a_pair_is_an_error(batches, tmp_path, training):
    table = write_table(tmp_path, 12)
    options = {"training": training, "max_errors": None, "take": 9 if training else -1}
    assert failure(lambda: batches(table, **options)) == (
        f"{table}: none of 12 records is a pair: 12 x no image, or its file "
        f"cannot be read (paths are taken relative to the folder of the table, {tmp_path})"
    )


@pytest.mark.slow
def test_a_pass_of_unknown_length_without_a_pair_is_an_error(batches):
    def features():
        yield from ({"image": b"broken", "caption": "a picture"} for _ in range(3))

    spec = {"image": tf.TensorSpec([], tf.string), "caption": tf.TensorSpec([], tf.string)}
    dataset = tf.data.Dataset.from_generator(features, output_signature=spec)
    message = failure(lambda: batches(dataset))
    assert message.startswith("the dataset: none of 3 records is a pair: 3 x not a decodable image")


def test_one_pair_is_enough_where_any_number_may_be_left_out(batches, tmp_path):
    write_folder(tmp_path, broken=tuple(NAMES[:9]))
    found = batches(tmp_path, max_errors=None, epochs=2)
    assert [batch["sample_weight"].sum() for batch in found] == [0, 0, 1] * 2


@pytest.mark.slow
def test_a_share_is_judged_at_the_end_of_a_small_pass(batches, tmp_path):
    write_folder(tmp_path, broken=("ant", "bee"))
    assert len(batches(tmp_path, max_errors="20%")) == 3
    message = failure(lambda: batches(tmp_path, max_errors="19.5%"))
    assert message.startswith(
        f"{tmp_path}: 2 of 10 records left out, 20.0%; max_errors=19.5%: 2 x not a decodable image"
    )


def test_a_share_is_judged_before_the_end_of_a_long_pass(tmp_path):
    left_out = LeftOut(open_source(write_table(tmp_path, 3000)), "50%", range(6))
    keys = tf.fill([500], "key")
    left_out.report(tf.constant(0, tf.int64), keys, tf.fill([500], NO_IMAGE))
    with pytest.raises(tf.errors.InvalidArgumentError, match="1000 of 1000 records left out"):
        left_out.report(tf.constant(1, tf.int64), keys, tf.fill([500], NO_IMAGE))


@pytest.mark.parametrize("limit", ["5", "101%", "-1%", "five", -1, 0.05, True, "5 %"])
def test_a_limit_that_is_none(processor, tmp_path, limit):
    message = r'max_errors=.*: expected a whole number of 0 or more, or a share .* such as "5%"'
    write_folder(tmp_path, broken=())
    with pytest.raises(ValueError, match=message):
        make_dataset(tmp_path, processor, batch_size=4, max_errors=limit)


def test_a_training_batch_of_one_pair_is_refused(processor, tmp_path):
    write_folder(tmp_path, broken=())
    with pytest.raises(ValueError, match="batch_size=1 in training: expected 2 or more"):
        make_dataset(tmp_path, processor, batch_size=1, training=True)
    make_dataset(tmp_path, processor, batch_size=1, training=True, shard=(1, 2))
    make_dataset(tmp_path, processor, batch_size=1)


def test_a_recipe_takes_a_share():
    given = {"data": "pairs", "output": "out", "model": "align-tiny", "steps": 1}
    assert Recipe(**given, max_errors="5%").max_errors == "5%"
    assert read_recipe(flags={**given, "max_errors": "2.5%"}).max_errors == "2.5%"
    assert read_recipe(flags={**given, "max_errors": "7"}).max_errors == 7
    with pytest.raises(ValueError, match=r"max_errors=0\.5: expected a whole number of 0 or more"):
        Recipe(**given, max_errors=0.5)
