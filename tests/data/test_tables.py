"""Tables and captions as people have them: quotes, encodings, broken and absurd rows."""

import json
import os

import pytest

from align_tf import terminal
from align_tf.data.readers import list_files
from align_tf.data.sources import Keys, read_captions
from align_tf.data.tables import image_rows

KEYS = Keys(None, None, True)
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def said_anew():
    terminal.say_once.cache_clear()


@pytest.fixture
def rows(tmp_path):
    """Reads a table: the path, relative to its folder, and the captions of each row."""

    def read(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        found = image_rows(file, KEYS)
        return [(os.path.relpath(path, tmp_path), captions) for _, path, captions in found]

    return read


def test_a_tsv_has_no_quotes(rows):
    text = 'path\tcaption\na.png\t"Hello\nb.png\ta "red" fox\nc.png\t5" pipe\n'
    expected = [("a.png", ['"Hello']), ("b.png", ['a "red" fox']), ("c.png", ['5" pipe'])]
    assert rows("a.tsv", text) == expected


def test_quotes_of_a_csv(rows):
    text = 'path,caption\na.png,"a ""red"" fox,\nand a cat"\n\nb.png,5" pipe\nc.png\nd.png,e,\n'
    assert rows("a.csv", text) == [
        ("a.png", ['a "red" fox,\nand a cat']),
        ("b.png", ['5" pipe']),
        ("c.png", []),
        ("d.png", ["e"]),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'path,caption\na.png,x\nb.png,"Hello\nc.png,y\n', "line 3: quotes that do not"),
        ("a.csv", 'path,caption\nb.png,"Hello" he said\n', "line 2: quotes that do not pair up"),
        ("a.csv", "path,caption\na.png,a cat, sitting\n", "line 2: 3 values, expected 2: path, ca"),
        ("a.tsv", "path\tcaption\na.png\tx\ty\n", "line 2: 3 values, expected 2: path, caption"),
        ("a.jsonl", '{"path": "a", "caption": "b"}\n\n[1]\n', "line 3: expected a JSON object, fo"),
        ("a.jsonl", "5\n", "line 1: expected a JSON object, found int"),
        ("a.jsonl", '{"path": "a", "caption": "b"}\n{"path": 3}\n', "line 2: expected a path in c"),
        ("a.jsonl", '{"path": "a", "caption": "b"}\n{"path": \n', "line 2: not valid JSON"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_line(rows, name, content, message):
    with pytest.raises(ValueError, match=rf"{name}, {message}"):
        rows(name, content)


def test_blank_lines_and_a_row_nested_too_deep(rows, tmp_path):
    lines = [DEEP, "", '{"path": "a.png", "caption": "x"}', "  ", '{"path": "b", "caption": "y"}']
    lost = ("a.jsonl, line 1", [])
    assert rows("a.jsonl", "\n".join(lines)) == [lost, ("a.png", ["x"]), ("b", ["y"])]
    assert len(list_files(tmp_path / "a.jsonl").paths) == 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_tables(rows, encoding, capsys):
    text = "path\tcaption\ncafé.png\tun café\n"
    assert rows("a.tsv", text.encode(encoding)) == [("café.png", ["un café"])]
    text = json.dumps({"path": "café.png", "caption": "un café"}, ensure_ascii=False)
    assert rows("a.jsonl", text.encode(encoding)) == [("café.png", ["un café"])]
    assert capsys.readouterr().err == ""


def test_what_is_not_utf8_is_read_as_windows_1252(rows, tmp_path, capsys):
    text = "path,caption\na.png,un caf\xe9 \x80 3\nb.png,a caf\xe9\n".encode("latin-1")
    text += "c.png,a café\n".encode()
    expected = [("a.png", ["un café € 3"]), ("b.png", ["a café"]), ("c.png", ["a café"])]
    assert rows("a.csv", text) == expected
    said = capsys.readouterr().err
    assert said == f"{tmp_path}/a.csv: not UTF-8, so read as Windows-1252: line 2 and 1 more\n"


def test_half_an_emoji_and_names_that_no_file_can_have(rows, tmp_path):
    (tmp_path / "a.png").touch()
    text = r'{"path": "a\ud83d.png", "caption": "a cat \ud83d"}' "\n"
    text += r'{"path": "a.png\u0000.png", "caption": "b"}'
    half, nul = rows("a.jsonl", text)
    assert half == (r"a\ud83d.png", ["a cat"])
    assert nul == (r"a.png\0.png", ["b"])
    assert list(list_files(tmp_path / "a.jsonl").sizes)[1:] == [-1, -1]


def test_a_caption_of_a_megabyte(rows):
    caption = "a cat " * 180_000
    expected = [("a.png", [caption.strip()]), ("b.png", ["c"])]
    assert rows("a.csv", f"path,caption\na.png,{caption}\nb.png,c\n") == expected


@pytest.mark.parametrize(
    ("name", "content", "expected", "is_foreign"),
    [
        ("a.txt", b"\xef\xbb\xbfa cat\r\n", ["a cat"], False),
        ("a.txt", "a café".encode("utf-16"), ["a café"], False),
        ("a.txt", b"un caf\xe9", ["un café"], True),
        ("a.txt", "un café et ".encode() + b"\xc3", ["un café et Ã"], True),
        ("a.json", b'\xef\xbb\xbf{"caption": "a cat"}', ["a cat"], False),
        ("a.json", b'{"caption": ["un caf\xe9", 3]}', ["un café"], True),
        ("a.json", rb'["a \ud83d", "\ud83d\ude00"]', ["a", "😀"], False),
        ("a.json", DEEP.encode(), [], False),
        ("a.json", b"5", [], False),
    ],
)
def test_caption_files(name, content, expected, is_foreign):
    foreign = []
    assert read_captions(name, content, None, foreign) == expected
    assert foreign == ([name] if is_foreign else [])
