"""Both halves behind one call: what it takes, what it gives, what it refuses."""

import io

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from align_tf import AlignImageProcessor, AlignProcessor, AlignTokenizer

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]


@pytest.fixture(scope="module")
def processor() -> AlignProcessor:
    return AlignProcessor(AlignImageProcessor(size=12, crop_size=9), AlignTokenizer(VOCAB))


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (14, 17, 3), dtype=np.uint8)


def test_every_kind_of_image(processor, array, tmp_path):
    image = PIL.Image.fromarray(array)
    image.save(tmp_path / "a.png")
    images = [
        image,
        array,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
    ]
    pixels = processor(images=images)["pixel_values"]
    assert pixels.shape == (5, 9, 9, 3) and pixels.dtype == tf.float32
    np.testing.assert_array_equal(pixels, np.repeat(pixels[:1], 5, axis=0))
    assert processor(images=image)["pixel_values"].shape == (1, 9, 9, 3)
    assert processor(images=np.stack([array, array]))["pixel_values"].shape == (2, 9, 9, 3)
    gray = processor(images=[array[..., 0], array[..., :1], PIL.Image.fromarray(array[..., 0])])
    np.testing.assert_array_equal(gray["pixel_values"][0], gray["pixel_values"][1])
    np.testing.assert_array_equal(gray["pixel_values"][0], gray["pixel_values"][2])


def test_both(processor, array):
    output = processor(images=[array], text=["a cat", "a"])
    assert list(output) == processor.model_input_names
    assert output["input_ids"].shape == (2, 64)
    assert output["input_ids"][0, :4].numpy().tolist() == [2, 5, 6, 3]


def test_keyword_groups(processor, array):
    output = processor(
        images=array,
        text="a cat",
        images_kwargs={"crop_size": {"height": 4, "width": 5}, "rescale_offset": False},
        text_kwargs={"padding": "longest", "max_length": 3},
        common_kwargs={"return_tensors": "np"},
    )
    assert isinstance(output["pixel_values"], np.ndarray)
    assert output["pixel_values"].shape == (1, 4, 5, 3) and output["pixel_values"].min() >= 0
    assert output["input_ids"].tolist() == [[2, 5, 3]]
    assert processor(text="a", padding=True)["input_ids"].shape == (1, 3)


def broken_png() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (40, 40)).save(file, "PNG")
    return file.getvalue()[:-30]


def test_broken_files(processor, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(broken_png())
    expected = r"broken\.png: not a decodable image \(JPEG, PNG, GIF, WebP, or BMP without"
    with pytest.raises(ValueError, match=expected):
        processor(images=path)
    with pytest.raises(ValueError, match=expected):
        processor(images=PIL.Image.open(path))
    with pytest.raises(ValueError, match=r"images\[1\]: not a decodable image"):
        processor(images=[PIL.Image.new("RGB", (3, 3)), b"x"])
    whole = {"do_resize": False, "do_center_crop": False}
    with pytest.raises(ValueError, match=expected):
        processor(images=path, images_kwargs=whole)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg: no such image file"):
        processor(images=tmp_path / "none.jpg")


def test_too_many_pixels(processor, tmp_path):
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "large.gif")
    with pytest.raises(
        ValueError, match=r"large\.gif: the image declares 40 x 30 pixels, expected 9"
    ):
        processor(images=tmp_path / "large.gif", images_kwargs={"max_image_pixels": 999})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected images, text or both, found neither"),
        ({"images": []}, "expected one or more, found an empty list"),
        ({"images": np.zeros((4, 4, 3))}, r"expected uint8 of shape \(h, w, 3\), found float64"),
        ({"images": np.zeros((4, 4, 2), np.uint8)}, r"found uint8 \(4, 4, 2\)"),
        ({"text": "a", "text_kwargs": {"pad": 1}}, "text_kwargs: unknown pad; expected padding"),
        ({"text": "a", "common_kwargs": {"return_tensors": "pt"}}, "return_tensors='pt': expected"),
        ({"text": 3}, "text"),
    ],
)
def test_errors(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_files(processor, array, tmp_path):
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    loaded = AlignProcessor.from_pretrained(tmp_path)
    for name, value in loaded(images=array, text="a cat").items():
        np.testing.assert_array_equal(value, processor(images=array, text="a cat")[name])


def test_decode(processor):
    assert processor.decode([2, 5, 6, 3], skip_special_tokens=True) == "a cat"
    assert processor.batch_decode([[5], [6]]) == ["a", "cat"]
