"""The records of a batch of a training by their keys, as `make_dataset` draws them."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from png_reading import ImagesOfPng

from align_tf import AlignProcessor
from align_tf.data import make_dataset
from align_tf.data.dataset import _fingerprint, batch_keys


@pytest.mark.slow
def test_the_keys_of_a_batch_are_those_of_its_pairs(processor, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(10):
        pixels = rng.integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("red")
    processor = AlignProcessor(ImagesOfPng(do_resize=False, crop_size=16), processor.tokenizer)
    options = {"batch_size": 4, "training": True, "seed": 3}
    for step in (0, 1, 5):  # two batches are a pass
        keys = batch_keys(str(tmp_path), 4, 3, step)
        (batch,) = make_dataset(str(tmp_path), processor, start_step=step, **options).take(1)
        paths = [tmp_path / f"{pathlib.Path(key).stem}.png" for key in keys]
        found = _fingerprint(tf.constant([path.read_bytes() for path in paths]))
        np.testing.assert_array_equal(found, batch["image_ids"])
