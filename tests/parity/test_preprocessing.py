"""Pixels equal to those of transformers' image processor, over image sizes and settings."""

import io

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import image_files  # noqa: E402
import tensorflow as tf  # noqa: E402

from align_tf import AlignImageProcessor  # noqa: E402

ALIGN_BASE = {
    "do_resize": True,
    "size": {"height": 346, "width": 346},
    "resample": 2,
    "do_center_crop": True,
    "crop_size": {"height": 289, "width": 289},
    "do_rescale": True,
    "rescale_factor": 1 / 127.5,
    "rescale_offset": True,
    "do_normalize": False,
    "include_top": False,
}


def pixels_of_both(array: np.ndarray, settings: dict) -> tuple[np.ndarray, np.ndarray]:
    module = transformers.models.efficientnet.image_processing_pil_efficientnet
    reference = module.EfficientNetImageProcessorPil(**settings)
    expected = reference(PIL.Image.fromarray(array), return_tensors="np")["pixel_values"][0]
    ours = AlignImageProcessor.from_dict(settings).preprocess_array(array)
    return ours.numpy(), expected.transpose(1, 2, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample": 0},
        {"resample": 3, "include_top": True},
        {"size": {"height": 50, "width": 70}, "crop_size": {"height": 61, "width": 31}},
        {"do_normalize": True, "rescale_offset": False, "rescale_factor": 1 / 255},
        {"do_rescale": False, "do_normalize": True, "do_center_crop": False},
        {"do_resize": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(480, 640), (7, 900), (1, 1), (346, 346), (1500, 1100)])
def test_pixels(settings, size):
    array = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours, expected = pixels_of_both(array, {**ALIGN_BASE, **settings})
    assert ours.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("size", [(4000, 6000), (6000, 4000), (1, 60_000), (60_000, 1), (9000, 2)])
def test_pixels_of_extreme_sizes(size):
    array = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours, expected = pixels_of_both(array, ALIGN_BASE)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    "settings", [{}, {"resample": 3, "do_normalize": True, "rescale_factor": 1 / 255}], ids=str
)
def test_pixels_of_files(settings):
    module = transformers.models.efficientnet.image_processing_pil_efficientnet
    reference = module.EfficientNetImageProcessorPil(**{**ALIGN_BASE, **settings})
    processor = AlignImageProcessor.from_dict({**ALIGN_BASE, **settings})
    files = image_files.all_files(image_files.walk())
    ours, problems, _ = processor.try_pixel_values_of([*files.values()])
    assert not problems.numpy().any()
    for (name, file), pixels in zip(files.items(), ours.numpy(), strict=True):
        image = PIL.Image.open(io.BytesIO(file))
        expected = reference(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(pixels, expected.transpose(1, 2, 0), name)


def test_transformers_reads_our_image_settings(tmp_path):
    AlignImageProcessor().save_pretrained(tmp_path)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert theirs.crop_size["height"] == 289 and theirs.rescale_offset is True
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AlignImageProcessor.from_pretrained(tmp_path / "theirs")
    assert {k: ours.to_dict()[k] for k in ALIGN_BASE} == ALIGN_BASE


def test_original_mode_is_tf_image_resize():
    array = np.random.default_rng(4).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    ours = AlignImageProcessor(mode="original").preprocess_array(array)
    expected = tf.image.resize(array, [346, 346])[28:317, 28:317] * (1 / 127.5) - 1.0
    np.testing.assert_array_equal(ours, expected)
