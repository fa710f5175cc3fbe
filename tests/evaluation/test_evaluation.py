"""Evaluation against figures worked out by hand."""

import subprocess
import sys

import numpy as np
import pytest

from align_tf.evaluation import (
    arrays,
    class_embeddings,
    distinct_pairs,
    holdout,
    knn_metrics,
    linear_probe,
    linear_probe_metrics,
    retrieval_metrics,
    zero_shot,
    zero_shot_metrics,
)
from align_tf.evaluation.nearest_neighbors import knn_with_predictions

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


# --- retrieval -----------------------------------------------------------------------------


def test_retrieval_both_ways():
    # Image 0 is nearest to text 0; image 1 ranks its text 2nd (0.6 before 0.5), image 2 its
    # text 1st, image 3 its text 3rd (0.3 before it, 0.1 as near as it).
    assert retrieval_metrics(IMAGES, TEXTS, ks=(1, 2, 3, 4)) == {
        "r1_i2t": 0.5,
        "r2_i2t": 0.75,
        "r3_i2t": 1.0,
        "r4_i2t": 1.0,
        "median_rank_i2t": 1.5,  # of 1, 1, 2, 3
        "mean_rank_i2t": 1.75,
        "r1_t2i": 0.25,
        "r2_t2i": 0.5,
        "r3_t2i": 0.75,
        "r4_t2i": 1.0,
        "median_rank_t2i": 2.5,  # of 1, 2, 3, 4
        "mean_rank_t2i": 2.5,
    }


def test_default_ks():
    metrics = retrieval_metrics(np.eye(3), np.eye(3))
    assert [metrics[f"r{k}_i2t"] for k in (1, 5, 10)] == [1.0, 1.0, 1.0]


def test_several_captions_an_image():
    images = np.eye(2)
    texts = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])  # the first caption is misleading
    metrics = retrieval_metrics(images, texts, [[0, 0], [0, 1], [1, 2]], ks=(1, 2))
    # Image 0's best is caption 1 (0.8), before the wrong 0.3. Image 1 has caption 2 (0.7), but
    # the misleading one is nearer (0.9). Captions 1 and 2 find their images at once.
    assert (metrics["r1_i2t"], metrics["r2_i2t"], metrics["mean_rank_i2t"]) == (0.5, 1.0, 1.5)
    assert (metrics["r1_t2i"], metrics["r2_t2i"], metrics["median_rank_t2i"]) == (2 / 3, 1.0, 1.0)


def test_another_right_answer_is_not_a_wrong_one():
    # Image 0 scores 0.6 with its text 0 and 0.9 with its text 1; from the side of text 0, image 1
    # (0.8) is nearer, but right too.
    images = np.array([[0.6, 0.9], [0.8, 0.1]])
    metrics = retrieval_metrics(images, np.eye(2), [[0, 0], [0, 1], [1, 0]], ks=(1,))
    assert metrics == {
        "r1_i2t": 1.0,
        "median_rank_i2t": 1.0,
        "mean_rank_i2t": 1.0,
        "r1_t2i": 1.0,
        "median_rank_t2i": 1.0,
        "mean_rank_t2i": 1.0,
    }


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rows", [1, 20])
def test_collapsed_embeddings_find_nothing(rows, seed):
    # Rounding must not tell equal vectors apart: products of one row and of several differ.
    vector = np.random.default_rng(seed).normal(size=(1, 193)).astype("float32")
    texts = np.repeat(vector, 1003, axis=0)
    images = texts[:rows]
    pairs = np.stack([np.arange(1003) % rows, np.arange(1003)], axis=1)
    metrics = retrieval_metrics(images, texts, pairs)
    wrong = 1003 - np.bincount(pairs[:, 0])
    assert metrics["mean_rank_i2t"] == 1 + wrong.mean()
    assert metrics["mean_rank_t2i"] == rows
    assert metrics["r1_t2i"] == (1.0 if rows == 1 else 0.0)


def test_vectors_of_zero_are_all_tied():
    metrics = retrieval_metrics(np.zeros((3, 2)), np.zeros((3, 2)))
    assert (metrics["r1_i2t"], metrics["mean_rank_t2i"]) == (0.0, 3.0)


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(37, 8)), rng.normal(size=(90, 8))
    pairs = np.stack([np.arange(90) % 37, np.arange(90)], axis=1)[rng.permutation(90)]
    texts += 2 * images[np.arange(90) % 37]
    whole = retrieval_metrics(images, texts, pairs)
    assert 0.2 < whole["r1_i2t"] < 1
    monkeypatch.setattr(arrays, "BLOCK", 7)
    assert retrieval_metrics(images, texts, pairs, progress=True) == whole


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_other_dtypes(dtype):
    metrics = retrieval_metrics(np.eye(3).astype(dtype), np.eye(3).astype(dtype)[::-1])
    assert metrics["mean_rank_i2t"] == pytest.approx((3 + 1 + 3) / 3)


def _with(value: float) -> np.ndarray:
    embeds = np.ones((4, 4), "float32")
    embeds[2, 1] = value
    return embeds


@pytest.mark.parametrize(
    ("images", "texts", "pairs", "message"),
    [
        (IMAGES, np.ones((4, 3)), None, r"text_embeds of shape \(4, 3\): expected \(rows, 4\)"),
        (IMAGES, np.ones((3, 4)), None, "4 image_embeds and 3 text_embeds"),
        (IMAGES, np.ones(4), None, r"text_embeds of shape \(4,\)"),
        (np.ones((0, 4)), TEXTS, None, r"image_embeds of shape \(0, 4\).*one row or more"),
        (_with(np.nan), TEXTS, None, "image_embeds: row 2 holds a NaN or an infinity"),
        (IMAGES, _with(-np.inf), None, "text_embeds: row 2 holds a NaN or an infinity"),
        (IMAGES, TEXTS, [[0, 0], [1, 1], [2, 2], [2, 3]], "image 3 is in no pair"),
        (IMAGES, TEXTS, [[0, 0], [1, 0], [2, 2], [3, 3]], "text 1 is in no pair"),
        (IMAGES, TEXTS, [[0, 0], [4, 1]], "pairs name image 4: expected rows 0 to 3"),
        (IMAGES, TEXTS, [[0, 0], [1, 1], [2, 2], [3, -1]], "pairs name text -1"),
        (IMAGES, TEXTS, [0, 1, 2, 3], r"pairs of int64 \(4,\)"),
        (IMAGES, TEXTS, [[0.0, 1.0]], r"pairs of float64 \(1, 2\)"),
    ],
)
def test_retrieval_errors(images, texts, pairs, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(images, texts, pairs)


def test_distinct_pairs():
    images, texts, pairs = distinct_pairs([7, 7, 3, 7], [50, 40, 50, 50])
    assert images.tolist() == [2, 0]  # of id 3, of id 7
    assert texts.tolist() == [1, 0]  # of id 40, of id 50
    assert pairs.tolist() == [[0, 1], [1, 0], [1, 1]]  # the last row repeats the first
    with pytest.raises(ValueError, match=r"text_ids of shape \(3,\)"):
        distinct_pairs([1, 2], [1, 2, 3])


def test_memory_stays_within_blocks():
    """10,000 x 20,000 similarities are 800 MB in float32; the blocks take a fourth of it."""
    script = (
        "import resource, numpy as np\n"
        "from align_tf.evaluation import retrieval_metrics\n"
        "rng = np.random.default_rng(0)\n"
        "images, texts = (rng.normal(size=(n, 8)).astype('float32') for n in (10000, 20000))\n"
        "rows = np.arange(20000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "retrieval_metrics(images, texts, np.stack([rows % 10000, rows], axis=1))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 200 * 1024  # KiB


# --- zero-shot classification --------------------------------------------------------------

WORDS = {"a cat.": [3.0, 0.0], "the cat.": [0.0, 5.0], "a dog.": [0.0, -1.0], "the dog.": [0, -2]}


def test_class_embeddings_average_directions_not_lengths():
    asked = []

    def embed_text(texts):
        asked.append(texts)
        return np.array([WORDS[text] for text in texts])

    classes = class_embeddings(["cat", "dog"], ["a {}.", "the {}."], embed_text)
    assert asked == [["a cat.", "the cat.", "a dog.", "the dog."]]
    # (1, 0) and (0, 1) average to (0.5, 0.5), of unit length 1 / sqrt(2) each.
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5], [0.0, -1.0]], rtol=1e-6)


def test_class_embeddings_in_parts(monkeypatch):
    monkeypatch.setattr(zero_shot, "PROMPTS", 3)  # one class of two templates at a time
    classes = class_embeddings(
        ["cat", "dog"], ["a {}.", "the {}."], lambda texts: [WORDS[text] for text in texts]
    )
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5], [0.0, -1.0]], rtol=1e-6)


def test_labels_with_braces_are_taken_as_they_are():
    asked = []
    class_embeddings(["{x}"], ["{y} {}"], lambda texts: asked.extend(texts) or np.ones((1, 2)))
    assert asked == ["{y} {x}"]


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], ["{}"], "0 labels, 1 templates"),
        (["cat"], [], "1 labels, 0 templates"),
        (["cat"], ["a photo"], "template 'a photo': expected a {}"),
        (["cat"], ["{}"], "row 0 holds a NaN"),
    ],
)
def test_class_embedding_errors(labels, templates, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(labels, templates, lambda texts: np.full((len(texts), 2), np.nan))


def test_zero_shot():
    classes = np.eye(3)
    images = np.array(
        [
            [0.9, 0.1, 0.0],  # class 0, 1st
            [0.5, 0.4, 0.6],  # class 0, 2nd
            [0.2, 0.2, 0.1],  # class 1, tied with class 0, so 2nd
            [0.3, 0.2, 0.1],  # class 2, 3rd
        ]
    )
    metrics = zero_shot_metrics(images, classes, [0, 0, 1, 2], ks=(1, 2, 5))
    # Class 0 is right in one of two, the others never: (1/2 + 0 + 0) / 3.
    assert metrics == {"top1": 0.25, "top2": 0.75, "top5": 1.0, "mean_per_class": 1 / 6}


def test_zero_shot_of_one_class():
    metrics = zero_shot_metrics(-np.ones((2, 3)), np.ones((1, 3)), [0, 0])
    assert metrics == {"top1": 1.0, "top5": 1.0, "mean_per_class": 1.0}


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (np.eye(4), [0, 1, 2, 4], "label 4: expected rows 0 to 3"),
        (np.eye(4), [0, 1, 2], r"labels of shape \(3,\): expected \(4,\)"),
        (np.eye(4), ["a", "b", "c", "d"], "labels of <U1: expected rows of class_embeds"),
        (np.eye(3), [0, 1, 2, 2], r"class_embeds of shape \(3, 3\)"),
    ],
)
def test_zero_shot_errors(classes, labels, message):
    with pytest.raises(ValueError, match=message):
        zero_shot_metrics(IMAGES, classes, labels)


# --- nearest neighbors and the linear probe -------------------------------------------------


def test_knn_weighs_votes_by_similarity():
    train = [[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [-1.0, 0.0]]
    labels = ["near", "far", "far", "other"]
    test = [[2.0, 0.0]]  # cosines 1, 0.6, 0.6, -1
    # Votes at temperature 1: near e, far 2 e^0.6 = 3.64 > e = 2.72; at 0.1: e^10 > 2 e^6.
    warm = knn_metrics(train, labels, test, ["near"], k=3, temperature=1.0, ks=(1, 2))
    assert warm == {"top1": 0.0, "top2": 1.0, "mean_per_class": 0.0}
    cold = knn_metrics(train, labels, test, ["near"], k=3, temperature=0.1, ks=(1, 2))
    assert cold == {"top1": 1.0, "top2": 1.0, "mean_per_class": 1.0}


def test_knn_majority_and_its_ties():
    train = [[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [-1.0, 0.0]]
    labels = [5, 7, 7, 9]
    test = [[1.0, 0.0]] * 2

    def majority(k):
        return knn_metrics(train, labels, test, [5, 7], k=k, temperature=None, ks=(1, 2))

    assert majority(1) == {"top1": 0.5, "top2": 0.5, "mean_per_class": 0.5}
    # With k = 3, 7 has two votes and 5 one. A class without votes ties with all such classes.
    assert majority(3) == {"top1": 0.5, "top2": 1.0, "mean_per_class": 0.5}
    tied = knn_metrics(train[::3], [5, 9], test, [5, 9], k=2, temperature=None, ks=(1, 2))
    assert tied == {"top1": 0.0, "top2": 1.0, "mean_per_class": 0.0}


def test_what_is_taken_for_the_right_class_among_equals_is_another():
    train = [[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]
    labels = ["b", "a", "c"]
    _, predicted = knn_with_predictions(train, labels, train, ["b", "a", "a"], k=1)
    assert predicted.tolist() == ["b", "a", "c"]
    _, predicted = knn_with_predictions(train, labels, train[:1], ["b"], k=2, temperature=None)
    assert predicted.tolist() == ["a"]


def test_knn_of_tiny_temperature_does_not_underflow():
    metrics = knn_metrics(np.eye(2), [0, 1], [[-1.0, -0.9]], [1], k=2, temperature=1e-4)
    assert metrics["top1"] == 1.0


@pytest.mark.parametrize("function", [knn_metrics, linear_probe_metrics])
def test_separable_classes_are_all_right(function):
    rng = np.random.default_rng(0)
    centers = np.repeat(np.eye(6, dtype="float32"), 10, axis=0)
    labels = np.repeat(["a", "b", "c", "d", "e", "f"], 10)

    def embeds():
        return centers + 0.1 * rng.normal(size=centers.shape)

    metrics = function(embeds(), labels, embeds(), labels)
    assert (metrics["top1"], metrics["top5"], metrics["mean_per_class"]) == (1.0, 1.0, 1.0)
    # Labels that have nothing to do with the embeddings are not learned.
    metrics = function(embeds(), rng.permutation(labels), embeds(), labels)
    assert metrics["top1"] < 0.5


def test_linear_probe_draws_a_line_that_neighbors_do_not_see():
    """Two classes apart in the first number, drowned in the others; the test set is by hand."""
    rng = np.random.default_rng(0)
    sign = np.repeat([-1.0, 1.0], 50)
    train = np.stack([sign, *(20 * rng.normal(size=(4, 100)))], axis=1)
    test = [[-1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0]]
    metrics = linear_probe_metrics(train, sign > 0, test, [False, True, False])
    assert metrics["top1"] == 2 / 3
    assert metrics["mean_per_class"] == 0.75  # half of False, all of True
    assert 1e-6 <= metrics["C"] <= 1e6


def test_c_is_searched_down_to_an_eighth_of_a_decade():
    tried = []

    def score(c):
        tried.append(np.log10(c))
        return -abs(np.log10(c) - 1.3)

    assert np.log10(linear_probe._search(score, progress=False)) == pytest.approx(1.25)
    assert len(tried) == 7 + 4 * 2
    assert np.log10(linear_probe._search(lambda c: c, progress=False)) == pytest.approx(6)
    assert np.log10(linear_probe._search(lambda c: 0, progress=False)) == pytest.approx(0, abs=1)


def test_holdout_takes_a_share_of_each_class():
    labels = np.array(["a"] * 10 + ["b"] * 2 + ["c"] * 5)
    drawn = holdout(labels, 0.2)
    assert [int(drawn[labels == name].sum()) for name in "abc"] == [2, 1, 1]
    np.testing.assert_array_equal(holdout(labels, 0.2), drawn)
    assert (holdout(labels, 0.2, seed=1) != drawn).any()
    with pytest.raises(ValueError, match="class b has one example"):
        holdout(["a", "a", "b"], 0.2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_labels": [0, 0, 0, 0]}, "train_labels hold one class alone"),
        ({"train_labels": [0, 0, 0, 1]}, "class 1 has one example"),
        ({"test_labels": [0, 0, 1, 5]}, "test label 5: expected one of the training labels"),
        ({"test_labels": [0]}, r"test_labels of shape \(1,\): expected \(4,\)"),
        ({"test_embeds": np.ones((4, 3))}, r"test_embeds of shape \(4, 3\)"),
        ({"train_embeds": _with(np.nan)}, "train_embeds: row 2 holds a NaN"),
    ],
)
def test_linear_probe_errors(changed, message):
    data = {
        "train_embeds": IMAGES,
        "train_labels": [0, 0, 1, 1],
        "test_embeds": IMAGES,
        "test_labels": [0, 0, 1, 1],
    }
    if "train_labels" in changed:
        data["test_labels"] = [0, 0, 0, 0]
    with pytest.raises(ValueError, match=message):
        linear_probe_metrics(**{**data, **changed})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, "k=5: expected 1 to the 4 training embeddings"),
        ({"k": 0}, "k=0"),
        ({"k": 1, "temperature": 0.0}, "temperature=0.0: expected more than 0, or None"),
    ],
)
def test_knn_errors(options, message):
    with pytest.raises(ValueError, match=message):
        knn_metrics(IMAGES, [0, 0, 1, 1], IMAGES, [0, 0, 1, 1], **options)
