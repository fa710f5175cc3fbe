"""Images to pixels: decoding and resizing against Pillow, refusals, files."""

import io
import struct
from collections.abc import Callable

import image_files
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from image_files import HEIGHT, WIDTH, declare, encode

from align_tf import AlignImageProcessor, AlignProcessor
from align_tf.preprocessing import image_processing
from align_tf.preprocessing.decoding import reading

FILES = image_files.all_files(image_files.walk())
# Pillow 13 resamples the columns of tall images first, earlier ones the rows of any.
PILLOW_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="the pixels of Pillow 13"
)


@pytest.fixture(scope="module")
def picture() -> PIL.Image.Image:
    return image_files.walk()


@pytest.fixture(scope="module")
def small() -> AlignImageProcessor:
    """A processor whose graph is built once."""
    processor = AlignImageProcessor(size=8, crop_size=8)
    processor.pixel_values = tf.function(
        processor.pixel_values, input_signature=[tf.TensorSpec([None], tf.string)]
    )
    return processor


def graph_of(processor: AlignImageProcessor) -> Callable:
    return tf.function(processor.decode, input_signature=[tf.TensorSpec([], tf.string)])


@pytest.fixture(scope="module")
def decode() -> Callable:
    return graph_of(AlignImageProcessor())


@pytest.fixture(scope="module")
def decode_upright() -> Callable:
    return graph_of(AlignImageProcessor(apply_exif_orientation=True))


@pytest.fixture(scope="module")
def resizers() -> dict[int, AlignImageProcessor]:
    """By `resample`; the graph of each is built once."""
    return {
        resample: AlignImageProcessor(
            size={"height": 46, "width": 53},
            resample=resample,
            do_center_crop=False,
            do_rescale=False,
        )
        for resample in (0, 2, 3)
    }


@pytest.mark.parametrize("name", FILES)
def test_decode_equals_pillow(decode, name):
    expected = image_files.pillow_pixels(FILES[name])
    np.testing.assert_array_equal(decode(FILES[name]), expected)
    _, size = reading.read(tf.constant(FILES[name]), max_pixels=0)  # decodes nothing
    assert size.numpy().tolist() == [*expected.shape[:2]]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (17, 16), (65, 130)])
def test_decode_of_other_sizes(decode, size):
    image = image_files.noise(*size)
    kinds = (image_files.jpeg_files, image_files.png_files, image_files.bmp_files)
    for name, file in ((n, f) for kind in kinds for n, f in kind(image).items()):
        expected = image_files.pillow_pixels(file)
        np.testing.assert_array_equal(decode(file), expected, f"{name} {size}")


def test_pixels_of_bytes_and_of_a_pillow_image_are_equal(small):
    files = [FILES[name] for name in ("jpeg ycck", "png 3 4 tRNS", "gif transparent", "bmp 565")]
    processor = AlignProcessor(small, None)
    images = [PIL.Image.open(io.BytesIO(file)) for file in files]
    opened = processor(images=images)["pixel_values"]
    np.testing.assert_array_equal(processor(images=files)["pixel_values"], opened)


@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize(
    "size",
    [
        *((1, 1), (1, 400), (300, 1), (46, 46), (289, 289), (30, 1300), (900, 700), (1100, 1300)),
        (652, 656),  # a rounded reciprocal of 46 or 53 for the step takes another neighbor
        *(pytest.param(size, marks=PILLOW_13) for size in ((900, 300), (60, 47), (300, 80))),
    ],
)
def test_resize_equals_pillow(resizers, size, resample):
    array = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    array[:, size[1] // 2 :] //= 255  # edges, where bicubic leaves 0..255
    array[:, size[1] // 2 :] *= 255
    expected = PIL.Image.fromarray(array).resize((53, 46), resample)
    resized = resizers[resample].preprocess_array(array)
    np.testing.assert_array_equal(resized, np.asarray(expected))


@pytest.mark.parametrize(
    ("crop", "rows", "columns"),
    [
        ((2, 3), slice(1, 3), slice(1, 4)),  # of 5 x 6: offsets are rounded down
        ((5, 6), slice(0, 5), slice(0, 6)),
    ],
)
def test_center_crop(crop, rows, columns):
    array = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
    processor = AlignImageProcessor(
        do_resize=False,
        do_rescale=False,
        crop_size=dict(zip(("height", "width"), crop, strict=True)),
    )
    np.testing.assert_array_equal(processor.preprocess_array(array), array[rows, columns])


def test_center_crop_pads_what_is_too_small():
    array = np.full((2, 5, 3), 7, np.uint8)
    processor = AlignImageProcessor(
        do_resize=False, do_rescale=False, crop_size={"height": 5, "width": 2}
    )
    expected = np.zeros((5, 2, 3))
    expected[2:4] = 7  # one more above than below
    np.testing.assert_array_equal(processor.preprocess_array(array), expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-1.0, 0.003921628, 1.0]),  # align-base
        ({"do_rescale": False}, [0.0, 128.0, 255.0]),
        ({"rescale_factor": 1 / 255, "rescale_offset": False}, [0.0, 0.5019608, 1.0]),
        (
            {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
            [-6.0, -1.9843135, 2.0],
        ),
        ({"include_top": True, "image_std": [0.5] * 3}, [-2.0, 0.007843256, 2.0]),
    ],
)
def test_levels(settings, expected):
    processor = AlignImageProcessor(do_resize=False, do_center_crop=False, **settings)
    array = np.array([0, 128, 255], np.uint8)[:, None, None].repeat(3, -1)
    output = processor.preprocess_array(array).numpy()
    np.testing.assert_array_equal(output[:, 0, 1], np.array(expected, np.float32))


def test_channels_of_their_own():
    processor = AlignImageProcessor(
        do_resize=False,
        do_center_crop=False,
        do_normalize=True,
        image_mean=[0.0, 0.5, 1.0],
        image_std=[1.0, 0.5, 2.0],
    )
    output = processor.preprocess_array(np.full((1, 1, 3), 255, np.uint8)).numpy()
    assert output.tolist() == [[[1.0, 1.0, 0.0]]]


def test_original_mode(picture):
    encoded = encode(picture, "JPEG")
    processor = AlignImageProcessor(mode="original", size=12, crop_size=7)
    image = tf.image.resize(tf.io.decode_image(encoded, expand_animations=False), [12, 12])
    expected = image[2:9, 2:9] * (1 / 127.5) - 1.0
    np.testing.assert_array_equal(processor.decode_and_preprocess(tf.constant(encoded)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation(picture, decode, decode_upright, orientation, order):
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1) + entry
    encoded = encode(picture, "JPEG", exif=b"Exif\0\0" + tiff + bytes(4))
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(PIL.ImageOps.exif_transpose(image))
        unturned = np.asarray(image)
    np.testing.assert_array_equal(decode_upright(encoded), expected)
    np.testing.assert_array_equal(decode(encoded), unturned)


@pytest.mark.parametrize("name", image_files.jpeg_files(image_files.walk()))
def test_what_lies_behind_a_jpeg_is_no_part_of_it(decode, name):
    film = np.random.default_rng(0).bytes(1 << 18) + b"\xff\xda" * 300
    expected = image_files.pillow_pixels(FILES[name])
    np.testing.assert_array_equal(decode(FILES[name] + film), expected)


def test_only_the_scans_of_the_image_count(picture, decode):
    thumbnail = encode(picture, "JPEG", progressive=True)
    exif = b"Exif\0\0" + thumbnail * 20  # more than a hundred scans
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    file = encode(picture, "JPEG")
    file = file[:2] + segment + file[2:]
    assert file.count(b"\xff\xda") > 100
    np.testing.assert_array_equal(decode(file), image_files.pillow_pixels(file))
    pages = [picture.rotate(90 * i) for i in range(120)]
    file = encode(picture, "MPO", save_all=True, append_images=pages)
    np.testing.assert_array_equal(decode(file), image_files.pillow_pixels(file))

    progressive = encode(picture, "JPEG", progressive=True)
    at = progressive.index(b"\xff\xda")
    for many in (progressive[at : at + 12] * 101, b"\xff\xfe\0\2" * 1001):
        with pytest.raises(tf.errors.InvalidArgumentError, match="not a decodable image"):
            decode(progressive[:at] + many + progressive[at:] + b"\xff\xda" * 99)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_declared_size_is_refused(picture, small, kind):
    side = {"WEBP": 0x3FFF, "JPEG": 65500}.get(kind, 65535)  # libjpeg has a limit of its own
    fine = encode(picture, kind)
    huge = declare(fine, kind, side)
    message = f"declares {side} x {side} pixels, expected 178956970 at most"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        small.decode(tf.constant(huge))
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"image_bytes\[1\]: .*{message}"):
        small.pixel_values(tf.constant([fine, huge, b"no image"]))


@pytest.mark.slow  # 90 million pixels, of which Pillow warns
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_large_pictures_are_read_as_pillow_reads_them(decode, kind):
    levels = np.tile(np.arange(250, dtype=np.uint8), (10_000, 36))
    levels[::7] += 3
    encoded = encode(PIL.Image.fromarray(levels), kind)
    assert (decode(encoded).numpy() == image_files.pillow_pixels(encoded)).all()


def test_max_image_pixels(picture):
    encoded = tf.constant([encode(picture, "PNG")])
    small = {"size": 8, "crop_size": 8}
    AlignImageProcessor(max_image_pixels=HEIGHT * WIDTH, **small).pixel_values(encoded)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"expected 850 at most"):
        AlignImageProcessor(max_image_pixels=HEIGHT * WIDTH - 1, **small).pixel_values(encoded)


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\xff",
        b"not an image",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"GIF89a" + bytes(40),
        b"GIF89a\x01\0\x01\0\0\0\0" + b"!\xf9\0" * 3000,
        b"BM" + bytes(60),
        b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\x02" + bytes(30),
        b"II*\0" + bytes(100),  # TIFF
    ],
)
def test_a_broken_row_is_named(picture, small, broken):
    fine = encode(picture, "JPEG")
    expected = r"image_bytes\[2\]: not a decodable image \(JPEG, PNG, GIF, WebP, or BMP without"
    with pytest.raises(tf.errors.InvalidArgumentError, match=expected):
        small.pixel_values(tf.constant([fine, fine, broken, b""]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_truncated_files_end_in_an_error_or_pixels(picture, small, kind):
    fine = encode(picture, kind)
    cuts = [fine[:length] for length in range(0, len(fine), max(len(fine) // 40, 1))]
    pixels, problem, _ = small.try_pixel_values_of(cuts)
    assert pixels.shape == (len(cuts), 8, 8, 3)
    assert problem.numpy()[:3].all()


def test_batch_equals_rows(picture):
    files = tf.constant([encode(picture.rotate(i), kind) for i, kind in enumerate(("PNG", "JPEG"))])
    processor = AlignImageProcessor(size=20, crop_size=15)
    batch = processor.pixel_values(files)
    assert batch.dtype == tf.float32 and batch.shape == (2, 15, 15, 3)
    for row, file in zip(batch, files, strict=True):
        np.testing.assert_array_equal(row, processor.decode_and_preprocess(file))
    assert processor.pixel_values(files[:0]).shape == (0, 15, 15, 3)


@pytest.mark.slow  # and tests of the data and of the export would see it
def test_inside_tf_data_and_a_saved_model(picture, tmp_path):
    processor = AlignImageProcessor(size=20, crop_size=15)
    file = encode(picture, "JPEG")
    expected = processor.decode_and_preprocess(tf.constant(file))
    [row] = tf.data.Dataset.from_tensors(file).map(processor.decode_and_preprocess)
    np.testing.assert_array_equal(row, expected)
    module = tf.Module()
    module.serve = tf.function(
        processor.pixel_values, input_signature=[tf.TensorSpec([None], tf.string)]
    )
    tf.saved_model.save(module, tmp_path)
    served = tf.saved_model.load(tmp_path).serve
    np.testing.assert_array_equal(served(tf.constant([file])), expected[None])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"image_bytes\[0\]: not a decodable"):
        served(tf.constant([b""]))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_files(tmp_path, name):
    saved = AlignImageProcessor(size=20, resample=3, crop_size=15, mode="original")
    saved._extra["do_pad"] = None
    saved.save_pretrained(tmp_path)
    if name == "processor_config.json":
        text = (tmp_path / "preprocessor_config.json").read_text()
        (tmp_path / "preprocessor_config.json").unlink()
        (tmp_path / name).write_text('{"image_processor": ' + text + "}")
    loaded = AlignImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    assert (loaded.mode, loaded.size, "do_pad" in loaded.to_dict()) == (
        "original",
        {"height": 20, "width": 20},
        True,
    )


def test_absent_keys_are_the_reference_class_defaults():
    processor = AlignImageProcessor.from_dict({"size": {"height": 9, "width": 8}})
    assert (processor.resample, processor.include_top, processor.rescale_factor) == (
        3,
        True,
        1 / 255,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, "mode='fast': expected 'hf' or 'original'"),
        ({"resample": 1}, r"resample=1: expected 0 \(nearest\)"),
        ({"size": {"shortest_edge": 3}}, "size={'shortest_edge': 3}: expected a positive height"),
        ({"crop_size": 0}, "crop_size=.*: expected a positive height"),
        ({"image_mean": [0.5]}, r"image_mean=\[0.5\]: expected 3 numbers"),
        ({"max_image_pixels": 0}, "max_image_pixels=0: expected 1 or more"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AlignImageProcessor(**settings)


@pytest.mark.parametrize(
    "values",
    [
        '{"size": [346]}',
        '{"crop_size": {"height": 1e999, "width": 8}}',
        '{"image_mean": {"a": 1}}',
        '{"max_image_pixels": "x"}',
        '{"do_resize": true, "resample": [3], "size": null}',
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_one_line(tmp_path, values):
    (tmp_path / "preprocessor_config.json").write_text(values)
    with pytest.raises(ValueError) as error:
        AlignImageProcessor.from_pretrained(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_the_first_files_read_without_a_graph_have_the_pixels_of_the_others():
    names = sorted(FILES)[::9][:7]
    processor = AlignImageProcessor(size=40, crop_size=32)
    contents = [*(FILES[name] for name in names), b"no image"]
    without = processor.try_pixel_values_of(contents)
    with_graph = processor.try_pixel_values_of(contents)
    assert processor._images_seen == 16 > image_processing.IMAGES_WITHOUT_GRAPH
    assert without[1].numpy().tolist() == [0] * 7 + [image_processing.BROKEN]
    for ours, theirs in zip(without, with_graph, strict=True):
        np.testing.assert_array_equal(ours, theirs)
