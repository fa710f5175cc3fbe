"""Addresses: what is read and written there, what is missing told in one line."""

import importlib.util
import subprocess
import sys

import fsspec
import keras
import numpy as np
import pytest
import upath

from align_tf import AlignModel, AlignProcessor, addresses, hub
from align_tf.cli.main import main
from align_tf.data import counting
from align_tf.data.label_files import is_file_of_labels, read_labels
from align_tf.data.listing import Listing
from align_tf.evaluation.tasks import read_templates
from align_tf.export.convert import convert
from align_tf.files import write_text
from align_tf.training import Recipe, read_recipe, trackers
from align_tf.training.validation import Best

ADDRESS, ADAPTER = "memory://bucket/align", "memory://bucket/adapter"


@pytest.fixture(autouse=True)
def bucket():
    """A bucket in memory, empty before and after."""
    bucket = fsspec.filesystem("memory")
    bucket.store.clear()
    yield bucket
    bucket.store.clear()


def test_a_checkpoint_goes_to_an_address_and_comes_back(bucket, model, processor):
    model.save_pretrained(ADDRESS)
    processor.save_pretrained(upath.UPath(ADDRESS))
    bucket.pipe_file("/bucket/align/checkpoint-1/model.safetensors", b"of another step")
    found = AlignModel.from_pretrained(upath.UPath(ADDRESS))
    for ours, theirs in zip(model.weights, found.weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))
    again = AlignProcessor.from_pretrained("memory:/bucket/align/")  # as pathlib spells it
    assert again.tokenizer.vocab == processor.tokenizer.vocab
    assert hub.is_available(ADDRESS) and not hub.is_available("memory://bucket/other")


def test_a_conversion_goes_to_an_address(bucket, checkpoint, capsys):
    command = ["convert", "--from", str(checkpoint), "--to", "hf", "--output", ADDRESS]
    assert main(command) == 0
    assert f"to          {ADDRESS} (hf)" in capsys.readouterr().out
    assert main(command) == 2
    assert f"{ADDRESS}: the folder is not empty" in capsys.readouterr().err
    back = ["convert", "--from", ADDRESS, "--to", "keras", "--output", "memory://bucket/a.keras"]
    assert main(back) == 0
    assert bucket.size("/bucket/a.keras") > 0


def test_an_object_where_a_folder_is_to_be_is_told_before_the_work(bucket):
    bucket.pipe_file("/bucket/taken", b"x")
    said = r"^memory://bucket/taken: a file; expected a folder, or a name that is free$"
    with pytest.raises(FileExistsError, match=said):
        convert("align-tiny", "hf", "memory://bucket/taken")
    assert bucket.find("/bucket") == ["/bucket/taken"]


def test_what_tells_that_all_is_there_is_sent_last_and_removed_first(tmp_path, bucket):
    for name in ("a", "marker", "z", "sub/b"):
        write_text(tmp_path / name, name)
    order = []
    kind = type(bucket)  # of which each thread has one
    put, rm = kind.put_file, kind.rm_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "put_file", lambda self, a, b: (order.append(b), put(self, a, b)))
        patch.setattr(kind, "rm_file", lambda self, a: (order.append(a), rm(self, a)))
        addresses.send_folder(tmp_path, addresses.place(ADDRESS), last="marker")
        addresses.remove(addresses.place(ADDRESS), first="marker")
    assert [path.removeprefix("/bucket/align/") for path in order[3:5]] == ["marker", "marker"]
    assert len(order) == 8 and not bucket.find("/bucket")


def test_a_file_is_not_sent_where_its_writing_fails(bucket):
    def fail():
        raise RuntimeError("broken off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", lambda *_, **__: fail())
        with pytest.raises(RuntimeError):
            write_text(addresses.place(f"{ADDRESS}/a.txt"), "a")
    assert not bucket.find("/bucket")


@pytest.mark.parametrize(
    ("path", "absent", "expected"),
    [
        ("gs://b/x", "gcsfs", 'gs://b/x: gs:// needs gcsfs: pip install "align-tf[gcs]"'),
        ("s3://b/x", "s3fs", 's3://b/x: s3:// needs s3fs: pip install "align-tf[s3]"'),
        ("https://b/x", "", "https://b/x: not an address that is read or written; expected gs://,"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["embed", "memory://x", "--output"],
        ["export", "--output"],
        ["train", "--model", "align-tiny", "--steps", "1", "--data", "x", "--output"],
        ["train", "--model", "align-tiny", "--steps", "1", "--output", "memory://y", "--data"],
        ["search"],
    ],
)
def test_an_absent_extra_is_told_before_anything_is_made(
    command, path, absent, expected, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == absent else find(name)
    )
    query = ["a cat"] if command == ["search"] else []
    assert main([*command, path, *query]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"align-tf: error: {expected}") and len(err.splitlines()) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["s3://", "S3://", "gs:///"])
def test_an_address_without_a_bucket_is_told(address, model):
    with pytest.raises(ValueError, match=rf"^{address}: names no bucket; expected (s3|gs)://buck"):
        model.save_pretrained(address)


def test_what_is_not_there_is_told(tmp_path):
    for call in (
        lambda: AlignModel.from_pretrained(ADDRESS),
        lambda: addresses.fetched_folder(addresses.place(ADDRESS)),
    ):
        with pytest.raises(FileNotFoundError, match=r"^memory://bucket/align: no such f"):
            call()
    with pytest.raises(FileNotFoundError, match=r"not on this machine, which alone is asked"):
        hub.resolve_folder(ADDRESS, local_files_only=True)


def test_a_client_that_fails_is_asked_again_and_told_in_one_line(bucket, capsys, monkeypatch):
    bucket.pipe_file("/bucket/align/a", b"content")
    monkeypatch.setattr(addresses, "PAUSE", 0)
    get, errors = bucket.get_file, [ConnectionResetError("cut\noff")]

    def get_or_fail(*arguments):
        if errors:
            raise errors.pop()
        return get(*arguments)

    monkeypatch.setattr(bucket, "get_file", get_or_fail)
    with addresses.fetched(addresses.place(f"{ADDRESS}/a")) as file:
        assert file.read_bytes() == b"content"
    assert capsys.readouterr().err == f"{ADDRESS}/a: cut off; trying again\n"
    assert not file.exists()
    errors += [TimeoutError()] * 3
    with (
        pytest.raises(addresses.AddressError, match=r"/a: cannot be reached: TimeoutError$"),
        addresses.fetched(addresses.place(f"{ADDRESS}/a")),
    ):
        pass


def test_a_folder_that_broke_off_is_fetched_when_it_is_asked_for_again(bucket, monkeypatch):
    for name in ("a", "b"):
        bucket.pipe_file(f"/bucket/align/{name}", b"content")
    fetch, broken = addresses._fetch, []

    def break_off(path, target):
        fetch(path, target)
        if path.name == "b" and not broken:
            broken.append(path.name)
            raise addresses.AddressError("broken off")

    monkeypatch.setattr(addresses, "_fetch", break_off)
    with pytest.raises(addresses.AddressError, match="broken off"):
        addresses.fetched_folder(addresses.place(ADDRESS))
    found = addresses.fetched_folder(addresses.place(ADDRESS))
    assert sorted(path.name for path in found.iterdir()) == ["a", "b"]
    assert addresses.fetched_folder(addresses.place(ADDRESS)) == found
    bucket.pipe_file("/bucket/align/c/a", b"content")
    assert addresses.fetched_folder(addresses.place(f"{ADDRESS}/c")) != found


def test_what_is_wrong_with_a_copy_is_told_of_its_address(bucket, model, checkpoint, capsys):
    model.config.save_pretrained(ADDRESS)
    without = rf"^{ADDRESS}: no weights; expected "
    with pytest.raises(FileNotFoundError, match=without):
        AlignModel.from_pretrained(ADDRESS)
    bucket.pipe_file("/bucket/align/model.safetensors", b"{]")
    bucket.pipe_file("/bucket/align/a.keras", b"{]")
    with pytest.raises(ValueError, match=rf"^{ADDRESS}/model.safetensors: not a whole safetensors"):
        AlignModel.from_pretrained(ADDRESS)
    with pytest.raises(FileNotFoundError, match=rf"^{ADDRESS}/adapter_config.json: no such file"):
        AlignModel.from_pretrained(checkpoint).load_adapter(ADDRESS)
    for source in ("model.safetensors", "a.keras"):
        name = ADDRESS if source == "model.safetensors" else f"{ADDRESS}/{source}"
        assert main(["convert", "--from", name, "--to", "hf", "--output", "memory://x"]) == 2
        assert f"align-tf: error: {ADDRESS}/{source}: not a whole " in capsys.readouterr().err


def test_a_probe_that_cannot_be_removed_is_no_file_of_the_folder(bucket, monkeypatch):
    def refuse(*arguments):
        raise PermissionError("no right to remove")

    monkeypatch.setattr(type(bucket), "rm_file", refuse)
    addresses.check_writable(f"{ADDRESS}/out")
    assert len(bucket.find("/bucket/align/out")) == 1
    assert addresses.names(addresses.place(f"{ADDRESS}/out")) == []


def test_labels_and_templates_may_lie_at_an_address(bucket, capsys):
    bucket.pipe_file("/bucket/labels.tsv", "label\tfolder\nein Käfer\tbug\n".encode())
    bucket.pipe_file("/bucket/templates.txt", b"a photo of {}\n\n{}\n")
    assert is_file_of_labels(["memory://bucket/labels.tsv"])
    assert read_labels("memory://bucket/labels.tsv") == [("bug", "ein Käfer")]
    assert read_templates("memory://bucket/templates.txt") == ["a photo of {}", "{}"]
    assert main(["classify", "x.png", "--labels", "memory://bucket/none.txt"]) == 2
    assert capsys.readouterr().err == "align-tf: error: memory://bucket/none.txt: no such file\n"


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_recipe(path),
        lambda path: read_labels(str(path)),
        lambda path: Listing.read(path),
        lambda path: counting._read(path),
        lambda path: trackers._runs(path.parent),
        lambda path: Best(Recipe(model="m", data="d", output="o", steps=1), path, 1),
    ],
)
def test_a_bucket_that_does_not_answer_is_not_one_without_the_file(bucket, monkeypatch, read):
    def fail(*arguments, **options):
        raise ConnectionResetError("cut off")

    for name in ("cat_file", "get_file", "info", "_open"):
        monkeypatch.setattr(type(bucket), name, fail)
    monkeypatch.setattr(addresses, "PAUSE", 0)
    with pytest.raises(addresses.AddressError, match="cannot be reached: cut off"):
        read(addresses.place(f"{ADDRESS}/file.txt"))


def test_paths_of_this_machine_load_nothing():
    code = "import sys; from align_tf import addresses, files; addresses.place('a/b'); "
    code += "sys.exit(bool({'fsspec', 'upath', 's3fs', 'gcsfs'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_adapter_goes_to_an_address_and_comes_back(checkpoint):
    model = AlignModel.from_pretrained(checkpoint)
    model.enable_lora(rank=2)
    model.save_adapter(ADAPTER)
    found = AlignModel.from_pretrained(ADAPTER)
    assert found.active_adapter is not None
    assert sorted(addresses.names(addresses.place(ADAPTER))) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_empty_name_is_not_the_working_directory(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^'': an empty name; expected a path$"):
        tiny_config.save_pretrained("")
    assert not any(tmp_path.iterdir())
