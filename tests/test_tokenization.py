"""Text to ids: each rule of the tokenizer on its own, with the ids it gives."""

import json

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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t("a", padding="both"), "padding='both': expected one of max_length"),
        (lambda t: t("a", max_length=1), "max_length=1: expected 2 or more"),
        (lambda t: t([3]), "expected strings, found int"),
        (lambda t: t("\ud800"), "lone surrogate"),
        (lambda t: AlignTokenizer(["a"]), r"unk_token='\[UNK\]': not in the vocabulary"),
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


def test_encode_is_constants_and_operations_alone(tokenizer):
    function = tf.function(
        lambda texts: tokenizer.encode(texts, padding="max_length")["input_ids"],
        input_signature=[tf.TensorSpec([None], tf.string)],
    ).get_concrete_function()
    assert not function.captured_inputs
    assert len(function.graph.as_graph_def().SerializeToString()) < 8 << 20


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


def test_repeated_and_blank_lines_of_a_vocabulary():
    tokenizer = AlignTokenizer([*VOCAB, "", "cat"])
    assert ids(tokenizer, "cat") == [len(VOCAB) + 1]


def test_decode(tokenizer):
    sequence = [CLS, 5, 7, 8, 13, SEP, PAD]
    assert tokenizer.decode(sequence) == "[CLS] a cats! [SEP] [PAD]"
    assert tokenizer.decode(sequence, skip_special_tokens=True) == "a cats!"
    assert tokenizer.batch_decode([[9], [5, 9]]) == ["photo", "a photo"]
    assert tokenizer.convert_ids_to_tokens([7, 8]) == ["cat", "##s"]
    assert tokenizer.convert_tokens_to_ids(["cat", "dog"]) == [7, UNK]
    assert tokenizer.vocab_size == len(tokenizer) == len(VOCAB)
