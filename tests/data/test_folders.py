"""The folders that people have: hidden files, links, odd names, what lies beside the pictures."""

import io
import os
import tarfile

import pytest
from PIL import Image

from align_tf import terminal
from align_tf.cli.pictures import find_pictures
from align_tf.data import records
from align_tf.data.patterns import matching
from align_tf.evaluation.tasks import class_folders, class_labels

CAFE = os.fsdecode(b"caf\xe9")


@pytest.fixture(autouse=True)
def said_anew():
    terminal.say_once.cache_clear()


def write(path, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    path.write_bytes(file.getvalue())
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)


def keys(source):
    return [record["key"].decode() for record in records(source).as_numpy_iterator()]


@pytest.fixture
def classes(tmp_path):
    """Two classes, a third that is linked, a loop, and what systems leave in folders."""
    for name in ("cat/0", "cat/deep/1", "dog/2"):
        write(tmp_path / "classes" / f"{name}.png", b"a picture")
    for name in (".ipynb_checkpoints/0", "__MACOSX/cat/0", "cat/.hidden/0", "cat/@eaDir/0"):
        write(tmp_path / "classes" / f"{name}.png", b"a picture")
    for name in ("._0.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / "classes" / "cat" / name).write_bytes(b"x")
    write(tmp_path / "elsewhere" / "3.png", b"a picture")
    (tmp_path / "classes" / "fox").symlink_to("../elsewhere")
    (tmp_path / "classes" / "cat" / "loop").symlink_to("..")
    (tmp_path / "classes" / "dog" / "itself").symlink_to("itself")
    return tmp_path / "classes"


def test_hidden_files_are_none_and_links_are_followed(classes):
    paths = ["cat/0.png", "cat/deep/1.png", "dog/2.png", "fox/3.png"]
    assert keys(classes) == [path.removesuffix(".png") for path in paths]
    assert find_pictures([str(classes)]) == [str(classes / path) for path in paths]
    found = {name: [file.name for file in files] for name, files in class_folders(classes).items()}
    assert found == {"cat": ["0.png", "1.png"], "dog": ["2.png"], "fox": ["3.png"]}


def test_a_folder_that_is_itself_hidden_is_read(classes):
    assert keys(classes / ".ipynb_checkpoints") == ["0"]


def test_a_name_that_is_not_utf8_is_read_and_told(tmp_path, capsys):
    write(tmp_path / "classes" / CAFE / f"{CAFE}.png", b"a picture")
    assert keys(tmp_path) == ["classes/café/café"]
    record = next(records(tmp_path).as_numpy_iterator())
    assert record["image_bytes"].startswith(b"\x89PNG") and len(record["captions"]) == 1
    assert class_labels(None, list(class_folders(tmp_path / "classes"))) == {CAFE: "café"}
    (tmp_path / f"{CAFE}.tsv").write_bytes(b"path\tcaption\nclasses/caf\xe9/caf\xe9.png\ta\n")
    record = next(records(tmp_path / f"{CAFE}.tsv").as_numpy_iterator())
    assert record["image_bytes"].startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["download.tar.gz", "metadata.csv", "a.tfrecord"])
def test_an_archive_beside_images_does_not_hide_them(tmp_path, capsys, name):
    write(tmp_path / "a.png", b"a picture")
    (tmp_path / name).touch()
    assert keys(tmp_path) == ["a"]
    assert capsys.readouterr().err == (
        f"{tmp_path}: its images are read; beside them, not read unless named: {name}\n"
    )


def test_shards_of_two_kinds_in_a_folder_are_refused(tmp_path):
    tarfile.open(tmp_path / "a.tar", "w").close()
    (tmp_path / "a.tfrecord").touch()
    with pytest.raises(ValueError, match="expected one kind of file, found tar, tfrecord; name"):
        records(tmp_path)


def test_kinds_that_are_not_read_are_counted_in_a_line(tmp_path, capsys):
    write(tmp_path / "a.png", b"a picture")
    for name in ("b.heic", "deep/c.HEIC", "d.tif", "e.avif", ".f.heic", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = f"{tmp_path}: left out files of kinds that are not read: .heic (2)"
    for read in (keys, lambda folder: find_pictures([str(folder)])):
        terminal.say_once.cache_clear()
        read(tmp_path)
        assert expected in capsys.readouterr().err.splitlines()[-1]


# --- patterns ---------------------------------------------------------------------------------


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("00.tar", "01.tar", "02.tar", "a.txt", "{x}.txt", ".hidden.tar"):
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{00..02}.tar", ["00.tar", "01.tar", "02.tar"]),
        ("{02..00}.tar", ["02.tar", "01.tar", "00.tar"]),
        ("{00,02}.tar", ["00.tar", "02.tar"]),
        ("0{0..2}.{tar,tar}", ["00.tar", "00.tar", "01.tar", "01.tar", "02.tar", "02.tar"]),
        ("*.{md,txt,tar}", ["a.txt", "{x}.txt", "00.tar", "01.tar", "02.tar"]),
        ("{x}.txt", ["{x}.txt"]),
        ("{y}.txt", []),
        ("none{0..3}.tar", []),
    ],
)
def test_patterns(names, pattern, expected):
    assert matching(pattern) == expected


def test_a_pattern_that_names_too_much_is_refused(names):
    message = r"{00\.\.10}\.tar: 8 of its files are not there, such as 03\.tar"
    with pytest.raises(FileNotFoundError, match=message):
        matching("{00..10}.tar")
    with pytest.raises(ValueError, match=r"{0\.\.999999999} is more than 1,000,000 names"):
        matching("{0..999999999}.tar")
