"""The same image and the same text, for `align-tf evaluate` and for `RetrievalEvaluation`."""

import argparse
import io
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from align_tf.data import make_dataset
from align_tf.evaluation import Embedder, tasks
from align_tf.training import RetrievalEvaluation

WORDS = ("red", "green", "blue", "a", "picture")  # ids 5 to 9
IDS = 2**31 - 1


def encoded(color: str, compress_level: int = 6) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 20), color).save(file, "PNG", compress_level=compress_level)
    return file.getvalue()


def colliding(left: list[bytes], right: list[bytes]) -> tuple[int, int]:
    """Finds one of each that differ and have the same fingerprint of 31 bits."""
    hashes = [tf.strings.to_hash_bucket_fast(of, IDS).numpy() for of in (left, right)]
    places = {value: place for place, value in enumerate(hashes[0].tolist())}
    return next(
        (places[value], place)
        for place, value in enumerate(hashes[1].tolist())
        if value in places and left[places[value]] != right[place]
    )


def colliding_images() -> list[bytes]:
    """Two pictures, each with some bytes after its end."""
    pictures = encoded("navy"), encoded("gold")
    files = [[picture + b"%d" % i for i in range(100_000)] for picture in pictures]
    return [of[place] for of, place in zip(files, colliding(*files), strict=True)]


def colliding_texts() -> list[str]:
    """Two captions of eight words whose ids, spelled out, have one fingerprint."""
    texts = list(itertools.product(range(5), repeat=8))
    spelled = ["2 " + " ".join(str(5 + word) for word in words) + " 3" for words in texts]
    found = colliding(*[[text.encode() for text in spelled]] * 2)
    return [" ".join(WORDS[word] for word in texts[place]) for place in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Eight pairs of six images and six texts, which look like more or fewer."""
    images, texts = colliding_images(), colliding_texts()
    pairs = [
        (encoded("red"), "Red picture"),
        (encoded("green"), "red Picture"),  # differs in case alone
        (encoded("red"), "a green picture"),  # of the same image
        (encoded("blue"), "blue"),
        (encoded("pink"), "blue"),  # the same caption
        (encoded("blue", compress_level=0), "red red"),  # the same pixels in another file
        (images[0], texts[0]),
        (images[1], texts[1]),
    ]
    folder = tmp_path_factory.mktemp("pairs")
    for number, (image, text) in enumerate(pairs):
        (folder / f"{number}.png").write_bytes(image)
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.mark.slow
def test_both_ways_to_evaluate_find_the_same_figures(model, processor, folder):
    options = argparse.Namespace(
        task="retrieval", data=str(folder), image_key=None, caption_key=None
    )
    report = tasks.evaluate(model, processor, options)
    assert (report["images"], report["texts"], report["skipped"]) == (6, 6, {})

    dataset = make_dataset(folder, processor, batch_size=3, length_buckets=(16,))
    ids = np.concatenate([batch["text_ids"] for batch in dataset.as_numpy_iterator()])
    assert ids[6] == ids[7]  # the fingerprints collide
    callback = RetrievalEvaluation(dataset)
    callback.set_model(model)
    assert callback.evaluate() == pytest.approx(report["metrics"])


@pytest.mark.slow
def test_rows_of_one_content_have_one_id(model, processor, folder):
    dataset = make_dataset(folder, processor, batch_size=3, length_buckets=(4, 16))
    embeds = Embedder(model).pairs(dataset)
    assert embeds["image_ids"].tolist() == [0, 1, 0, 2, 3, 2, 4, 5]
    assert embeds["text_ids"].tolist() == [0, 0, 1, 2, 2, 3, 4, 5]
    images = np.concatenate([batch["image_ids"] for batch in dataset.as_numpy_iterator()])
    assert images[6] == images[7]  # of two images
    assert (images < 0).all()


def test_ids_are_given_for_all_rows_or_for_none(model, pairs):
    given = {**pairs, "text_ids": np.arange(4)}
    with pytest.raises(ValueError, match="text_ids: expected ids of 0 or more for all rows"):
        Embedder(model).pairs([given, pairs])


def test_padding_and_missing_masks_do_not_tell_texts_apart(model):
    images = np.zeros((1, 16, 16, 3), "float32")
    ids, mask = np.array([[2, 5, 3]]), np.array([[1, 1, 1]])
    batches = [
        {"pixel_values": images, "input_ids": ids},
        {"pixel_values": images, "input_ids": np.pad(ids, [[0, 0], [0, 2]]),
         "attention_mask": np.pad(mask, [[0, 0], [0, 2]])},
        {"pixel_values": images, "input_ids": np.array([[2, 5, 0]])},  # the last is a token
    ]  # fmt: skip
    assert Embedder(model).pairs(batches)["text_ids"].tolist() == [0, 0, 1]


def test_an_endless_data_set_is_refused(model, pairs):
    endless = tf.data.Dataset.from_tensors(pairs).repeat()
    with pytest.raises(ValueError, match="the data set is endless: expected one that ends"):
        RetrievalEvaluation(endless)
    with pytest.raises(ValueError, match=r"endless.*make_dataset\(\.\.\.\) without training"):
        Embedder(model).pairs(endless)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])  # whose cardinality is a number
    with pytest.raises(ValueError, match="the data set is endless: expected one that ends"):
        RetrievalEvaluation(strategy.experimental_distribute_dataset(endless))


def test_an_iterator_is_refused_where_it_would_be_gone(model, pairs):
    with pytest.raises(ValueError, match="dataset of cycle, gone after one pass"):
        RetrievalEvaluation(itertools.cycle([pairs]))
    assert len(Embedder(model).pairs(iter([pairs, pairs]))["image_ids"]) == 8
