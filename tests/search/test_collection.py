"""A collection of embeddings: what is in it, going on after a kill, the records left out, Ray."""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import threading

import fsspec
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from align_tf import AlignImageProcessor, AlignModel, AlignProcessor
from align_tf.cli.main import main
from align_tf.models.fingerprint import fingerprint
from align_tf.search import embed, embedding
from align_tf.search.collection import Collection

pq = pytest.importorskip("pyarrow.parquet")

WORDS = ["red", "green", "blue", "a", "picture"]
RECORDS = 50  # of which three cannot be embedded
BROKEN, ABSENT, HUGE = 5, 17, 30
SIZES = {"batch_size": 3, "shard_size": 8}  # 9 records a shard, 6 shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Fifty pictures, every other one with a caption; three of them cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(RECORDS):
        path = folder / f"{number:03}.png"
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(path)
        if number % 2 == 0:
            path.with_suffix(".txt").write_text(f"a {WORDS[number % 3]} picture\n")
    (folder / f"{BROKEN:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    (folder / f"{ABSENT:03}.png").write_bytes(b"")
    Image.new("L", (2000, 2000)).save(folder / f"{HUGE:03}.png")
    return folder


@pytest.fixture(scope="module")
def name(checkpoint) -> str:
    """The model's."""
    return str(checkpoint)


@pytest.fixture(scope="module")
def loaded(one_model, name) -> tuple[AlignModel, AlignProcessor]:
    return embedding.load_model(name, None)


@pytest.fixture(scope="module")
def whole(folder, one_model, name, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """The collection of an unbroken run, and its summary."""
    output = tmp_path_factory.mktemp("whole") / "embeds"
    return output, embed(folder, output, model=name, **SIZES)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_columns_and_what_is_left_out(whole, folder):
    output, summary = whole
    table = pq.read_table(output)
    fine = [n for n in range(RECORDS) if n not in (BROKEN, ABSENT, HUGE)]
    assert table["id"].to_pylist() == [f"{n:03}" for n in fine]
    assert table["path"].to_pylist() == [str(folder / f"{n:03}.png") for n in fine]
    captions = [f"a {WORDS[n % 3]} picture" if n % 2 == 0 else None for n in fine]
    assert table["caption"].to_pylist() == captions
    assert table["thumbnail"].null_count == 47
    assert [row is None for row in table["text_embeds"].to_pylist()] == [
        text is None for text in captions
    ]
    assert str(table.schema.field("image_embeds").type) == "fixed_size_list<element: halffloat>[8]"
    assert (summary["records"], summary["images"], summary["skipped"]) == (50, 47, 3)
    assert list(summary["named"]) == [f"{n:03}" for n in (BROKEN, ABSENT, HUGE)]
    assert "pixels" in summary["named"][f"{HUGE:03}"]
    shards = [f"shard-{n:06}.parquet" for n in range(6)]
    assert sorted(contents(output)) == ["_listing.npz", "_pictures.json", *shards]


@pytest.mark.slow
def test_a_collection_in_a_bucket_is_that_of_the_folder(
    whole, folder, one_model, name, tmp_path, capsys
):
    pytest.importorskip("faiss")
    from align_tf.search import Index, build_index

    bucket = fsspec.filesystem("memory")
    bucket.store.clear()
    for file in folder.iterdir():
        bucket.pipe_file(f"/bucket/pictures/{file.name}", file.read_bytes())
    where = "memory://bucket/pictures", "memory://bucket/embeds"
    summary = embed(*where, model=name, **SIZES)
    assert (summary["images"], summary["skipped"]) == (47, 3)
    bucket.rm_file("/bucket/embeds/shard-000003.parquet")  # as if it had been killed
    assert embed(*where, model=name, **SIZES) == summary
    bucket.pipe_file("/bucket/pictures/049.png", (folder / "048.png").read_bytes())
    with pytest.raises(
        ValueError, match=r"^memory://bucket/pictures: changed since .* 049.png rep"
    ):
        embed(*where, model=name, **SIZES)

    about = build_index("memory://bucket/embeds", "memory://bucket/index")
    assert (about["rows"], about["embeddings"]) == (47, "memory://bucket/embeds")
    assert main(["index", str(whole[0]), "--output", "memory://bucket/index"]) == 0
    build_index("memory://bucket/embeds", "memory://bucket/index")
    index, expected = Index("memory://bucket/index"), pq.read_table(whole[0])
    vectors = np.stack(expected["image_embeds"].to_pylist()).astype(np.float32)
    scores, rows = index.search(vectors[:3], 1)
    (hit,) = index.hits(scores[1], rows[1])
    assert (hit.id, hit.path) == ("001", "memory://bucket/pictures/001.png")
    assert not hit.outside and hit.picture.startswith(b"\xff\xd8")
    bucket.store.clear()


def test_the_embeddings_are_the_models(whole, model, processor):
    output, _ = whole
    rows = pq.read_table(output).slice(10, 1).to_pylist()[0]
    assert rows["id"] == "011"
    outputs = model(processor(images=[rows["path"]], text="a red picture", padding="longest"))
    np.testing.assert_allclose(rows["image_embeds"], np.asarray(outputs.image_embeds)[0], atol=1e-3)
    row = pq.read_table(output).to_pylist()[0]
    assert row["caption"] == "a red picture"
    np.testing.assert_allclose(row["text_embeds"], np.asarray(outputs.text_embeds)[0], atol=1e-3)


def test_the_metadata_hold_the_fingerprint(whole, model, processor):
    output, summary = whole
    about = json.loads(pq.read_schema(output / "shard-000001.parquet").metadata[b"align_tf"])
    assert about["fingerprint"] == summary["fingerprint"] == fingerprint(model, processor)
    assert about["shard"]["number"] == 1
    collection = Collection(output)
    assert collection.rows == 47
    assert sum(len(embeds) for embeds in collection.image_embeds()) == 47
    assert sum(len(embeds) for embeds in collection.text_embeds()) == 24


def test_the_fingerprint_is_of_weights_configuration_and_image_settings(tiny_config, processor):
    model = AlignModel(tiny_config)
    before = fingerprint(model, processor)
    assert fingerprint(model, processor) == before
    other = AlignImageProcessor(size=21, crop_size=16)
    assert fingerprint(model, AlignProcessor(other, processor.tokenizer)) != before
    kernel = model.text_projection.kernel
    values = np.array(kernel)
    values[0, 0] += 1e-3
    kernel.assign(values)
    assert fingerprint(model, processor) != before


# Is killed within its third shard.
KILLED = """
import os, pathlib, signal, sys
import pyarrow.parquet
from align_tf.search import embed

write, written = pyarrow.parquet.write_table, []

def write_or_die(table, path, **options):
    if len(written) == 2:
        pathlib.Path(path).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    write(table, path, **options)
    written.append(path)

pyarrow.parquet.write_table = write_or_die
embed(sys.argv[1], sys.argv[2], model=sys.argv[3], batch_size=3, shard_size=8)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_files(whole, folder, name, tmp_path):
    output = tmp_path / "embeds"
    command = [sys.executable, "-c", KILLED, folder, output, name]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {path: path.stat().st_mtime_ns for path in output.glob("shard-*")}
    assert len(before) == 2
    assert [path.read_bytes() for path in output.glob(".shard-*")] == [b"half a shard"]

    embed(folder, output, model=name, **SIZES)
    assert contents(output) == contents(whole[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_hole_in_the_middle_is_filled_and_a_whole_collection_is_left(
    whole, folder, name, tmp_path, capsys
):
    output = tmp_path / "embeds"
    output.mkdir()
    for file, content in contents(whole[0]).items():
        if file not in ("shard-000001.parquet", "shard-000002.parquet", "shard-000005.parquet"):
            (output / file).write_bytes(content)
    (output / ".shard-000001.parquet.left").write_bytes(b"half a shard")  # as a kill leaves it
    before = {path: path.stat().st_mtime_ns for path in output.glob("shard-*")}
    with pytest.raises(ValueError, match="3 of 6 shards"):
        Collection(output)
    capsys.readouterr()
    assert embed(folder, output, model=name, **SIZES) == {**whole[1], "output": str(output)}
    shown = capsys.readouterr().err
    assert "left out 017" in shown and "left out 005" not in shown
    assert "50 of 50 images" in shown and "images/s" in shown
    assert contents(output) == contents(whole[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert embed(folder, output, model=name, **SIZES)["images"] == 47
    assert "images/s" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 12}, "shard_size 9, not 12"),
        ({"caption_key": "title"}, "caption_key None, not 'title'"),
        ({"dtype": "float32"}, "dtype 'float16', not 'float32'"),
    ],
)
def test_another_collection_in_the_folder_is_refused(whole, folder, name, options, message):
    with pytest.raises(ValueError, match=message):
        embed(folder, whole[0], model=name, **{**SIZES, **options})


def test_another_model_or_source_is_refused(whole, folder, tiny_config, processor, name):
    keras.utils.set_random_seed(2)
    with pytest.raises(ValueError, match="fingerprint"):
        embed(folder, whole[0], model=AlignModel(tiny_config), processor=processor, **SIZES)
    with pytest.raises(ValueError, match="source"):
        embed([str(folder)] * 2, whole[0], model=name, **SIZES)


@pytest.mark.slow
def test_a_tf_data_set_of_unknown_length_in_float32(loaded, tmp_path):
    model, processor = loaded
    rng = np.random.default_rng(3)
    images = rng.integers(0, 255, (7, 20, 20, 3), np.uint8)

    def features():
        yield from ({"image": image} for image in images)

    spec = {"image": tf.TensorSpec([20, 20, 3], tf.uint8)}
    dataset = tf.data.Dataset.from_generator(features, output_signature=spec)
    summary = embed(
        dataset, tmp_path, model=model, processor=processor, dtype="float32", batch_size=3
    )
    assert (summary["images"], summary["model"]) == (7, "")
    (embeds,) = Collection(tmp_path).image_embeds()
    small = pq.read_table(tmp_path)["thumbnail"].to_pylist()
    means = [np.asarray(Image.open(io.BytesIO(jpeg))).mean() for jpeg in small]
    np.testing.assert_allclose(means, images.mean(axis=(1, 2, 3)), atol=2)
    expected = np.asarray(model(processor(images=images, text="a", padding="longest")).image_embeds)
    np.testing.assert_allclose(embeds, expected, atol=1e-6)
    assert embeds.dtype == np.float32


@pytest.mark.slow
def test_a_tar_of_pictures_that_pillow_chokes_on_is_embedded(loaded, tmp_path, capsys):
    model, processor = loaded
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01" + b"\xff" * 10  # of a kind that there is not
    files = {"thin.png": io.BytesIO(), "turned.jpg": io.BytesIO()}
    Image.new("RGB", (1, 3000), "red").save(files["thin.png"], "PNG")
    Image.new("RGB", (30, 20), "red").save(files["turned.jpg"], "JPEG", exif=exif)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, file in files.items():
            member = tarfile.TarInfo(name)
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    summary = embed(tmp_path / "a.tar", tmp_path / "out", model=model, processor=processor)
    assert (summary["images"], summary["skipped"]) == (2, 0)
    small = pq.read_table(tmp_path / "out")["thumbnail"].to_pylist()
    assert [Image.open(io.BytesIO(jpeg)).size for jpeg in small] == [(1, 160), (160, 107)]
    assert "Corrupt EXIF" not in capsys.readouterr().err


def test_nothing_to_embed_is_an_error(loaded, tmp_path):
    model, processor = loaded
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of 1 images"):
        embed(tmp_path, tmp_path / "out", model=model, processor=processor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"engine": "spark"}, "engine='spark'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"engine": "ray"}, "expected paths and the name"),
    ],
)
def test_arguments_are_checked(folder, loaded, tmp_path, options, message):
    model, processor = loaded
    with pytest.raises(ValueError, match=message):
        embed(folder, tmp_path / "out", model=model, processor=processor, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_collection(tmp_path):
    with pytest.raises(FileNotFoundError, match="align-tf embed"):
        Collection(tmp_path)
    (tmp_path / "shard-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a whole shard"):
        Collection(tmp_path)


def test_the_command(folder, name, whole, tmp_path, capsys):
    arguments = ["embed", folder, "--output", tmp_path / "e", "--model", name, "--json"]
    arguments += ["--batch-size", 3, "--shard-size", 8]
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 47
    assert "left out 3 of 50 records" in captured.err
    assert contents(tmp_path / "e") == contents(whole[0])


def kill_a_worker(output: pathlib.Path, workers: list[int], ended: threading.Event) -> None:
    """Kills one of two workers of Ray once both are there and a shard is written."""
    while len(workers) < 2 and not ended.wait(0.01):
        if list(output.glob("shard-*")):
            workers[:] = ray_workers()
    if len(workers) == 2:
        os.kill(workers[0], signal.SIGKILL)


def ray_workers() -> list[int]:
    found = []
    for cmdline in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if cmdline.read_bytes().startswith(b"ray::") and b"_Worker" in cmdline.read_bytes():
                found.append(int(cmdline.parent.name))
    return found


# Starting Ray and its workers takes half a minute.
@pytest.mark.skipif("ALIGN_TF_RAY" not in os.environ, reason="ALIGN_TF_RAY=1 runs Ray")
def test_ray_gives_the_same_files_with_a_worker_killed(whole, folder, name, tmp_path):
    pytest.importorskip("ray")
    output, workers = tmp_path / "embeds", []
    output.mkdir()
    ended = threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(output, workers, ended), daemon=True)
    killer.start()
    summary = embed(folder, output, model=name, engine="ray", workers=2, **SIZES)
    ended.set()
    killer.join()
    assert len(workers) == 2, workers
    assert summary == {**whole[1], "output": str(output)}
    assert contents(output) == contents(whole[0])
