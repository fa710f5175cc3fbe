"""Both halves behind one call: what it takes, what it gives, what it refuses."""

import copy
import io
import pickle

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


def test_pictures_of_every_mode_and_layout(processor, array):
    """As Pillow converts them to RGB; transparency is left out."""
    rgb = PIL.Image.fromarray(array)
    expected = {
        mode: processor(images=rgb.convert(mode).convert("RGB")).pixel_values
        for mode in ("RGBA", "P", "L", "LA", "1", "CMYK")
    }
    for mode, pixel_values in expected.items():
        np.testing.assert_array_equal(
            processor(images=rgb.convert(mode)).pixel_values, pixel_values
        )
    rgba = np.dstack([array, np.zeros(array.shape[:2], "uint8")])
    for given in (rgba, rgba[None], (rgba,), [array]):
        found = processor(images=given).pixel_values
        np.testing.assert_array_equal(found, expected["RGBA"])


def test_both_halves_are_called_and_give_mappings_with_attributes(processor, array, tmp_path):
    PIL.Image.fromarray(array).save(tmp_path / "a.png")
    both = processor(images=array, text=["a", "b"], return_tensors="np")
    assert isinstance(both.input_ids, np.ndarray) and both["input_ids"] is both.input_ids
    assert set(both) == {"input_ids", "token_type_ids", "attention_mask", "pixel_values"}
    for given in (np.array(["a", "b"]), ("a", "b"), [np.str_("a"), "b"]):
        np.testing.assert_array_equal(processor.tokenizer(given).input_ids, both.input_ids)
    for given in (array, tmp_path / "a.png", np.str_(tmp_path / "a.png"), (tmp_path / "a.png",)):
        pixel_values = processor.image_processor(given, return_tensors="np").pixel_values
        np.testing.assert_array_equal(pixel_values, both.pixel_values)
    ids = processor.tokenizer.encode("a b")
    assert ids == processor.tokenizer(["a b"], padding="longest").input_ids[0].numpy().tolist()
    with pytest.warns(UserWarning, match=r"inputs\.to\(\.\.\.\) is not needed"):
        assert both.to("cuda") is both
    with pytest.raises(AttributeError, match="no 'labels', but input_ids, token_type_ids"):
        _ = both.labels
    with pytest.raises(
        ValueError, match="'pt': expected one of tf, np; PyTorch's are made of 'np'"
    ):
        processor(text="a", return_tensors="pt")


def test_what_they_are_is_shown(processor):
    shown = repr(processor)
    assert shown.startswith(
        "AlignProcessor(AlignImageProcessor(do_resize=True, size={'height': 12,"
    )
    assert shown.endswith("AlignTokenizer(7 tokens, do_lower_case=True, model_max_length=64))")


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
        (
            {"images": np.zeros((4, 4, 3))},
            r"images\[0\]: an array of float64: expected levels of 0 to 255 as uint8, such as "
            r"\(image \* 255\)\.astype\('uint8'\)",
        ),
        (
            {"images": np.full((4, 4, 3), 9, "float32")},
            r"float32: .* such as image\.astype",
        ),
        ({"images": np.zeros((4, 4, 2), np.uint8)}, r"of shape \(4, 4, 2\): expected \(height"),
        ({"images": np.zeros((3, 9, 9), np.uint8)}, r"\(3, 9, 9\), channels first: expected"),
        *(
            (
                {"images": PIL.Image.new(mode, (3, 3))},
                f"a PIL image of mode {mode}: expected levels of 0 to 255, in 8 bits",
            )
            for mode in ("I", "F", "I;16")
        ),
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


@pytest.mark.parametrize(
    ("image", "way"),
    [
        (np.full((3, 3), 1.0), "(image * 255).astype('uint8')"),
        (np.full((3, 3), True), "(image * 255).astype('uint8')"),
        (np.full((3, 3), 200.0), "image.astype('uint8')"),
        (np.full((3, 3), 200, "int64"), "image.astype('uint8')"),
        (np.full((3, 3), 60000, "uint16"), "(image // 257).astype('uint8')"),
        (np.full((3, 3), -1.0), None),
        (np.array(["a.png", "b.png"]), None),
        (np.array([None]), None),
        (PIL.Image.fromarray(np.full((3, 3), 200, "float32")), "np.asarray(image).astype('uint8')"),
    ],
)
def test_what_makes_8_bits_of_an_image_is_said_where_it_is_right(processor, image, way):
    with pytest.raises(ValueError, match="expected levels of 0 to 255") as error:
        processor(images=[image])
    assert str(error.value).partition(", such as ")[2] == (way or "")
    if way:
        levels = eval(way, {"np": np, "image": image})
        assert levels.max() in (255, 200, 233)


@pytest.mark.parametrize("texts", [None, 5, [5], [["a"]], b"x"])
def test_what_is_no_text_is_told_in_a_line(processor, texts):
    with pytest.raises(ValueError, match=r"^texts?: expected strings"):
        processor.tokenizer.encode(texts)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("x", "whole numbers"),
        ([1.5], "whole numbers"),
        ([[1]], "whole numbers"),
        ([10**6], "1000000"),
    ],
)
def test_what_are_no_ids_is_told_in_a_line(processor, ids, message):
    with pytest.raises(ValueError, match=f"^ids: .*{message}"):
        processor.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def used() -> AlignProcessor:
    """Its graphs are traced where it is first called."""
    images = AlignImageProcessor(size=12, crop_size=9)
    images._extra = {"processor_class": "EfficientNetProcessor"}
    return AlignProcessor(images, AlignTokenizer(VOCAB))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_copies_of_what_has_been_used(copied, array, used):
    """As workers of other processes get them; a graph that was traced can be neither."""
    expected = used(images=array, text="a cat", return_tensors="np")
    for mine in (used, used.tokenizer, used.image_processor):
        other = copied(mine)
        assert repr(other) == repr(mine) and other is not mine
    found = copied(used)(images=array, text="a cat", return_tensors="np")
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    other = copied(used.image_processor)
    other.crop_size = {"height": 4, "width": 5}
    assert other.to_dict()["processor_class"] == "EfficientNetProcessor"
    assert other(array).pixel_values.shape == (1, 4, 5, 3)
    assert used.image_processor(array).pixel_values.shape == (1, 9, 9, 3)


def test_preprocess_and_settings_of_a_call(processor, array):
    images = processor.image_processor
    expected = images(array, return_tensors="np").pixel_values
    found = images.preprocess(PIL.Image.fromarray(array), return_tensors="np").pixel_values
    np.testing.assert_array_equal(found, expected)
    smaller = images.preprocess([array], crop_size={"height": 4, "width": 5}, size=None)
    assert smaller.pixel_values.shape == (1, 4, 5, 3)
    assert images(array, do_center_crop=False).pixel_values.shape == (1, 12, 12, 3)
    for wrong, message in (
        ({"size": "x"}, r"size='x': expected a positive height and width"),
        ({"data_format": 1}, "unknown settings of images: data_format; expected do_resize, size"),
    ):
        with pytest.raises(ValueError, match=message):
            images.preprocess(array, **wrong)


def test_files_in_memory_and_tensors_of_files(processor, array, tmp_path):
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "PNG")
    content = file.getvalue()
    (tmp_path / "a.png").write_bytes(content)
    expected = processor(images=array, return_tensors="np").pixel_values
    with (tmp_path / "a.png").open("rb") as opened:
        for given in (io.BytesIO(content), opened, bytearray(content), tf.constant([content])):
            found = processor(images=given, return_tensors="np").pixel_values
            np.testing.assert_array_equal(found, expected)
    for wrong, kind in ((None, "NoneType"), ({"a": 1}, "dict")):
        with pytest.raises(ValueError, match=rf"^images\[0\]: a {kind}: expected a PIL image"):
            processor(images=[wrong])


def test_texts_in_a_graph_and_pictures_that_are_not_seen_there(processor, array):
    texts = tf.data.Dataset.from_tensors(["a cat", "a"])
    for function in (lambda text: processor(text=text), processor.tokenizer):
        [found] = texts.map(function)
        assert found["input_ids"][:, :4].numpy().tolist() == [[2, 5, 6, 3], [2, 5, 3, 0]]
    assert processor(text=tf.constant("a cat")).input_ids.shape == (1, 64)
    with pytest.raises(ValueError, match="found a tensor of int32 and shape"):
        processor(text=tf.constant([1]))
    with pytest.raises(ValueError, match="within a graph there are no arrays"):
        texts.map(lambda text: processor(text=text, return_tensors="np"))
    with pytest.raises(ValueError, match="preprocess_pixels the uint8 pixels"):
        tf.data.Dataset.from_tensors(array).map(lambda image: processor(images=image))


def test_tokens_and_ids_one_by_one(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.tokenize("A cat dog") == ["a", "cat", "[UNK]"]
    assert tokenizer.convert_tokens_to_ids("cat") == 6 == tokenizer.get_vocab()["cat"]
    assert tokenizer.convert_tokens_to_ids("dog") == 1
    assert tokenizer.convert_ids_to_tokens(6) == "cat"
    for truncation, length in (("longest_first", 3), ("do_not_truncate", 5)):
        cut = tokenizer("a cat a", padding=True, truncation=truncation, max_length=3)
        assert cut.input_ids.shape == (1, length)
    with pytest.raises(ValueError, match=r"truncation=\['x'\]: expected True or False"):
        tokenizer("a", truncation=["x"])
