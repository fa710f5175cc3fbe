"""The ground floor: where a path may lie, and text as people have it."""

import os
import pathlib

import pytest

from align_tf import AlignTokenizer, files
from align_tf.data import records, write_tfrecords
from align_tf.training import Recipe, train


def recipe(**settings):
    return Recipe(
        **{
            "preset": "align-mini",
            "data": "x",
            "output": "y",
            "epochs": 1,
            "processor": "align-tiny",
            **settings,
        }
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda path: files.check_writable(path),
        lambda path: records(path),
        lambda path: records(["a.png", path]),
        lambda path: write_tfrecords([], path),
        lambda path: AlignTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]).save_pretrained(
            path
        ),
        lambda path: train(recipe(output=path)),
        lambda path: train(recipe(data=path)),
    ],
)
def test_addresses_of_other_kinds_are_refused_before_anything_is_made(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"^ftp://bucket/x: not an address that is read or writ"):
        call("ftp://bucket/x")
    assert os.listdir(tmp_path) == ["a.png"]


def test_what_stays_on_this_machine_refuses_addresses():
    with pytest.raises(ValueError, match=r"^gs://bucket/x: remote folders are not supported here"):
        files.check_local("gs://bucket/x")


@pytest.mark.parametrize("path", ["a/b", "C:/a", "C:\\a", "a:b/c", "./gs://x", "x/gs://y", "12:/x"])
def test_local_paths(path):
    files.check_local(path)
    files.check_local(pathlib.Path("/") / path)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfcat\n\ndog\n")
    assert files.read_lines(tmp_path / "a") == ["cat", "dog"]
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "a") == {"a": 1}


def test_json_that_is_nested_too_deep_is_no_json(tmp_path):
    (tmp_path / "a").write_text("[" * 100_000)
    with pytest.raises(files.CheckpointError, match="a: not valid JSON: maximum recursion depth"):
        files.read_json(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("caf\u00e9 \U0001f600", "caf\u00e9 \U0001f600"),
        (os.fsdecode(b"caf\xe9 \x80\x81"), "caf\u00e9 \u20ac\ufffd"),
        ("cut \ud83d off", "cut  off"),
    ],
)
def test_a_readable_text_is_one_that_can_be_written(text, expected):
    assert files.readable(text) == expected


def test_a_file_where_a_folder_is_to_be_is_told(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError, match=f"{tmp_path}/file: a file; expected a folder$"):
        files.write_text(tmp_path / "file" / "new", "text")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    files.check_writable(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
    assert os.read(reading, 10) == b"text"
    os.close(reading)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_what_a_shell_has_opened_is_written_to_and_stays(tmp_path):
    with open(tmp_path / "log", "w") as log:
        path = pathlib.Path(f"/dev/fd/{log.fileno()}")
        files.check_writable(path)
        files.write_text(path, "text")
    assert (tmp_path / "log").read_text() == "text"
