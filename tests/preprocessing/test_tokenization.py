"""Text to ids: each rule of the tokenizer on its own, with the ids it gives."""

import json

import numpy as np
import pytest
import tensorflow as tf

from align_tf import AlignTokenizer

# id: token
VOCAB = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),  # 0..4
    *("a", "##a", "cat", "##s", "photo", "sep", "[", "]", "!", "中", "文"),  # 5..15
    *("##\U0001d165", "##\u08d4", "Cät", "cät", "Cat", "中文"),  # 16..21
]
PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def tokenizer() -> AlignTokenizer:
    return AlignTokenizer(VOCAB)


def ids(tokenizer: AlignTokenizer, text: str | bytes) -> list[int]:
    [row] = tokenizer(text, padding=False, max_length=400)["input_ids"].to_list()
    assert row[0] == CLS and row[-1] == SEP
    return row[1:-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo", [5, 9]),
        ("Cats!", [7, 8, 13]),
        ("CÄT", [7]),  # lower case, accents stripped
        ("ca\u0308t", [7]),
        ("\u212bcat", [1]),  # the Angstrom sign, decomposed and lower-cased: "acat"
        ("中文a", [14, 15, 5]),
        ("dog", [UNK]),
        ("", []),
        (" \t\r\n\u3000", []),
        ("c\x00a\ufffdt\u200b\ue000", [7]),  # NUL, controls and private use are deleted
        ("a\x0ba", [5, 6]),  # so is a vertical tab, which is no blank here
        ("a\u00a0a", [5, 5]),
        (b"c\xffa\xc3t\xe4\xb8", [7]),  # bytes that are not UTF-8
        ("[SEP]cat[MASK]", [SEP, 7, MASK]),
        ("[[SEP]]", [11, SEP, 12]),
        ("[sep]", [11, 10, 12]),
        (b"[SE\xffP]", [11, 10, 12]),
        ("[SE\ue000P]", [11, 10, 12]),  # no special token before the text is cleaned
        ("[SE\U0010ff01P] \U0010ff01", [11, 10, 12]),
        ("a" * 100, [5] + [6] * 99),
        ("a" * 101, [UNK]),
        ("ä" * 100 + " ä" + "\u0308" * 200, [5] + [6] * 99 + [5]),
        # NFD puts the mark of the lower combining class first.
        ("a\u08d4\U0001d165", [5, 16, 17]),
        ("a\U0001d165\u08d4", [5, 16, 17]),
        ("a\u08d4\u0301\U0001d165", [5, 16, 17]),  # across a mark that is deleted
        ("a\u08d4\u034f\U0001d165", [5, 17, 16]),  # but not across a joiner
        ("a\u08d4[SEP]\U0001d165", [5, 17, SEP, UNK]),
    ],
)
def test_ids(tokenizer, text, expected):
    assert ids(tokenizer, text) == expected
    # Neighbours in a batch, which may take another path through the graph, change nothing.
    batch = tokenizer([text, "é [CLS] \u08d4\U0001d165"], padding=False, max_length=400)
    assert batch["input_ids"].to_list()[0][1:-1] == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [7, 14, 15]),
        ({"do_lower_case": False}, [18, 14, 15]),
        ({"do_lower_case": False, "strip_accents": True}, [20, 14, 15]),
        ({"strip_accents": False}, [19, 14, 15]),
        ({"tokenize_chinese_chars": False}, [7, 21]),
    ],
)
def test_settings(settings, expected):
    assert ids(AlignTokenizer(VOCAB, **settings), "Cät 中文") == expected


def test_padding_and_truncation(tokenizer):
    texts = ["a cat cat cat", "a"]
    output = tokenizer(texts, padding="max_length", max_length=5)
    assert output["input_ids"].numpy().tolist() == [[CLS, 5, 7, 7, SEP], [CLS, 5, SEP, 0, 0]]
    assert output["attention_mask"].numpy().tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert output["token_type_ids"].numpy().tolist() == [[0] * 5] * 2
    assert all(value.dtype == tf.int32 for value in output.values())
    assert tokenizer(texts)["input_ids"].shape == (2, 64)
    assert tokenizer(texts, padding="longest")["input_ids"].shape == (2, 6)
    assert tokenizer(texts, padding=False)["input_ids"].to_list()[1] == [CLS, 5, SEP]
    whole = tokenizer(texts, padding="max_length", max_length=4, truncation=False)
    assert whole["input_ids"].shape == (2, 6)
    assert tokenizer([], padding=True)["input_ids"].shape == (0, 2)
    for array in (np.array(texts), np.array([text.encode() for text in texts])):
        assert tokenizer(array, padding=True)["input_ids"].numpy()[1, :3].tolist() == [CLS, 5, SEP]
    assert tokenizer(np.array("a"), padding=True)["input_ids"].shape == (1, 3)


def add(i: int, content: str, **flags: bool) -> AlignTokenizer:
    return AlignTokenizer(VOCAB, added_tokens_decoder={i: {"content": content, **flags}})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t("a", padding="both"), "padding='both': expected one of max_length"),
        (lambda t: t("a", max_length=1), "max_length=1: expected 2 or more"),
        (lambda t: t("a", max_length="64"), "max_length='64': expected 2 or more"),
        (lambda t: t("a", truncation="both"), "expected True or False"),
        (lambda t: t([3]), "expected strings, found int"),
        (lambda t: t(["a", None]), "expected strings, found NoneType"),
        (lambda t: t(None), "expected a string or a list of them, found NoneType"),
        (lambda t: t([["a", "b"]]), "expected strings, found list"),
        (lambda t: t({"a": 1}), "expected a string or a list of them, found dict"),
        (lambda t: t("\ud800"), "lone surrogate"),
        (lambda t: AlignTokenizer(["a"]), r"unk_token='\[UNK\]': not in the vocabulary"),
        (lambda t: add(5, "cat"), "the added token 'cat': id 5, expected 7"),
        (lambda t: add(3, "<x>"), "the added token '<x>': id 3, expected 22"),
        (lambda t: add(22, ""), "the added token '', id 22: expected some text"),
        (lambda t: add(22, "x", single_word=True), "'x': single_word=True, expected False"),
    ],
)
def test_errors(tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


def test_encode_inside_tf_data(tokenizer):
    texts = tf.data.Dataset.from_tensor_slices(["a cat", "a", "photo!"]).batch(2)
    first, last = texts.map(lambda rows: tokenizer.encode(rows, max_length=8))
    assert first["input_ids"].numpy().tolist() == [[CLS, 5, 7, SEP], [CLS, 5, SEP, PAD]]
    assert last["attention_mask"].numpy().tolist() == [[1, 1, 1, 1]]


# Those of the stock TensorFlow Serving images, in both versions of tf-text they are built with.
SERVED_TEXT_OPS = {"FastBertNormalize", "FastWordpieceTokenizeWithOffsets"}


def test_saved_model_of_the_tokenizer_alone(tmp_path):
    # As many words as align-base's vocabulary has, and of their length.
    words = [f"word{i:x}" if i % 5 else f"##word{i:x}" for i in range(30_522 - len(VOCAB))]
    function = tf.function(
        lambda texts: AlignTokenizer([*VOCAB, *words]).encode(texts, padding="max_length"),
        input_signature=[tf.TensorSpec([None], tf.string)],
    ).get_concrete_function()
    assert function.structured_outputs["input_ids"].shape.as_list() == [None, 64]
    assert not function.captured_inputs
    tf.saved_model.save(tf.Module(), str(tmp_path), signatures=function)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    saved = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    assert saved(tf.constant(["cat word1"]))["input_ids"][0, :5].numpy().tolist() == [
        *(CLS, 7, len(VOCAB) + 1, SEP, PAD)
    ]

    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    core = set(dir(tf.raw_ops))
    assert {node.op for node in nodes} - core - {
        f.signature.name for f in graph.library.function
    } == (SERVED_TEXT_OPS)


@pytest.mark.parametrize("kept", ["vocab.txt", "tokenizer.json"])
def test_files(tmp_path, kept):
    saved = AlignTokenizer(VOCAB, do_lower_case=False, strip_accents=True, model_max_length=32)
    saved.save_pretrained(tmp_path)
    other = {"vocab.txt", "tokenizer.json"} - {kept}
    (tmp_path / other.pop()).unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"never_split": None, "mask_token": {"content": "[MASK]", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = AlignTokenizer.from_pretrained(tmp_path)
    assert loaded.vocab == VOCAB
    assert (loaded.do_lower_case, loaded.strip_accents, loaded.model_max_length) == (
        False,
        True,
        32,
    )
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["never_split"] is None


def test_absent_and_absurd_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected vocab\.txt or tokenizer\.json"):
        AlignTokenizer.from_pretrained(tmp_path)
    AlignTokenizer(VOCAB).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 10**30}))
    assert AlignTokenizer.from_pretrained(tmp_path).model_max_length == 64


def test_a_setting_that_is_null_is_none_that_is_set(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "é", "e"]
    model = {"type": "WordPiece", "vocab": {word: i for i, word in enumerate(words)}}
    normalizer = {"type": "BertNormalizer", "lowercase": True, "strip_accents": None}
    written = json.dumps({"model": model, "normalizer": normalizer})
    (tmp_path / "tokenizer.json").write_text(written)
    assert AlignTokenizer.from_pretrained(tmp_path).encode("É") == [2, 6, 3]


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"[PAD]": 0, "a": 10**9}, "token 'a' has id 1000000000, expected the ids 0 to 1, each"),
        ({"[PAD]": 0, "a": -1}, "token 'a' has id -1, expected the ids 0 to 1, each once"),
        ({"[PAD]": 0, "a": 0}, "token 'a' has id 0, expected the ids 0 to 1, each once"),
        ({"[PAD]": 1, "a": 2}, r"token '\[PAD\]' has id 1, expected the ids 0 to 1, each once"),
        ({"[PAD]": 0, "a": "1"}, "token 'a' has id '1', expected a whole number"),
        ({"[PAD]": 0, "a": True}, "token 'a' has id True, expected a whole number"),
        ([["[PAD]", 0]], "expected a WordPiece model, found 'WordPiece'"),
    ],
)
def test_ids_of_a_vocabulary_follow_one_another(tmp_path, vocab, message):
    model = {"type": "WordPiece", "vocab": vocab}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {message}"):
        AlignTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": [], "normalizer": 5}'),
        ("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": {"a": 1e999}}}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1000000000": {"content": "x"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "x"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"22": {"content": 3}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [3]}'),
        ("tokenizer_config.json", '{"unk_token": {}}'),
        ("tokenizer_config.json", '{"unk_token": ["x"]}'),
        ("tokenizer_config.json", '{"do_lower_case": "no"}'),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("added_tokens.json", '{"x": 1e999}'),
        ("added_tokens.json", '{"x": 1000000000}'),
        ("special_tokens_map.json", '{"sep_token": 7}'),
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path, name, content):
    if name != "tokenizer.json":
        (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        AlignTokenizer.from_pretrained(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_repeated_and_blank_lines_of_a_vocabulary():
    tokenizer = AlignTokenizer([*VOCAB, "", "cat"])
    assert ids(tokenizer, "cat") == [len(VOCAB) + 1]


@pytest.fixture(scope="module")
def with_added_tokens() -> AlignTokenizer:
    added = {22: "<New>", 23: "<New><New>", 24: "New York", 25: "Ä!", 7: "cat"}
    return AlignTokenizer(
        VOCAB,
        added_tokens_decoder={
            i: {"content": token, "normalized": i in (24, 25), "special": i == 22}
            for i, token in added.items()
        },
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a<New>a", [5, 22, 5]),
        ("<New><New><New>", [23, 22]),  # the longest, from the left
        ("<new>", [UNK, UNK, UNK]),  # found in the text as it is
        ("NEW YORKs New\tYork new  york", [24, UNK, 24, UNK, UNK]),  # in normalized text
        ("aa\u0308! ä!", [5, 25, 25]),
        ("xcaty", [UNK, 7, UNK]),  # inside a word
    ],
)
def test_added_tokens(with_added_tokens, text, expected):
    assert ids(with_added_tokens, text) == expected


def test_added_tokens_in_files(with_added_tokens, tmp_path):
    with_added_tokens.save_pretrained(tmp_path)
    again = AlignTokenizer.from_pretrained(tmp_path)
    assert again.added_tokens_decoder == with_added_tokens.added_tokens_decoder
    assert len(again) == 26 and again.vocab_size == 22
    assert again.convert_tokens_to_ids(["<New>", "New York"]) == [22, 24]
    assert again.decode([22, 24, 5], skip_special_tokens=True) == "New York a"
    # Files of older versions list them elsewhere.
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"additional_special_tokens": ["<New>"]}))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"New York": 22}))
    old = AlignTokenizer.from_pretrained(tmp_path)
    assert ids(old, "<New> new york") == [23, 22]
    config.write_text(json.dumps({"added_tokens_decoder": {"22": "New York"}}))
    with pytest.raises(ValueError, match="the added tokens are not in the form of an id"):
        AlignTokenizer.from_pretrained(tmp_path)
    config.write_text(json.dumps({"padding_side": "left"}))
    with pytest.raises(ValueError, match="padding_side='left', expected 'right'"):
        AlignTokenizer.from_pretrained(tmp_path)


def mutated(rng: np.random.Generator, text: bytes) -> bytes:
    """Cuts, repeats, swaps and overwrites parts of a text."""
    for _ in range(rng.integers(1, 5)):
        first, last = sorted(rng.integers(0, len(text) + 1, 2))
        part = text[first:last]
        put = [b"", part * 2, part[::-1], rng.bytes(len(part) % 9), b"[SEP]", b"\x00"]
        text = (text[:first] + put[rng.integers(len(put))] + text[last:])[:4000]
    return text


def test_random_and_mutated_bytes(tokenizer):
    rng = np.random.default_rng(0)
    seeds = ["a cat [SEP] photo!", "中文 Cät\u0301\u08d4\U0001d165", "[MASK]" * 9, "s" * 150]
    texts = [rng.bytes(rng.integers(0, 200)) for _ in range(1500)]
    texts += [mutated(rng, seeds[i % 4].encode()) for i in range(3000)]
    rows = tokenizer(texts, padding=False, max_length=64)["input_ids"].to_list()
    assert all(r[0] == CLS and r[-1] == SEP and len(r) <= 64 for r in rows)
    assert all(0 <= i < len(VOCAB) for r in rows for i in r)
    # What Python reads in their place gives the same, and neighbours change nothing.
    read = [text.decode("utf-8", "replace") for text in texts]
    assert tokenizer(read, padding=False, max_length=64)["input_ids"].to_list() == rows
    assert [ids_of[1:-1] for ids_of in rows[::150]] == [
        row[:62] for row in (ids(tokenizer, text) for text in texts[::150])
    ]


@pytest.mark.parametrize(
    "unit", ["z", "a ", "[CLS]", "é", "中", "\u0301", "a\u08d4\U0001d165", b"\xff"]
)
def test_a_megabyte(tokenizer, unit):
    unit = unit if isinstance(unit, bytes) else unit.encode()
    output = tokenizer.encode(tf.constant([unit * (1_000_000 // len(unit)), "cat"]))
    assert output["input_ids"].shape[1] <= 64
    assert output["input_ids"][1, :3].numpy().tolist() == [CLS, 7, SEP]


def test_decode(tokenizer):
    sequence = [CLS, 5, 7, 8, 13, SEP, PAD]
    assert tokenizer.decode(sequence) == "[CLS] a cats! [SEP] [PAD]"
    assert tokenizer.decode(sequence, skip_special_tokens=True) == "a cats!"
    assert tokenizer.batch_decode([[9], [5, 9]]) == ["photo", "a photo"]
    assert tokenizer.convert_ids_to_tokens([7, 8]) == ["cat", "##s"]
    assert tokenizer.convert_tokens_to_ids(["cat", "dog"]) == [7, UNK]
    assert tokenizer.vocab_size == len(tokenizer) == len(VOCAB)
