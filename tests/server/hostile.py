"""Requests that no good client sends: ranks, dimensions, dtypes and values of every kind.

    python hostile.py EXPORT SEED COUNT

runs so many of them, and then a good one, by TensorFlow's own session, as a server in C++ does. It
prints what each is before it runs it, so that a crash shows which it was, and what comes of it.
"""

import io
import json
import os
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

SIZE, VOCABULARY, LONGEST = 96, 6000, 64  # align-tiny's: an image's side, words, tokens
DIMENSIONS = (0, 1, 1, 1, 2, 2, 3, 5, 31, 65)
MOST_ELEMENTS, MOST_STRINGS = 2**17, 2**8
NUMBERS = (0, 1, -1, 2, 0.5, 31.9, 33, 255, 1e30, -1e38, np.inf, -np.inf, np.nan, 1e-40)
IDS = (0, 1, 2, 3, 5999, 6000, -1, -6000, -6001, 2**31 - 1, -(2**31), 100_000)
DTYPES = ("float32", "float64", "float16", "int8", "uint8", "int32", "int64", "bool", "object")


def picture(format: str = "PNG", size: tuple[int, int] = (3, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(buffer, format)
    return buffer.getvalue()


PNG, JPEG, GIF, BMP, WEBP = (picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"))
LARGE = PNG[:16] + b"\x00\x0f\x42\x40" * 2 + PNG[24:]  # of a million by a million pixels, it says
STRINGS = (
    *(b"", b"a cat", b"\0", b"\xff\xfe\x80", "\U0001f408 \u0301\u202e\ufffd".encode(), b" " * 5000),
    *(b"word " * 3000, b"x" * 20000, b"[CLS] [SEP] [MASK]", b"\xed\xa0\x80", b"\n\t\r"),
    *(PNG, JPEG, GIF, BMP, WEBP, PNG[:40], JPEG[:-20], GIF[:9], BMP[:30], WEBP[:20], LARGE),
    *(picture(size=(1, 1)), picture(size=(1, 3000)), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"),
)

ONES = np.ones((2, 4), np.int32)
GOOD = {
    "": {
        "image_bytes": np.array([PNG, JPEG], object),
        "labels": np.array([[b"a cat", b"a dog"]] * 2, object),
    },
    "embed_image": {"image_bytes": np.array([PNG, BMP], object)},
    "embed_text": {"texts": np.array([b"a cat", b"a dog"], object)},
    "embed_pixels": {"pixel_values": np.full((2, SIZE, SIZE, 3), 0.5, np.float32)},
    "embed_tokens": {
        "input_ids": np.array([[2, 7, 8, 3]] * 2, np.int32),
        "attention_mask": ONES,
        "token_type_ids": ONES * 0,
    },
}


def shape(rng: np.random.Generator, good: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape: of any rank to 6, or the good one with a dimension changed."""
    if rng.random() < 0.5:
        found = tuple(rng.choice(DIMENSIONS, rng.integers(0, 7)).tolist())
    else:
        changed = list(good)
        changed[rng.integers(len(changed))] = int(rng.choice(DIMENSIONS))
        found = tuple(changed)
    return found if np.prod(found, dtype=float) <= MOST_ELEMENTS else shape(rng, good)


def values(rng: np.random.Generator, dtype: np.dtype, size: tuple[int, ...]) -> np.ndarray:
    """Odd values for a dtype, some of them throughout, some in one place."""
    if dtype.hasobject:
        found = np.empty(size, object)
        few = rng.integers(len(STRINGS), size=3)
        found.ravel()[:] = [STRINGS[i] for i in rng.choice(few, found.size)]
        return found
    with np.errstate(over="ignore", invalid="ignore"):
        odd = np.array(NUMBERS if dtype.kind == "f" else IDS).astype(dtype)
        found = np.full(size, rng.choice(odd), dtype)
        if found.size and rng.random() < 0.7:
            found.ravel()[rng.integers(found.size)] = rng.choice(odd)
    return found


def mutated(rng: np.random.Generator, good: np.ndarray, any_dtype: bool) -> np.ndarray:
    """A good input with another shape, other values or another dtype."""
    kind = rng.integers(4 if any_dtype else 3)
    if kind == 0:
        return np.resize(good, shape(rng, good.shape)).astype(good.dtype)
    if kind == 1:
        return values(rng, good.dtype, good.shape)
    dtype = np.dtype(rng.choice(DTYPES)) if kind == 3 else good.dtype
    size = shape(rng, good.shape)
    while dtype.hasobject and np.prod(size) > MOST_STRINGS:
        size = shape(rng, good.shape)
    return values(rng, dtype, size)


def requests(
    seed: int, count: int, any_dtype: bool = True
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields so many requests: a signature, and its inputs."""
    rng = np.random.default_rng(seed)
    names = list(GOOD)
    for number in range(count):
        name = names[number % len(names)]
        inputs = dict(GOOD[name])
        changed = rng.permutation(list(inputs))[: rng.integers(1, len(inputs) + 1)]
        for key in changed:
            inputs[str(key)] = mutated(rng, inputs[str(key)], any_dtype)
        yield name, inputs


def told(inputs: dict[str, np.ndarray]) -> str:
    """What a request is, in a line."""
    parts = []
    for name, array in inputs.items():
        some = [repr(value)[:40] for value in array.ravel()[:2].tolist()]
        parts.append(f"{name} {array.dtype}{list(array.shape)} {' '.join(some)}")
    return "; ".join(parts)


def check_answer(signature: str, inputs: dict[str, np.ndarray], outputs: dict) -> None:
    """Checks that an answer is one: a row for each, of finite numbers, of unit length."""
    rows = len(next(iter(inputs.values())))
    for name, array in outputs.items():
        array = np.asarray(array)
        assert len(array) == rows, (name, array.shape)
        assert np.isfinite(array).all(), name
        if signature:
            # What the tower gives nothing but zeros of has no direction.
            lengths = np.linalg.norm(array, axis=1)
            np.testing.assert_allclose(lengths[lengths > 0], 1, atol=1e-4)


def run(folder: str, seed: int, count: int) -> None:
    """Runs requests by a session, and says what comes of each."""
    from align_tf.server.prometheus import Metrics
    from align_tf.server.servable import Servable
    from align_tf.server.status_codes import RequestError

    servable = Servable(pathlib.Path(folder), "align", 1, Metrics())

    def session(name, inputs):
        """What Servable.predict does, without its own look at the inputs."""
        signature = servable.signatures[name or "serving_default"]
        return servable._run(signature, sorted(signature.outputs), inputs)

    before = {name: session(name, inputs) for name, inputs in GOOD.items()}
    for name, inputs in requests(seed, count):
        print(json.dumps({"signature": name, "request": told(inputs)}), flush=True)
        try:
            outputs = session(name, inputs)
            check_answer(name, inputs, outputs)
            result = ["OK", ""]
        except RequestError as error:
            result = [error.code, error.message]
        except AssertionError as error:
            result = ["WRONG", str(error)]
        print(json.dumps(result), flush=True)
    for name, inputs in GOOD.items():
        for key, value in session(name, inputs).items():
            np.testing.assert_allclose(value, before[name][key], atol=1e-5)
    print(json.dumps("good requests are answered as before"), flush=True)
    os._exit(0)  # TensorFlow's threads are not waited for


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
