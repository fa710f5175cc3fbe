"""webdataset shards and TFRecord files as people have them, and those that are bombs."""

import gzip
import io
import subprocess
import sys
import tarfile

import pytest
import tensorflow as tf

from align_tf import terminal
from align_tf.data import records

IMAGE = b"an image"
MEGABYTES = 160
KNOWN = {"a.png": IMAGE, "a.txt": b"a cat"}


@pytest.fixture(autouse=True)
def said_anew():
    terminal.say_once.cache_clear()


def header(name, size, kind=tarfile.REGTYPE, sparse=None):
    """A member's header; `sparse` is the size that a member claims which holds nothing."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if sparse is not None:
        block[483:495] = b"%011o\0" % sparse
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, content):
    return header(name, len(content)) + content + bytes(-len(content) % 512)


def write(path, blocks, end=bytes(1024)):
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
        for block in (*blocks, end):
            file.write(block)
    return path


def read(source):
    return [
        (record["key"].decode(), record["image_bytes"], [c.decode() for c in record["captions"]])
        for record in records(source).as_numpy_iterator()
    ]


def members(found):
    return [member(name, content) for name, content in found.items()]


def test_members_that_lie_apart_are_refused_with_what_sorts_them(tmp_path):
    names = ["a.png", "b.png", "a.txt", "b.txt"]
    path = write(tmp_path / "it's.tar", [member(name, IMAGE) for name in names])
    with pytest.raises(ValueError, match="the files of a do not lie side by side") as error:
        records(path)
    command = str(error.value).partition("to sort them: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert [key for key, *_ in read(tmp_path / "sorted.tar")] == ["a", "b"]


def test_keys_end_at_the_first_dot_and_what_falls_out_is_counted(tmp_path, capsys):
    found = {"x/a.png": IMAGE, "x/a.txt": b"a cat", "x/b.v1.png": IMAGE, "x/b.v2.png": IMAGE}
    found |= {"x/c.d.txt": b"x", "x/e.heic": b"x", "x/._a.png": b"x", "__MACOSX/x/a.png": IMAGE}
    path = write(tmp_path / "a.tar", members(found))
    assert read(path) == [("x/a", IMAGE, ["a cat"])]
    assert capsys.readouterr().err == (
        f"{path}: left out files of kinds that are not read: .heic (1)\n"
        f"{path}: left out 2 images with a dot before the last one, such as x/b.v1.png: "
        "in webdataset a key ends at the first dot\n"
    )
    found = records(path, image_key="v2.png").as_numpy_iterator()
    assert [(record["key"], record["image_bytes"]) for record in found][1] == (b"x/b", IMAGE)


def test_names_and_captions_that_are_not_utf8(tmp_path, capsys):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="latin-1") as tar:
        for name, content in (("café.png", IMAGE), ("café.txt", "un café".encode("latin-1"))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path, encoding="ascii", errors="surrogateescape") as tar:
        assert tar.getnames()[0].startswith("caf")
    assert read(path) == [("café", IMAGE, ["un café"])]
    assert capsys.readouterr().err == (f"{path}: not UTF-8, so read as Windows-1252: café.txt\n")


BOMBS = {
    "sparse.tar": [header("bomb.png", 0, tarfile.GNUTYPE_SPARSE, MEGABYTES << 20)],
    "large.tar.gz": [header("bomb.png", MEGABYTES << 20), *[bytes(1 << 20)] * MEGABYTES],
    "caption.tar.gz": [
        *[member("bomb.png", IMAGE), header("bomb.txt", MEGABYTES << 20)],
        *[bytes(1 << 20)] * MEGABYTES,
    ],
}
READ = """
import resource, sys
from align_tf.data import records
[*records(sys.argv[1])]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = [record["key"].numpy().decode() for record in records(sys.argv[2])]
print(found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


def test_bombs_cost_their_record_alone(tmp_path):
    for name, blocks in BOMBS.items():
        path = write(tmp_path / name, [*blocks, *members(KNOWN)])
        bomb, other = read(path)
        assert other == ("a", IMAGE, ["a cat"])
        assert bomb == ("bomb", IMAGE if "caption" in name else b"", [])


@pytest.mark.slow  # each starts TensorFlow
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little_memory(tmp_path, name):
    path = write(tmp_path / name, [*BOMBS[name], *members(KNOWN)])
    known = write(tmp_path / "known.tar", members(KNOWN))
    arguments = [sys.executable, "-c", READ, str(known), str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    found, megabytes = done.stdout.rsplit(maxsplit=1)
    assert found == "['bomb', 'a']" and int(megabytes) < MEGABYTES // 4


@pytest.mark.parametrize(
    "broken",
    [
        header("x", MEGABYTES << 20, tarfile.XHDTYPE),
        header("x", MEGABYTES << 20, tarfile.GNUTYPE_LONGNAME),
        b"not a header at all".ljust(512, b"?"),
    ],
)
def test_a_broken_header_costs_what_lies_behind_it(tmp_path, broken):
    path = write(tmp_path / "a.tar.gz", [*members(KNOWN), broken, bytes(512)])
    assert read(path) == [("a", IMAGE, ["a cat"]), (f"{path}, lost record 1", b"", [])]


def test_a_record_that_is_no_example_costs_itself_alone(tmp_path):
    def example(**features):
        features = {
            name: tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
            for name, values in features.items()
        }
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()

    path = tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"\xff\xff no example")
        writer.write(example(key=[b"a"], jpg=[IMAGE], txt=[b"a cat"]))
        writer.write(example(key=[b"two"], jpg=[IMAGE, IMAGE], txt=[b"a cat"]))
        writer.write(example(key=[b"b"], jpg=[IMAGE]))
    assert read(path) == [
        ("a", IMAGE, ["a cat"]),
        ("b", IMAGE, []),
        *((f"{path}, lost record {number}", b"", []) for number in (1, 2)),
    ]


def test_broken_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not parquet at all PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: not a whole Parquet file: "):
        records(path)
    table = pyarrow.table({"jpg": [bytes([n]) * 1000 for n in range(64)], "txt": ["x"] * 64})
    pyarrow.parquet.write_table(table, path, row_group_size=32, compression="none")
    content = bytearray(path.read_bytes())
    at = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(content)
    found = read(path)
    assert len(found) == 64 and found[31][1] == bytes([31]) * 1000
    assert found[32] == (f"{path}, lost record 1", b"", [])
