"""Embedding of batches: the model's own embeddings, rows left out, ids."""

import keras
import numpy as np
import pytest

from align_tf import AlignModel
from align_tf.evaluation import Embedder


@pytest.fixture(scope="module")
def model(tiny_config):
    keras.utils.set_random_seed(0)
    return AlignModel(tiny_config)


@pytest.fixture(scope="module")
def embedder(model):
    """Traced once."""
    return Embedder(model)


def test_pairs_are_what_the_model_gives(model, embedder, pairs):
    output = model(pairs)
    embeds = embedder.pairs(pairs)
    for name in ("image_embeds", "text_embeds"):
        np.testing.assert_allclose(embeds[name], np.asarray(output[name]), atol=1e-5)
        assert embeds[name].dtype == np.float32
    assert embeds["image_ids"].tolist() == embeds["text_ids"].tolist() == [0, 1, 2, 3]


def test_rows_of_weight_0_are_left_out_and_ids_kept(embedder, pairs):
    batch = {**pairs, "image_ids": np.array([5, 5, 6, 0]), "text_ids": np.array([1, 2, 3, 0])}
    batches = [
        {**batch, "sample_weight": np.array([1.0, 0.0, 0.5, 1.0])},
        {**batch, "sample_weight": np.zeros(4)},
        batch,
    ]
    embeds, whole = embedder.pairs(batches), embedder.pairs(pairs)
    assert embeds["image_ids"].tolist() == [5, 6, 0, 5, 5, 6, 0]
    assert embeds["text_ids"].tolist() == [1, 3, 0, 1, 2, 3, 0]
    rows = [0, 2, 3, 0, 1, 2, 3]
    np.testing.assert_allclose(embeds["image_embeds"], whole["image_embeds"][rows], atol=1e-5)
    np.testing.assert_allclose(embeds["text_embeds"], whole["text_embeds"][rows], atol=1e-5)


def test_rows_without_ids_are_numbered_by_content_across_batches(embedder, pairs):
    weighted = {**pairs, "sample_weight": np.array([1.0, 0.0, 1.0, 1.0])}
    embeds = embedder.pairs([weighted, pairs])
    assert embeds["image_ids"].tolist() == [0, 1, 2, 0, 3, 1, 2]
    assert embeds["text_ids"].tolist() == [0, 1, 2, 0, 3, 1, 2]


def test_a_tf_data_set_and_arrays_longer_than_a_batch(embedder, pairs):
    import tensorflow as tf

    many = {name: np.concatenate([values] * 20) for name, values in pairs.items()}  # 80 rows
    from_arrays = embedder.pairs(many)
    from_dataset = embedder.pairs(tf.data.Dataset.from_tensor_slices(many).batch(32))
    assert from_arrays["text_embeds"].shape == (80, 8)
    for name, values in from_arrays.items():
        np.testing.assert_allclose(values, from_dataset[name], atol=1e-5)


def test_it_follows_the_weights(model, embedder, pairs):
    before = embedder.pairs(pairs)["text_embeds"]
    kernel = model.text_projection.kernel
    kernel.assign(np.random.default_rng(1).normal(size=kernel.shape))
    after = embedder.pairs(pairs)["text_embeds"]
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after, np.asarray(model(pairs).text_embeds), atol=1e-5)


def test_no_pair_is_an_error(embedder, pairs):
    with pytest.raises(ValueError, match="holds no pair"):
        embedder.pairs([{**pairs, "sample_weight": np.zeros(4)}])
    with pytest.raises(ValueError, match="holds no pair"):
        embedder.pairs([])
