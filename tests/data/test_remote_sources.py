"""Sources at addresses give the records of the same files on this machine; counts are kept."""

import json
import threading

import fsspec
import pytest
import upath
from test_dataset import (
    write_folder,
    write_hugging_face_parquet,
    write_inline_parquet,
    write_table,
    write_tar,
    write_tfrecord,
)

from align_tf import addresses, terminal
from align_tf.data import counting, records, streams, write_tfrecords
from align_tf.data.folders import pictures
from align_tf.data.readers import list_files, open_source

ADDRESS = "memory://bucket/pairs"

KINDS = {
    "folder": ("", lambda path: write_folder(path)),
    "shards": ("", lambda path: [write_tar(path / f"{n}.tar") for n in range(2)]),
    "tar.gz": ("0.tar.gz", lambda path: write_tar(path / "0.tar.gz")),
    "braces": (
        "{0..1}.tfrecord",
        lambda path: [write_tfrecord(path / f"{n}.tfrecord") for n in (0, 1)],
    ),
    "glob": ("*.gz", lambda path: write_tfrecord(path / "0.tfrecord.gz")),
    "table": ("a.tsv", lambda path: write_table(path / "a.tsv")),
    "parquet": ("a.parquet", lambda path: write_table(path / "a.parquet")),
    "images in a table": ("", lambda path: write_inline_parquet(path / "a.parquet")),
    "structs": ("", lambda path: write_hugging_face_parquet(path / "a.parquet")),
}


@pytest.fixture(autouse=True)
def bucket():
    """A bucket in memory, empty before and after."""
    bucket = fsspec.filesystem("memory")
    bucket.store.clear()
    counting._of_this_process.clear()
    yield bucket
    bucket.store.clear()


def send(folder, bucket):
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.pipe_file(f"/bucket/pairs/{file.relative_to(folder)}", file.read_bytes())


def read(source):
    return [
        (record["key"], record["image_bytes"], record["captions"].tolist())
        for record in records(source).as_numpy_iterator()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_address_gives_the_records_of_the_files(tmp_path, bucket, kind):
    name, write = KINDS[kind]
    write(tmp_path)
    send(tmp_path, bucket)
    expected = read(f"{tmp_path}/{name}" if name else tmp_path)
    assert len(expected) >= 10
    assert read(f"{ADDRESS}/{name}") == read(upath.UPath(f"{ADDRESS}/{name}")) == expected
    if name and "." in name and "*" not in name and "{" not in name:
        assert read([f"{ADDRESS}/{name}"]) == expected


def test_a_table_on_this_machine_may_name_addresses(tmp_path, bucket):
    write_table(tmp_path / "there" / "a.csv")
    expected = read(tmp_path / "there" / "a.csv")
    bucket.pipe_file("/bucket/ant.png", (tmp_path / "there/part0/ant.png").read_bytes())
    (tmp_path / "a.jsonl").write_text(
        '{"path": "memory://bucket/ant.png", "caption": "ant"}\n'
        '{"path": "there/part0/bee.png", "caption": "bee"}\n'
        '{"path": "memory://bucket/gone.png", "caption": "gone"}\n'
        '{"path": "gone.png", "caption": "gone"}\n'
    )
    assert [image for _, image, _ in read(tmp_path / "a.jsonl")] == [
        *(image for _, image, _ in expected[:2]),
        b"",
        b"",
    ]


def test_a_folder_that_is_spelled_with_a_slash_has_the_same_images(bucket):
    """As a client spells a whole bucket."""
    for name in ("a.png", "b/c.png", "b/.d/e.png"):
        bucket.pipe_file(f"/bucket/pairs/{name}", b"")
    found = [image for image, _ in pictures(f"{ADDRESS}/")]
    assert found == [f"{ADDRESS}/a.png", f"{ADDRESS}/b/c.png"]
    assert [image for image, _ in pictures("memory://")] == [
        "memory://bucket/pairs/a.png",
        "memory://bucket/pairs/b/c.png",
    ]


@pytest.mark.parametrize(("suffix", "write"), [("tar", write_tar), ("tfrecord", write_tfrecord)])
def test_the_next_shard_is_fetched_while_one_is_read(tmp_path, bucket, monkeypatch, suffix, write):
    for number in range(3):
        write(tmp_path / f"{number}.{suffix}")
    send(tmp_path, bucket)
    opened, fetch = open_source(ADDRESS), addresses._fetch
    fetched, second = [], threading.Event()

    def note(path, target):
        fetched.append(path.name)
        if len(fetched) == 2:
            second.set()
        fetch(path, target)

    monkeypatch.setattr(addresses, "_fetch", note)
    elements = iter(opened.elements(None))  # which fetches as long as it lives
    next(elements)
    assert second.wait(60)
    assert len(set(fetched)) > 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (ADDRESS, r"^memory://bucket/pairs: no such file or folder; expected a folder of"),
        (
            f"{ADDRESS}/{{0..3}}.tar",
            r"2 of its files are not there, such as memory://bucket/pairs/2",
        ),
        (f"{ADDRESS}/x/*.tar", r"^memory://bucket/pairs/x/\*.tar: no such file or folder"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, bucket, source, expected):
    if "{" in source:
        for number in range(2):
            write_tar(tmp_path / f"{number}.tar")
        send(tmp_path, bucket)
    with pytest.raises(FileNotFoundError, match=expected):
        records(source)


def test_a_listing_of_addresses_tells_other_contents(tmp_path, bucket):
    write_table(tmp_path / "a.tsv")
    send(tmp_path, bucket)
    before = list_files(f"{ADDRESS}/a.tsv")
    bucket.pipe_file("/bucket/pairs/part0/bee.png", b"x" * before.sizes[2])
    del bucket.store["/bucket/pairs/part0/ant.png"]
    changes = before.changes(list_files(f"{ADDRESS}/a.tsv"), ADDRESS)
    assert changes == "part0/ant.png gone, part0/bee.png replaced"


def test_pairs_are_written_to_an_address(bucket):
    files = write_tfrecords([(b"one", "a"), (b"two", ["b", "c"])], ADDRESS, pairs_per_file=1)
    assert list(map(str, files)) == [f"{ADDRESS}/00000.tfrecord", f"{ADDRESS}/00001.tfrecord"]
    assert read(ADDRESS) == [(b"000000000", b"one", [b"a"]), (b"000000001", b"two", [b"b", b"c"])]
    with pytest.raises(FileExistsError, match=r"^memory://bucket/pairs: not empty"):
        write_tfrecords([(b"one", "a")], ADDRESS)


# --- counts ----------------------------------------------------------------------------------


@pytest.fixture
def walked(monkeypatch):
    """The shards that are read through, in order of their names."""
    walked = []

    def noting(walk):
        def note(file, **options):
            walked.append(file.name)
            return walk(file, **options)

        return note

    monkeypatch.setattr(streams, "count_tar", noting(streams.count_tar))
    monkeypatch.setattr(streams, "_count_tfrecord", noting(streams._count_tfrecord))
    return walked


@pytest.mark.parametrize(("suffix", "write"), [("tar", write_tar), ("tfrecord", write_tfrecord)])
@pytest.mark.parametrize("remote", [False, True])
def test_each_shard_is_read_through_once(tmp_path, bucket, walked, suffix, write, remote):
    data, index = tmp_path / "data", tmp_path / "counts.json"
    data.mkdir()
    names = [f"{number}.{suffix}" for number in range(3)]
    for name in names:
        write(data / name)
    source = data
    if remote:
        send(data, bucket)
        source = ADDRESS
    for _ in range(2):
        assert open_source(source, index=index).count == 30
    assert sorted(walked) == names

    counting._of_this_process.clear()  # as a process that goes on
    assert open_source(source, index=index).count == 30
    assert open_source(source).count == 30  # as `make_dataset` opens it after that
    assert len(walked) == 3
    assert sorted(json.loads(index.read_text())) == [f"{source}/{name}" for name in names]

    changed = write(data / names[1], [("new", b"an image", ["a caption"])])
    bucket.pipe_file(f"/bucket/pairs/{names[1]}", changed.read_bytes())
    for _ in range(2):
        assert open_source(source, index=index).count == 21
        counting._of_this_process.clear()
    assert walked[3:] == [names[1]]


@pytest.mark.parametrize("content", ["", "[]", '{"0.tar": 1}', '{"0.tar": [[1], [1, "x", 2, []]]}'])
def test_counts_that_are_broken_are_made_anew(tmp_path, walked, content):
    write_tar(tmp_path / "0.tar")
    (tmp_path / "counts.json").write_text(content)
    assert open_source(tmp_path / "0.tar", index=tmp_path / "counts.json").count == 10
    assert walked == ["0.tar"]


def test_what_was_left_out_is_told_of_counts_that_were_kept_too(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("a.b", b"an image", ["a"]), ("c", b"an image", ["c"])])
    said = []
    for _ in range(2):
        terminal.say_once.cache_clear()
        counting._of_this_process.clear()
        open_source(tmp_path / "0.tar", index=tmp_path / "counts.json")
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and "left out 1 images with a dot" in said[0]
