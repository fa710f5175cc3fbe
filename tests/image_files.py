"""Encoded images of every kind, for the tests: what Pillow writes, and what it only reads."""

import io
import struct
import zlib

import numpy as np
import PIL.Image

HEIGHT, WIDTH = 23, 37


def walk(height: int = HEIGHT, width: int = WIDTH) -> PIL.Image.Image:
    """Draws a smooth picture with all colors in it."""
    rng = np.random.default_rng(0)
    levels = rng.normal(0, 4, (height, width, 3)).cumsum(0).cumsum(1) + 128
    return PIL.Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def noise(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> PIL.Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(levels)


def encode(image: PIL.Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def pillow_pixels(encoded: bytes) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def transparent(image: PIL.Image.Image) -> PIL.Image.Image:
    image = image.convert("RGBA")
    mask = np.indices(image.size[::-1]).sum(0) % 3 * 127
    image.putalpha(PIL.Image.fromarray(mask.astype(np.uint8)))
    return image


def animation(image: PIL.Image.Image, kind: str, frames: int = 3, **settings) -> bytes:
    rest = [image.rotate(90 * i) for i in range(1, frames)]
    return encode(image, kind, save_all=True, append_images=rest, **settings)


# --- JPEG ----------------------------------------------------------------------------------


def sampled(image: PIL.Image.Image, subsampling: int, factors: int) -> bytes:
    """Encodes with sampling factors that Pillow cannot write but that order blocks alike."""
    image = image.resize((64, 64))
    file = bytearray(encode(image, "JPEG", subsampling=subsampling))
    file[file.index(b"\xff\xc0") + 11] = factors
    return bytes(file)


def ycck(encoded: bytes) -> bytes:
    """Declares the components of a CMYK JPEG to be luma, chroma and black."""
    file = bytearray(encoded)
    file[file.index(b"Adobe") + 11] = 2
    return bytes(file)


def without_adobe(encoded: bytes) -> bytes:
    at = encoded.index(b"\xff\xee")
    return encoded[:at] + encoded[at + 16 :]


# --- PNG -----------------------------------------------------------------------------------


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    color: int,
    depth: int,
    width: int = WIDTH,
    height: int = HEIGHT,
    before: bytes = b"",
    interlace: bool = False,
    part: int = 1 << 20,
) -> bytes:
    """Writes a PNG of random samples.

    Args:
        color: 0 (gray), 2 (RGB), 3 (palette), 4 (gray and alpha) or 6 (RGB and alpha).
        depth: bits of a sample.
        width: in pixels.
        height: in pixels.
        before: chunks to put before the pixels.
        interlace: writes the pixels in seven passes.
        part: bytes of pixels in a chunk.
    """
    rng = np.random.default_rng(color * 16 + depth)
    bits = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] * depth

    def lines(width: int, height: int) -> bytes:
        lines = rng.integers(0, 256, (height, (width * bits + 7) // 8 + 1), dtype=np.uint8)
        lines[:, 0] = 0  # no filter
        return lines.tobytes() if width else b""

    adam7 = ((8, 0, 8, 0), (8, 4, 8, 0), (4, 0, 8, 4), (4, 2, 4, 0), (2, 0, 4, 2))
    adam7 += ((2, 1, 2, 0), (1, 0, 2, 1))
    passes = adam7 if interlace else ((1, 0, 1, 0),)
    data = b"".join(lines(-((x - width) // dx), -((y - height) // dy)) for dx, x, dy, y in passes)
    data = zlib.compress(data)
    palette = rng.integers(0, 256, 3 << depth, dtype=np.uint8).tobytes() if color == 3 else b""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            png_chunk(b"PLTE", palette) if palette else b"",
            before,
            *(png_chunk(b"IDAT", data[i : i + part]) for i in range(0, len(data), part)),
            png_chunk(b"IEND", b""),
        ]
    )


# --- GIF -----------------------------------------------------------------------------------


def gif(
    canvas: tuple[int, int] = (WIDTH, HEIGHT),
    frame: tuple[int, int, int, int] = (0, 0, WIDTH, HEIGHT),
    palette: bool = True,
    own_palette: bool = False,
    transparency: int | None = None,
    before: bytes = b"",
    block: int = 255,
    version: bytes = b"GIF89a",
    frames: int = 1,
) -> bytes:
    """Writes a GIF of random pixels of 16 colors.

    Args:
        canvas: width and height.
        frame: left, top, width and height of each frame.
        palette: the file has one.
        own_palette: each frame has one.
        transparency: the color that is.
        before: extensions before the frames.
        block: bytes of a sub-block.
        version: the first six bytes.
        frames: how many.
    """
    rng = np.random.default_rng(5)
    colors = [rng.integers(0, 256, 48, dtype=np.uint8).tobytes() for _ in range(2)]
    data = lzw(rng.integers(0, 16, frame[2] * frame[3]), 4)
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    control = b""
    if transparency is not None:
        control = b"!\xf9\4\1\0\0" + bytes([transparency]) + b"\0"
    image = b"".join(
        [
            control,
            b"," + struct.pack("<4HB", *frame, 0x83 if own_palette else 0),
            colors[1] if own_palette else b"",
            b"\4",
            *(bytes([len(block)]) + block for block in blocks),
            b"\0",
        ]
    )
    screen = struct.pack("<HHBBB", *canvas, 0x83 if palette else 0, 2, 0)
    return version + screen + (colors[0] if palette else b"") + before + image * frames + b";"


def lzw(indices: np.ndarray, bits: int) -> bytes:
    """Encodes without compression: a clear code comes before codes get longer."""
    clear, run = 1 << bits, (1 << bits) - 2
    codes = []
    for i in range(0, len(indices), run):
        codes += [clear, *indices[i : i + run]]
    codes.append(clear + 1)
    value = np.array(codes)[:, None] >> np.arange(bits + 1) & 1
    return np.packbits(value.reshape(-1).astype(np.uint8), bitorder="little").tobytes()


# --- BMP -----------------------------------------------------------------------------------


def bmp(
    depth: int,
    header: int = 40,
    masks: tuple[int, ...] = (),
    top_down: bool = False,
    colors: int = 0,
    compression: int | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> bytes:
    """Writes a BMP of random pixels.

    Args:
        depth: bits of a pixel.
        header: its size, which says which kind it is.
        masks: of red, green, blue and alpha.
        top_down: the first row comes first.
        colors: of the palette; 0 for as many as the depth allows.
        compression: 0 (none), 1, 2 (run-length) or 3 (masks); by default what masks asks for.
        width: in pixels.
        height: in pixels.
    """
    rng = np.random.default_rng(depth)
    stride = (width * depth + 31) // 32 * 4
    pixels = rng.integers(0, 256, stride * height, dtype=np.uint8).tobytes()
    count = (colors or 1 << depth) if depth <= 8 else 0
    palette = rng.integers(0, 256, count * (3 if header == 12 else 4), dtype=np.uint8).tobytes()
    if header == 12:
        fields = struct.pack("<IHHHH", 12, width, height, 1, depth)
    else:
        kind = (3 if masks else 0) if compression is None else compression
        rows = -height if top_down else height
        fields = struct.pack(
            "<IiiHHIIiiII", header, width, rows, 1, depth, kind, 0, 0, 0, colors, 0
        )
        fields += struct.pack(f"<{len(masks)}I", *masks)
        fields = fields.ljust(header, b"\0")
    at = 14 + len(fields) + len(palette)
    return b"BM" + struct.pack("<IHHI", at + len(pixels), 0, 0, at) + fields + palette + pixels


# --- WebP ----------------------------------------------------------------------------------


def small_webp_frame(image: PIL.Image.Image) -> bytes:
    """Writes an animation whose first frame covers a part of the canvas."""
    file = bytearray(animation(image, "WEBP", lossless=True))
    width, height = image.size
    file[24:30] = (width + 6).to_bytes(3, "little") + (height + 8).to_bytes(3, "little")
    at = file.index(b"ANMF") + 8
    file[at : at + 6] = (2).to_bytes(3, "little") + (1).to_bytes(3, "little")
    return bytes(file)


# --- all of them ---------------------------------------------------------------------------


def jpeg_files(image: PIL.Image.Image) -> dict[str, bytes]:
    cmyk = encode(image.convert("CMYK"), "JPEG")
    colors = noise(*image.size[::-1]).convert("RGBA")
    colors.putalpha(noise(*image.size[::-1], seed=1).convert("L"))
    inks = PIL.Image.frombytes("CMYK", colors.size, colors.tobytes())
    loud = encode(inks, "JPEG", quality=95)
    return {
        **{
            f"jpeg {s} {p}": encode(image, "JPEG", subsampling=s, progressive=bool(p), quality=q)
            for s, p, q in ((0, 0, 75), (1, 0, 75), (2, 0, 75), (0, 1, 60), (1, 1, 60), (2, 1, 20))
        },
        "jpeg 440": sampled(image, 1, 0x12),
        "jpeg 411": sampled(image, 2, 0x41),
        "jpeg gray": encode(image.convert("L"), "JPEG"),
        "jpeg gray progressive": encode(image.convert("L"), "JPEG", progressive=True),
        "jpeg rgb": encode(image, "JPEG", keep_rgb=True),
        "jpeg restarts": encode(image, "JPEG", restart_marker_blocks=1),
        "jpeg optimized": encode(image, "JPEG", optimize=True, quality=1),
        "jpeg cmyk": cmyk,
        "jpeg cmyk noise": loud,
        "jpeg cmyk progressive": encode(inks, "JPEG", quality=95, progressive=True),
        "jpeg cmyk plain": without_adobe(loud),
        "jpeg ycck": ycck(cmyk),
        "jpeg ycck noise": ycck(loud),
        "jpeg ycck restarts": ycck(encode(inks, "JPEG", restart_marker_rows=1)),
    }


def png_files(image: PIL.Image.Image) -> dict[str, bytes]:
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    kinds = [(color, depth) for color in depths for depth in depths[color]]
    gamma = png_chunk(b"gAMA", struct.pack(">I", 100000))
    return {
        **{f"png {m}": encode(image.convert(m), "PNG") for m in ("1", "L", "P", "RGB", "LA")},
        "png rgba": encode(transparent(image), "PNG"),
        "png palette alpha": encode(image.quantize(9), "PNG", transparency=3),
        "png rgb alpha": encode(image, "PNG", transparency=image.getpixel((0, 0))),
        "png animated": animation(image, "PNG"),
        **{f"png {c} {d}": png(c, d) for c, d in kinds},
        **{f"png {c} {d} interlaced": png(c, d, interlace=True) for c, d in kinds},
        **{
            f"png {c} {d} tRNS": png(c, d, before=png_chunk(b"tRNS", bytes(size)))
            for c, d, size in ((0, 1, 2), (0, 4, 2), (0, 16, 2), (2, 8, 6), (2, 16, 6), (3, 4, 9))
        },
        "png gamma": png(2, 8, before=gamma),
        "png many chunks": png(6, 8, part=5, before=gamma * 3),
    }


def gif_files(image: PIL.Image.Image) -> dict[str, bytes]:
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * 300 + b"\3abc\0"
    return {
        "gif interlaced": encode(image, "GIF"),
        "gif plain": encode(image.quantize(5), "GIF", interlace=0),
        "gif gray": encode(image.convert("L"), "GIF"),
        "gif transparent pillow": encode(transparent(image), "GIF"),
        "gif animated": animation(image, "GIF"),
        "gif 87a": gif(version=b"GIF87a"),
        "gif own palette": gif(own_palette=True),
        "gif only own palette": gif(palette=False, own_palette=True),
        "gif transparent": gif(transparency=3),
        "gif small frame": gif(canvas=(50, 40), frame=(3, 5, WIDTH, HEIGHT)),
        "gif small transparent frame": gif(
            canvas=(50, 40), frame=(3, 5, WIDTH, HEIGHT), transparency=3, own_palette=True
        ),
        "gif frames": gif(frames=3),
        "gif comments": gif(before=comment * 3),
        **{f"gif blocks {n}": gif((300, 300), (0, 0, 300, 300), block=n) for n in (1, 100, 255)},
    }


def bmp_files(image: PIL.Image.Image) -> dict[str, bytes]:
    masks = [
        (0xFF0000, 0xFF00, 0xFF, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0),
        (0xFF000000, 0xFF00, 0xFF, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
        (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        (0, 0, 0, 0),
    ]
    return {
        **{f"bmp {m}": encode(image.convert(m), "BMP") for m in ("1", "L", "P", "RGB")},
        "bmp 16 colors": encode(image.quantize(16), "BMP"),
        "bmp rgba": encode(transparent(image), "BMP"),
        **{f"bmp {d}": bmp(d) for d in (1, 4, 8, 16, 24, 32)},
        **{f"bmp {d} core": bmp(d, 12) for d in (1, 4, 8, 24)},
        **{f"bmp {d} top down": bmp(d, top_down=True) for d in (1, 8, 16, 24, 32)},
        **{f"bmp {d} header {h}": bmp(d, h) for d in (8, 24, 32) for h in (64, 108, 124)},
        "bmp few colors": bmp(8, colors=256),
        "bmp 565": bmp(16, masks=(0xF800, 0x7E0, 0x1F)),
        "bmp 565 long": bmp(16, 56, masks=(0xF800, 0x7E0, 0x1F, 0)),
        "bmp 555": bmp(16, masks=(0x7C00, 0x3E0, 0x1F)),
        **{f"bmp masks {i}": bmp(32, 108, m) for i, m in enumerate(masks)},
        "bmp masks 24": bmp(24, masks=(0xFF0000, 0xFF00, 0xFF)),
    }


def webp_files(image: PIL.Image.Image) -> dict[str, bytes]:
    return {
        "webp": encode(image, "WEBP"),
        "webp rough": encode(image, "WEBP", quality=3, method=0),
        "webp lossless": encode(image, "WEBP", lossless=True),
        "webp alpha": encode(transparent(image), "WEBP"),
        "webp lossless alpha": encode(transparent(image), "WEBP", lossless=True),
        "webp exact alpha": encode(transparent(image), "WEBP", lossless=True, exact=True),
        "webp icc": encode(image, "WEBP", icc_profile=bytes(300), exif=b"Exif\0\0II*\0" + bytes(9)),
        "webp animated": animation(image, "WEBP"),
        "webp animated lossless": animation(transparent(image), "WEBP", lossless=True),
        "webp small frame": small_webp_frame(image),
    }


def all_files(image: PIL.Image.Image) -> dict[str, bytes]:
    kinds = (jpeg_files, png_files, gif_files, bmp_files, webp_files)
    return {name: file for kind in kinds for name, file in kind(image).items()}


def declare(encoded: bytes, kind: str, side: int) -> bytes:
    """Writes another width and height into the header."""
    file = bytearray(encoded)
    if kind == "JPEG":
        at = max(file.find(b"\xff\xc0"), file.find(b"\xff\xc2")) + 5
        file[at : at + 4] = struct.pack(">HH", side, side)
    elif kind == "PNG":
        file[16:24] = struct.pack(">II", side, side)
        file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    elif kind == "GIF":
        file[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        file[18:26] = struct.pack("<ii", side, -side)
    else:
        file[26:30] = struct.pack("<HH", side, side)
    return bytes(file)
