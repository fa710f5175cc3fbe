"""Images made to break a decoder: what they cost, how they are refused, and mutated files.

ALIGN_TF_FUZZ=5000 mutates that many files, where the default is a few hundred.
"""

import json
import os
import struct
import subprocess
import sys
import zlib

import image_files
import numpy as np
import pytest
import tensorflow as tf
from image_files import declare, png_chunk

from align_tf import AlignImageProcessor
from align_tf.preprocessing.image_processing import BROKEN, FINE, TOO_LARGE

MUTATIONS = int(os.environ.get("ALIGN_TF_FUZZ", "300"))
PNG_HEADER = image_files.png(2, 8)[:33]
PNG_END = png_chunk(b"IEND", b"")


def zeros(megabytes: int) -> bytes:
    """Compresses zeros, a thousand to one."""
    encoder = zlib.compressobj(9)
    parts = [encoder.compress(bytes(1 << 20)) for _ in range(megabytes)]
    return b"".join(parts) + encoder.flush()


def png_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    return PNG_HEADER[:8] + png_chunk(b"IHDR", header)


def many_scans() -> bytes:
    """Writes a JPEG of 80 million pixels and 5,000 scans of no data."""
    file = image_files.encode(image_files.walk(), "JPEG", progressive=True)
    file = declare(file, "JPEG", 9000)
    at = file.index(b"\xff\xda")
    return file[:at] + file[at : at + 12] * 5000


def two_frames() -> bytes:
    """Writes a JPEG with a second frame header, of 81 million pixels."""
    file = image_files.encode(image_files.walk(), "JPEG")
    at = file.index(b"\xff\xc0")
    return file[: at + 19] + declare(file[at : at + 19], "JPEG", 9000) + file[at + 19 :]


def frames_of_nothing(count: int) -> bytes:
    """Writes a GIF of many frames of 25 million pixels, each a few bytes long."""
    frame = b"," + struct.pack("<4HB", 0, 0, 5000, 5000, 0) + b"\2\2\x4c\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", 40000, 5000, 0x80, 0, 0) + bytes(6) + frame * count


def text(kind: bytes, megabytes: int) -> bytes:
    head = b"a\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0"
    return png_chunk(kind, head + zeros(megabytes))


# name: a file, and what becomes of it
BOMBS = {
    **{
        f"{kind} declares {side}": (
            lambda k=kind, s=side: declare(image_files.encode(image_files.walk(), k), k, s),
            TOO_LARGE,
        )
        for kind, side in (("JPEG", 65500), ("PNG", 65535), ("GIF", 65535), ("BMP", 65535))
    },
    "WebP declares 16383": (
        lambda: declare(image_files.encode(image_files.walk(), "WEBP"), "WEBP", 16383),
        TOO_LARGE,
    ),
    "JPEG beyond libjpeg": (
        lambda: declare(image_files.encode(image_files.walk(), "JPEG"), "JPEG", 65535),
        BROKEN,
    ),
    # libwebp takes what is no chunk for a frame, whose size is elsewhere.
    "WebP without chunks": (
        lambda: b"RIFF\xd0\7\0\0WEBP0\1\0\x9d\1\x2a\xff\x3f\xff\x3f" + bytes(2000),
        BROKEN,
    ),
    "JPEG of 5,000 scans": (many_scans, BROKEN),
    "JPEG of two frames": (two_frames, BROKEN),
    "PNG without pixels": (
        lambda: png_size(9400, 9400) + png_chunk(b"IDAT", b"") + PNG_END,
        BROKEN,
    ),
    "PNG of 300 MB in IDAT": (
        lambda: PNG_HEADER + png_chunk(b"IDAT", zeros(300)) + PNG_END,
        BROKEN,
    ),
    "PNG of 20,000 empty IDAT": (
        lambda: PNG_HEADER + png_chunk(b"IDAT", b"") * 20_000 + PNG_END,
        BROKEN,
    ),
    **{
        f"PNG of 64 MB in {kind.decode()}": (
            lambda k=kind: image_files.png(2, 8, before=text(k, 64)),
            FINE,
        )
        for kind in (b"zTXt", b"iTXt", b"iCCP")
    },
    "PNG of 200 texts of 7 MB": (
        lambda: image_files.png(2, 8, before=text(b"zTXt", 7) * 200),
        FINE,
    ),
    "GIF of 60,000 frames": (lambda: frames_of_nothing(60_000), TOO_LARGE),
    "GIF of 5,000 frames": (lambda: image_files.gif(frames=5000), FINE),
    "GIF of 3,000 extensions": (lambda: image_files.gif(before=b"!\xfe\1a\0" * 3000), BROKEN),
    "GIF with too much data": (
        lambda: image_files.gif()[:-2] + b"\1\x55" * 2_000_000 + b"\0;",
        FINE,
    ),
    "BMP that declares more than it has": (
        lambda: declare(image_files.bmp(24), "BMP", 9000),
        BROKEN,
    ),
    "BMP, run-length encoded": (lambda: image_files.bmp(8, compression=1), BROKEN),
    "random": (lambda: np.random.default_rng(0).bytes(1 << 20), BROKEN),
    "another format": (lambda: image_files.encode(image_files.walk(), "TIFF"), BROKEN),
}

# Reads each file after one that is fine, and prints what it takes at most beyond what was there.
MEASURE = """
import json, sys
from align_tf import AlignImageProcessor

def megabytes(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

processor = AlignImageProcessor(size=8, crop_size=8)
files = [open(path, "rb").read() for path in sys.argv[1:]]
for file in files[:9]:  # what is set up once
    processor.try_pixel_values_of([file])
found = []
for file in files[9:]:
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    idle = megabytes("VmRSS")
    _, problem, _ = processor.try_pixel_values_of([file])
    found.append([int(problem[0]), megabytes("VmHWM") - idle])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_bombs_cost_little_memory(tmp_path):
    fine = ["jpeg 0 0", "jpeg cmyk", "png 2 8", "png 0 16", "gif 87a", "bmp 8", "bmp 24", "webp"]
    known = image_files.all_files(image_files.walk())
    files = [known[name] for name in (*fine, "webp animated")]
    files += [make() for make, _ in BOMBS.values()]
    paths = []
    for i, file in enumerate(files):
        paths.append(tmp_path / str(i))
        paths[-1].write_bytes(file)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(os.fspath, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(zip(BOMBS, json.loads(run.stdout), strict=True))
    assert {name: problem for name, (problem, _) in found.items()} == {
        name: problem for name, (_, problem) in BOMBS.items()
    }
    assert not {name: peak for name, (_, peak) in found.items() if peak > 50}


# --- mutated files -------------------------------------------------------------------------


def mutate(file: bytes, rng: np.random.Generator) -> bytes:
    """Cuts a file, takes bytes out of it, puts some in or changes a few."""
    at, how = int(rng.integers(0, len(file))), rng.integers(0, 6)
    if how == 0:
        return file[:at]
    if how == 1:
        return file[:at] + file[at + int(rng.integers(1, 40)) :]
    if how == 2:
        return file[:at] + rng.bytes(int(rng.integers(1, 20))) + file[at:]
    changed = bytearray(file)
    for _ in range(rng.integers(1, 5)):  # more often than not in the header
        at = rng.integers(0, len(file) if how == 3 else min(len(file), 80))
        changed[at] = rng.choice([0, 1, 128, 255, rng.integers(0, 256)])
    return checked_png(bytes(changed)) if rng.random() < 0.8 else bytes(changed)


def checked_png(file: bytes) -> bytes:
    """Writes new checksums, without which a changed PNG is refused at once."""
    parts, at = [file[:8]], 8
    while file.startswith(b"\x89PNG") and at + 12 <= len(file):
        length = min(struct.unpack(">I", file[at : at + 4])[0], len(file) - at - 12)
        parts.append(png_chunk(file[at + 4 : at + 8], file[at + 8 : at + 8 + length]))
        at += length + 12
    return b"".join([*parts, file[at:]]) if at > 8 else file


@pytest.mark.slow  # a sweep, of which a few files find little
def test_mutated_files():
    """No file ends in anything but pixels or an error, and pixels are Pillow's."""
    processor = AlignImageProcessor(max_image_pixels=1 << 20)
    decode = tf.function(processor.decode, input_signature=[tf.TensorSpec([], tf.string)])
    files = image_files.all_files(image_files.walk())
    names = list(files)
    agreed = 0
    for seed in range(MUTATIONS):
        rng = np.random.default_rng(seed)
        name = names[rng.integers(0, len(names))]
        mutated = mutate(files[name], rng)
        try:
            pixels = decode(tf.constant(mutated)).numpy()
            expected = image_files.pillow_pixels(mutated)
        except (tf.errors.InvalidArgumentError, OSError, SyntaxError, ValueError):
            continue  # one of them refuses what the other may take for a damaged image
        np.testing.assert_array_equal(pixels, expected, f"seed {seed}, {name}")
        agreed += 1
    assert agreed > MUTATIONS / 10
