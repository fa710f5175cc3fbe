"""Images to pixels: decoding and resizing against Pillow, refusals, files."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from align_tf import AlignImageProcessor, image_decoding

HEIGHT, WIDTH = 23, 37
# Pillow 13 resamples the columns of tall images first, earlier ones the rows of any.
PILLOW_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="the pixels of Pillow 13"
)


@pytest.fixture(scope="module")
def picture() -> PIL.Image.Image:
    rng = np.random.default_rng(0)
    walk = rng.normal(0, 4, (HEIGHT, WIDTH, 3)).cumsum(0).cumsum(1) + 128
    return PIL.Image.fromarray(walk.clip(0, 255).astype(np.uint8))


def encode(image: PIL.Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(color: int, depth: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """Writes a PNG of random samples in a color type that Pillow cannot write."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    row = (width * channels * depth + 7) // 8
    samples = np.random.default_rng(1).integers(0, 256, (height, row + 1), dtype=np.uint8)
    samples[:, 0] = 0  # no filter
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)),
        (b"IDAT", zlib.compress(samples.tobytes())),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def transparent(image: PIL.Image.Image) -> PIL.Image.Image:
    image = image.convert("RGBA")
    mask = np.indices((HEIGHT, WIDTH)).sum(0) % 3 * 127
    image.putalpha(PIL.Image.fromarray(mask.astype(np.uint8)))
    return image


def animation(image: PIL.Image.Image, kind: str, frames: int = 3) -> bytes:
    rest = [image.rotate(90 * i) for i in range(1, frames)]
    return encode(image, kind, save_all=True, append_images=rest)


def small_frame() -> bytes:
    """Writes a GIF whose first frame covers a part of the canvas, with a transparent color."""
    file = bytearray(encode(PIL.Image.new("P", (8, 6), 1), "GIF", transparency=3))
    file[6:10] = struct.pack("<HH", 11, 9)
    at = file.index(b",", 13)
    file[at + 1 : at + 5] = struct.pack("<HH", 2, 1)
    return bytes(file)


# name: how the picture is encoded
ENCODINGS = {
    **{f"jpeg {s}": lambda i, s=s: encode(i, "JPEG", subsampling=s) for s in (0, 1, 2)},
    "jpeg progressive": lambda i: encode(i, "JPEG", progressive=True, quality=60),
    "jpeg gray": lambda i: encode(i.convert("L"), "JPEG"),
    "jpeg cmyk": lambda i: encode(i.convert("CMYK"), "JPEG"),
    **{f"png {m}": lambda i, m=m: encode(i.convert(m), "PNG") for m in ("1", "L", "P", "RGB")},
    "png rgba": lambda i: encode(transparent(i), "PNG"),
    "png la": lambda i: encode(transparent(i).convert("LA"), "PNG"),
    "png palette alpha": lambda i: encode(i.quantize(9), "PNG", transparency=3),
    "png rgb alpha": lambda i: encode(i, "PNG", transparency=i.getpixel((2, 2))),
    **{f"png {c} {d}": lambda i, c=c, d=d: png(c, d) for c, d in ((0, 2), (0, 4), (0, 16))},
    **{f"png {c} 16": lambda i, c=c: png(c, 16) for c in (2, 4, 6)},
    "gif": lambda i: encode(i, "GIF"),
    "gif plain": lambda i: encode(i.quantize(5), "GIF", interlace=0),
    "gif transparent": lambda i: encode(transparent(i), "GIF"),
    "gif animated": lambda i: animation(i, "GIF"),
    "gif small frame": lambda i: small_frame(),
    **{f"bmp {m}": lambda i, m=m: encode(i.convert(m), "BMP") for m in ("1", "L", "P", "RGB")},
    "bmp 16 colors": lambda i: encode(i.quantize(16), "BMP"),
    "bmp rgba": lambda i: encode(transparent(i), "BMP"),
    "webp": lambda i: encode(i, "WEBP"),
    "webp lossless": lambda i: encode(i, "WEBP", lossless=True),
    "webp alpha": lambda i: encode(transparent(i), "WEBP"),
    "webp lossless alpha": lambda i: encode(transparent(i), "WEBP", lossless=True),
    "webp animated": lambda i: animation(i, "WEBP"),
}


@pytest.fixture(scope="module")
def decode():
    return tf.function(AlignImageProcessor().decode, input_signature=[tf.TensorSpec([], tf.string)])


@pytest.mark.parametrize("name", ENCODINGS)
def test_decode_equals_pillow(decode, picture, name):
    encoded = ENCODINGS[name](picture)
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(encoded), expected)
    assert image_decoding.declared_size(tf.constant(encoded)).numpy().tolist() == [
        *expected.shape[:2]
    ]


@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize(
    "size",
    [
        *((1, 1), (1, 400), (300, 1), (46, 46), (289, 289), (30, 1300), (900, 700), (1100, 1300)),
        (652, 656),  # a rounded reciprocal of 46 or 53 for the step takes another neighbor
        *(pytest.param(size, marks=PILLOW_13) for size in ((900, 300), (60, 47), (300, 80))),
    ],
)
def test_resize_equals_pillow(size, resample):
    array = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    array[:, size[1] // 2 :] //= 255  # edges, where bicubic leaves 0..255
    array[:, size[1] // 2 :] *= 255
    processor = AlignImageProcessor(
        size={"height": 46, "width": 53}, resample=resample, do_center_crop=False, do_rescale=False
    )
    expected = PIL.Image.fromarray(array).resize((53, 46), resample)
    np.testing.assert_array_equal(processor.preprocess_array(array), np.asarray(expected))


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
def test_exif_orientation(picture, orientation, order):
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1) + entry
    encoded = encode(picture, "JPEG", exif=b"Exif\0\0" + tiff + bytes(4))
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(PIL.ImageOps.exif_transpose(image))
        unturned = np.asarray(image)
    upright = AlignImageProcessor(apply_exif_orientation=True)
    np.testing.assert_array_equal(upright.decode(tf.constant(encoded)), expected)
    np.testing.assert_array_equal(AlignImageProcessor().decode(tf.constant(encoded)), unturned)


def huge(encoded: bytes, kind: str) -> bytes:
    """Writes the most pixels that the format can say into the header."""
    file = bytearray(encoded)
    side = 65500 if kind == "JPEG" else 65535
    if kind == "JPEG":
        at = file.index(b"\xff\xc0") + 5
        file[at : at + 4] = struct.pack(">HH", side, side)
    elif kind == "PNG":
        file[16:24] = struct.pack(">II", side, side)
        file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    elif kind == "GIF":
        file[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        file[18:26] = struct.pack("<ii", side, -side)
    else:
        file[26:30] = struct.pack("<HH", 0x3FFF, 0x3FFF)
    return bytes(file)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_declared_size_is_refused(picture, kind):
    side = {"WEBP": 0x3FFF, "JPEG": 65500}.get(kind, 65535)  # libjpeg has a limit of its own
    fine = encode(picture, kind)
    processor = AlignImageProcessor(size=8, crop_size=8)
    message = f"declares {side} x {side} pixels, expected 89478485 at most"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        processor.decode(tf.constant(huge(fine, kind)))
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"image_bytes\[1\]: .*{message}"):
        processor.pixel_values(tf.constant([fine, huge(fine, kind), b"no image"]))


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
def test_a_broken_row_is_named(picture, broken):
    fine = encode(picture, "JPEG")
    processor = AlignImageProcessor(size=8, crop_size=8)
    expected = r"image_bytes\[2\]: not a decodable image \(JPEG, PNG, GIF, BMP or WebP\)"
    with pytest.raises(tf.errors.InvalidArgumentError, match=expected):
        processor.pixel_values(tf.constant([fine, fine, broken, b""]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_truncated_files_end_in_an_error_or_pixels(picture, kind):
    fine = encode(picture, kind)
    processor = AlignImageProcessor(size=8, crop_size=8)
    cuts = [fine[:length] for length in range(0, len(fine), max(len(fine) // 40, 1))]
    pixels, problem, _ = processor.try_pixel_values_of(tf.constant(cuts))
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
