"""Retrieval recall against ranks counted by hand."""

import numpy as np
import pytest

from align_tf import evaluation
from align_tf.evaluation import retrieval_recall

# Text i against images 0..3: with images as the unit vectors, a text's row is its scores.
IMAGES = np.eye(4, dtype="float32")
TEXTS = np.array(
    [
        [0.9, 0.1, 0.2, 0.3],  # its image ranks 1st
        [0.8, 0.5, 0.1, 0.0],  # 2nd
        [0.7, 0.6, 0.5, 0.1],  # 3rd
        [0.4, 0.3, 0.2, 0.1],  # 4th
    ],
    "float32",
)


def test_recall_both_ways():
    recall = retrieval_recall(IMAGES, TEXTS, ks=(1, 2, 3, 4))
    assert recall["text_to_image"] == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}
    # Image 0 is nearest to text 0; image 1 ranks its text 2nd (0.6 before 0.5), image 2 its
    # text 1st, image 3 its text 3rd (0.3 before it, 0.1 as near as it).
    assert recall["image_to_text"] == {1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0}


def test_default_ks():
    recall = retrieval_recall(np.eye(3), np.eye(3))
    assert recall["image_to_text"] == {1: 1.0, 5: 1.0, 10: 1.0}


def test_one_of_several_captions_is_enough():
    images = np.eye(2)
    texts = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])  # the first caption is misleading
    recall = retrieval_recall(images, texts, image_ids=[7, 9], text_ids=[7, 7, 9], ks=(1, 2))
    assert recall["text_to_image"] == {1: 2 / 3, 2: 1.0}
    assert recall["image_to_text"] == {1: 0.5, 2: 1.0}  # image 9 sees the misleading one first


def test_collapsed_embeddings_find_nothing():
    alike = np.ones((20, 3))
    recall = retrieval_recall(alike, alike)
    assert recall == {way: {1: 0.0, 5: 0.0, 10: 0.0} for way in ("text_to_image", "image_to_text")}


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(37, 8))
    texts = images + rng.normal(size=(37, 8))
    whole = retrieval_recall(images, texts)
    monkeypatch.setattr(evaluation, "BLOCK", 100)
    assert retrieval_recall(images, texts) == whole


@pytest.mark.parametrize(
    ("texts", "ids", "message"),
    [
        (np.ones((4, 3)), {}, r"shapes \(4, 4\) and \(4, 3\)"),
        (np.ones((3, 4)), {}, "id 3: expected both an image and a text"),
        (np.ones((4, 4)), {"text_ids": [0, 1]}, r"text_ids of shape \(2,\): expected \(4,\)"),
    ],
)
def test_errors(texts, ids, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall(IMAGES, texts, **ids)
