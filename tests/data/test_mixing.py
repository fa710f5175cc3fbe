"""Several sources by weights: whose each pair is, in which order, and what follows a step."""

import collections
import io
import re
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from png_reading import ImagesOfPng

from align_tf import AlignProcessor
from align_tf.data import dataset as dataset_module, make_dataset, write_tfrecords
from align_tf.data.dataset import batch_keys
from align_tf.data.left_out import LeftOut
from align_tf.data.mixing import Mixture
from align_tf.data.readers import list_files, open_sources
from align_tf.data.weights import shares_of
from align_tf.preprocessing.image_processing import BROKEN


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Seven pairs in the folder `f`, ten in `t.tar`, five in `r`, each pair's key its own."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "f").mkdir()
    for number in range(7):
        (folder / "f" / f"f{number}.png").write_bytes(png(number))
        (folder / "f" / f"f{number}.txt").write_text("red")
    with tarfile.open(folder / "t.tar", "w") as tar:
        for number in range(10):
            for suffix, content in (("png", png(10 + number)), ("txt", b"green")):
                member = tarfile.TarInfo(f"t{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for number in range(5):
        (folder / f"r{number}.png").write_bytes(png(20 + number))
    pairs = [(folder / f"r{number}.png", "blue") for number in range(5)]
    write_tfrecords(pairs, folder / "r", progress=False)
    return folder


def unknown(keys: str) -> tf.data.Dataset:
    """Pairs of a data set that does not say how many it has."""
    pairs = [{"key": key, "image": png(30), "text": "a"} for key in keys]
    columns = {name: [pair[name] for pair in pairs] for name in pairs[0]}
    return tf.data.Dataset.from_tensor_slices(columns).filter(lambda pair: True)


def drawn(source, weights, size, steps, start=0, seed=0) -> list[list[tuple[int, str]]]:
    """Returns of each pair of each batch the number of its source, and its key."""
    opened = open_sources(source, weights)
    batches, _ = dataset_module._batches(opened, size, True, seed, None, start)
    loaded = batches.map(lambda step, elements: dataset_module._load(opened, elements))
    rows = [(b["source"].numpy().tolist(), b["key"].numpy()) for b in loaded.take(steps)]
    return [
        [(n, key.decode().rpartition("/")[2]) for n, key in zip(*row, strict=True)] for row in rows
    ]


# --- whose -----------------------------------------------------------------------------------


WEIGHTS = [[3, 1], [1, 1, 1], [0.1, 0.3], [1e-6, 1], [7, 2, 5, 1e-3, 11, 0.5], [1] * 12]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_has_its_share_of_the_first_pairs_of_whatever_number(weights):
    mixture, before = Mixture([], shares_of(weights)), [0] * len(weights)
    for pairs in (*range(300), 10**4, 10**6 + 7, 2 * 10**10):
        drawn = mixture.drawn(pairs)
        assert sum(drawn) == pairs
        assert all(now >= then for now, then in zip(drawn, before, strict=True))
        for found, weight in zip(drawn, weights, strict=True):
            assert abs(found - pairs * weight / sum(weights)) <= len(weights) / 2 + 1e-5
        before = drawn


def test_weights_are_taken_as_they_are_written():
    assert shares_of([0.1, 0.3]) == shares_of([1, 3]) == shares_of([np.float64(0.25), 0.75])
    drawn = Mixture([], shares_of([3, 1])).drawn
    assert [drawn(pairs) for pairs in (0, 1, 2, 4, 10, 400)] == [
        *([0, 0], [1, 0], [2, 0], [3, 1], [8, 2], [300, 100]),
    ]


# --- in which order --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_batch_is_drawn_by_seed_and_step_alone(place):
    """Of each kind one, one of them twice, and one smaller than a batch, from any step on."""
    sources = [*(str(place / name) for name in ("f", "t.tar", "r", "f")), unknown("uvwxyz")]
    weights, size = [3, 5, 1, 3, 2], 8
    tf.random.set_seed(17)  # has no part in it
    batches = drawn(sources, weights, size, 14)
    assert batches[:2] == [
        *([(1, "t0"), (2, "r1"), (1, "t8"), (1, "t4"), (0, "f6"), (3, "f3"), (0, "f0"), (4, "z")],),
        *([(3, "f1"), (4, "u"), (1, "t9"), (3, "f0"), (3, "f5"), (0, "f1"), (1, "t7"), (1, "t1")],),
    ]
    assert drawn(sources, weights, size, 1, start=9) == batches[9:10]
    keys = batch_keys(sources, size, 0, 13, weights)
    assert [key.rpartition("/")[2] for key in keys] == [key for _, key in batches[13]]
    whole = Mixture([], shares_of(weights)).drawn(14 * size)
    found = collections.Counter(number for batch in batches for number, _ in batch)
    assert [found[number] for number in range(5)] == whole == [24, 40, 8, 24, 16]
    read = [[key for b in batches for n, key in b if n == number] for number in range(5)]
    for of_one, count in zip(read, (7, 10, 5, 7, 6), strict=True):
        passes = [of_one[first : first + count] for first in range(0, len(of_one), count)]
        assert all(len(set(one)) == len(one) for one in passes)  # none again before each was once
        assert len(set(passes[0])) == count and passes[0] != passes[1]
    assert read[0] != read[3]  # the same twice is not in step with itself


def test_a_seed_changes_whose_place_and_which_pair(place):
    sources = [str(place / "f"), str(place / "f")]
    (one,), (other,) = (drawn(sources, [1, 1], 8, 1, seed=seed) for seed in (1, 2))
    assert [number for number, _ in one] != [number for number, _ in other]
    assert sorted(one) != sorted(other)


def test_one_source_with_a_weight_is_as_one_without(place):
    assert open_sources([place / "f"], [3]).count == open_sources(place / "f", None).count == 7
    assert batch_keys([place / "f"], 4, 0, 3, [0.5]) == batch_keys(place / "f", 4, 0, 3)


# --- as batches ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_processor(processor) -> AlignProcessor:
    return AlignProcessor(ImagesOfPng(do_resize=False, crop_size=16), processor.tokenizer)


@pytest.mark.slow
def test_workers_share_each_batch_and_a_pass_is_of_all_pairs(place, small_processor):
    sources, weights = [str(place / name) for name in ("f", "r", "t.tar")], [4, 1, 1]

    def batches(**options):
        options = {"training": True, "epochs": 2, "length_buckets": (8,), **options}
        made = make_dataset(sources, small_processor, weights=weights, **options)
        assert int(made.cardinality()) == 4  # of 22 pairs, twice
        return list(made.as_numpy_iterator())

    whole, second = batches(batch_size=8), batches(batch_size=4, shard=(1, 2))
    assert len(whole) == 4
    for batch, part in zip(whole, second, strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(part[name], values[4:], err_msg=name)
    colors = [np.unique(part["input_ids"][:, 1]).tolist() for part in second]
    assert any(len(of_batch) > 1 for of_batch in colors)  # no worker has one source alone


def test_what_is_left_out_counts_for_each_source(place, capsys):
    """Whose keys may be the same."""
    opened = open_sources([place / "f", place / "t.tar"], [1, 1])
    limits = [LeftOut(source, 1, None) for source in opened.sources]

    def report(sources, keys):
        rows = {"source": tf.constant(sources), "key": tf.constant(keys)}
        dataset_module._reports(limits, tf.constant(0, tf.int64), rows, tf.fill(len(keys), BROKEN))

    report([0, 1], ["a", "a"])
    found = re.findall(r"/([\w.]+): left out (\w+): ", capsys.readouterr().err)
    assert found == [("f", "a"), ("t.tar", "a")]
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"t\.tar: b: .*, 2 records left out; m"
    ):
        report([1], ["b"])


def test_a_source_without_a_pair_ends_a_training_however_small_its_share(
    place, small_processor, tmp_path
):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"")
        (tmp_path / f"{number}.txt").write_text("red")
    options = {"batch_size": 4, "training": True, "weights": [7, 1], "max_errors": None}
    made = make_dataset([place / "t.tar", tmp_path], small_processor, **options)
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{tmp_path}: none of 3 records is"):
        list(made.take(30))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], r"weights=\[1\]: expected a number above 0 for each source, of which here is 2 so"),
        ([1, 0], r"weights=\[1, 0\]: expected a number above 0 for each source"),
        ([1, -1], r"weights=\[1, -1\]: expected a number above 0"),
        ([1, float("nan")], r"weights=\[1, nan\]: expected a number above 0"),
        ([float("inf"), 1], r"weights=\[inf, 1\]: expected a number above 0"),
        ([True, "1"], r"weights=\[True, '1'\]: expected a number above 0"),
        (3, "weights=3: expected a number above 0 for each source, in a list as the sources"),
        ({"f": 3, "t": 1}, "in a list as the sources"),
    ],
)
def test_weights_that_are_none_are_told(place, processor, weights, message):
    sources = [place / "f", place / "t.tar"]
    with pytest.raises(ValueError, match=message):
        make_dataset(sources, processor, batch_size=4, training=True, weights=weights)


def test_sources_that_do_not_fit_are_told(place, processor, tmp_path):
    f, tar = place / "f", place / "t.tar"
    with pytest.raises(ValueError, match=r"weights=\[\]: expected a number above 0"):
        make_dataset([], processor, batch_size=4, training=True, weights=[])
    options = {"training": True, "weights": [3, 1]}
    message = r"f: 7 records, expected 9 or more for its part of a batch of 12, or a smaller weight"
    with pytest.raises(ValueError, match=message):
        make_dataset([f, tar], processor, batch_size=12, **options)
    with pytest.raises(ValueError, match="of training alone"):
        make_dataset([f, tar], processor, batch_size=4, weights=[3, 1])
    with pytest.raises(ValueError, match="the dataset do not say how many pairs they hold"):
        make_dataset([f, unknown("uvw")], processor, batch_size=4, epochs=1, **options)
    with pytest.raises(ValueError, match="expected one kind of file, found folder, tar; in trai"):
        make_dataset([f, tar], processor, batch_size=4, training=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: empty, expected a folder of images"):
        make_dataset([f, tmp_path / "empty"], processor, batch_size=4, **options)


def test_a_listing_of_several_has_all_their_files(place):
    one, other = list_files(place / "f"), list_files(place / "t.tar")
    both = list_files(place / "f")
    both.extend(other)
    assert both.paths == [*one.paths, str(place / "t.tar")]
    assert both.digest() not in (one.digest(), other.digest())
