"""A collection whose source has changed since it was begun, or changes while it is embedded."""

import json
import os
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from align_tf import AlignImageProcessor, AlignProcessor
from align_tf.cli.main import main
from align_tf.search import build_index, embed, embedding, own_pictures, ray_engine
from align_tf.search.collection import Collection
from align_tf.search.source_files import check_own

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SIZES = {"batch_size": 2, "shard_size": 2}
NAMES = "abcdef"


def picture(path: pathlib.Path, seed: int) -> pathlib.Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def begun(tmp_path_factory, checkpoint, one_model) -> pathlib.Path:
    """A place with `pictures` and what was embedded of them, and both once more in `kept`.

    Six pictures, of 2020; a.png and b.png with captions.
    """
    place = tmp_path_factory.mktemp("begun")
    folder = place / "pictures"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        picture(folder / f"{name}.png", seed)
    for name in NAMES[:2]:
        (folder / f"{name}.txt").write_text("a picture")
    for path in folder.iterdir():
        os.utime(path, (1577836800, 1577836800))
    embed(folder, place / "embeds", model=str(checkpoint), **SIZES)
    for name in ("pictures", "embeds"):
        shutil.copytree(place / name, place / "kept" / name)
    return place


def fresh(begun: pathlib.Path, name: str) -> pathlib.Path:
    """Puts back what a test may have changed: embedding it anew takes seconds."""
    shutil.rmtree(begun / name, ignore_errors=True)
    return pathlib.Path(shutil.copytree(begun / "kept" / name, begun / name))


@pytest.fixture
def folder(begun) -> pathlib.Path:
    return fresh(begun, "pictures")


@pytest.fixture
def embedded(begun, folder) -> pathlib.Path:
    return fresh(begun, "embeds")


def replace(folder: pathlib.Path) -> str:
    picture(folder / "a.png", 9)
    return "a.png replaced"


def rename(folder: pathlib.Path) -> str:
    (folder / "b.png").rename(folder / "c2.png")
    return "b.png gone, b.txt gone, c2.png new"


def replace_a_caption(folder: pathlib.Path) -> str:
    (folder / "b.txt").write_text("a Picture")  # of the same size
    return "b.txt replaced"


def add_a_caption(folder: pathlib.Path) -> str:
    (folder / "d.json").write_text('"a picture"')
    return "d.json new"


def change_all(folder: pathlib.Path) -> str:
    for name in "adef":
        picture(folder / f"{name}.png", 9)
    rename(folder)
    return "a.png replaced, b.png gone, b.txt gone, and 4 more"


@pytest.mark.parametrize(
    "change", [replace, rename, replace_a_caption, add_a_caption, change_all]
)  # fmt: skip
@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_that_has_changed_is_refused(embedded, folder, checkpoint, change, killed):
    if killed:
        (embedded / "shard-000001.parquet").unlink()
    before = {path: path.read_bytes() for path in embedded.iterdir()}
    changes = change(folder)
    with pytest.raises(ValueError) as error:
        embed(folder, embedded, model=str(checkpoint), **SIZES)
    assert str(error.value) == (
        f"{folder}: changed since {embedded} was begun: {changes}; expected the same files, or "
        "another folder"
    )
    assert {path: path.read_bytes() for path in embedded.iterdir()} == before


def test_a_killed_run_of_the_same_files_goes_on(embedded, folder, checkpoint):
    before = {path.name: path.read_bytes() for path in embedded.iterdir()}
    (embedded / "shard-000001.parquet").unlink()
    (embedded / "_listing.npz").unlink()
    (folder / "notes.md").write_text("read by nobody")
    embed(folder, embedded, model=str(checkpoint), **SIZES)
    assert {path.name: path.read_bytes() for path in embedded.iterdir()} == before


def test_without_its_listing_a_collection_is_refused_all_the_same(embedded, folder, checkpoint):
    (embedded / "_listing.npz").write_bytes(b"half")
    replace(folder)
    with pytest.raises(ValueError, match="embeds was begun; expected the same files, or another"):
        embed(folder, embedded, model=str(checkpoint), **SIZES)


def test_a_collection_of_before_listings_is_read_and_not_gone_on_with(embedded, folder, checkpoint):
    for file in embedded.glob("shard-*"):
        table = pq.read_table(file)
        about = json.loads(table.schema.metadata[b"align_tf"])
        del about["listing"]
        pq.write_table(table.replace_schema_metadata({b"align_tf": json.dumps(about)}), file)
    (embedded / "_listing.npz").unlink()
    assert Collection(embedded).rows == 6
    with pytest.raises(
        ValueError, match=r"embeds: begun before listings were kept.*another folder"
    ):
        embed(folder, embedded, model=str(checkpoint), **SIZES)


def test_a_worker_of_ray_takes_the_files_that_it_was_begun_with(embedded, folder, checkpoint):
    settings = Collection(embedded).settings
    before = (embedded / "shard-000001.parquet").read_bytes()
    (embedded / "shard-000001.parquet").unlink()
    arguments = ((str(folder), None, None), settings, str(embedded), 2)
    ray_engine._Worker(*arguments)({"number": np.array([1])})
    assert (embedded / "shard-000001.parquet").read_bytes() == before
    replace(folder)
    with pytest.raises(ValueError, match=r"was begun: a\.png replaced"):
        ray_engine._Worker(*arguments)


class Touching(AlignImageProcessor):
    """Replaces a picture when the images are about to be read."""

    path: pathlib.Path

    def try_pixel_values(self, *arguments):
        picture(self.path, 9)
        return super().try_pixel_values(*arguments)


def test_a_file_that_changes_meanwhile_is_noticed(folder, tmp_path, checkpoint):
    model, processor = embedding.load_model(str(checkpoint), None)
    images = Touching.from_dict(processor.image_processor.to_dict())
    images.path = folder / "e.png"
    output, processor = tmp_path / "embeds", AlignProcessor(images, processor.tokenizer)
    message = f"{folder}: changed while it was embedded: e.png replaced; expected another folder"
    with pytest.raises(ValueError, match=message):
        embed(folder, output, model=model, processor=processor, **SIZES)
    with pytest.raises(ValueError, match=r"was begun: e\.png replaced"):
        embed(folder, output, model=model, processor=processor, **SIZES)


def test_a_table_counts_with_the_pictures_it_names(folder, tmp_path, checkpoint):
    table, output = folder.parent / "table.csv", tmp_path / "out"
    table.write_text("path,caption\npictures/a.png,a\npictures/gone.png,b\npictures/a.png,c\n")

    def go_on():
        return embed(table, output, model=str(checkpoint), **SIZES)

    assert go_on() == go_on()
    picture(folder / "b.png", 9)  # which it does not name
    assert go_on()["images"] == 1
    shutil.copy(folder / "a.png", folder / "gone.png")
    with pytest.raises(ValueError, match=r"begun: .*/pictures/gone\.png new; expected"):
        go_on()
    (folder / "gone.png").unlink()
    table.write_text("path,caption\npictures/a.png,x\npictures/gone.png,b\npictures/a.png,c\n")
    with pytest.raises(ValueError, match=r"begun: .*table\.csv replaced; expected"):
        go_on()


def test_a_name_that_is_not_utf_8_leaves_the_others_their_pictures(tmp_path, checkpoint):
    folder, output = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    picture(folder / "a.png", 1).rename(os.fsdecode(os.path.join(os.fsencode(folder), b"\xff.png")))
    picture(folder / "b.png", 2)
    assert embed(folder, output, model=str(checkpoint), **SIZES)["images"] == 2
    assert own_pictures.own_folder(own_pictures.signed(output)) == str(folder)


def test_paths_that_are_relative_to_another_folder(tmp_path, checkpoint):
    (tmp_path / "table.csv").write_text("path\nelsewhere/a.png\n")
    message = (
        r"such as elsewhere/a: no image.*\(paths are taken relative to the folder of the table"
    )
    with pytest.raises(ValueError, match=message):
        embed(tmp_path / "table.csv", tmp_path / "out", model=str(checkpoint), **SIZES)


def test_a_collection_of_another_source_keeps_its_listing(embedded, tmp_path, checkpoint):
    (embedded / "_listing.npz").unlink()
    picture(tmp_path / "other.png", 1)
    with pytest.raises(ValueError, match="holds another collection, source"):
        embed(tmp_path, embedded, model=str(checkpoint), **SIZES)
    assert not (embedded / "_listing.npz").exists()


def test_shards_count_by_their_sizes(folder, tmp_path, checkpoint):
    shards, output = tmp_path / "shards", tmp_path / "out"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            tar.add(folder / f"{NAMES[number]}.png", "x.png")
    embed(shards, output, model=str(checkpoint), **SIZES)
    os.utime(shards / "0.tar")  # as a copy has another time
    embed(shards, output, model=str(checkpoint), **SIZES)
    with open(shards / "1.tar", "ab") as tar:
        tar.write(bytes(10240))
    with pytest.raises(ValueError, match=r"begun: 1\.tar replaced; expected"):
        embed(shards, output, model=str(checkpoint), **SIZES)


def test_a_search_tells_of_pictures_that_are_gone(embedded, folder, tmp_path, capsys):
    pytest.importorskip("faiss")
    build_index(embedded, tmp_path / "index")
    (folder / "b.png").unlink()
    (folder / "d.png").unlink()
    page = tmp_path / "page.html"
    arguments = ["search", str(tmp_path / "index"), "a picture", "-k", "6", "--html", str(page)]
    assert main(arguments) == 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    gone = ("b.png", "d.png")
    assert last in [
        f"align-tf: warning: 2 of 6 pictures are gone, such as {folder / name}; expected the "
        "collection embedded and indexed again"
        for name in gone
    ]
    assert page.read_text().count("no picture file") == 2


def test_what_holds_other_files_is_left_as_it_is(folder, tmp_path, capsys):
    names = {path.name for path in folder.iterdir()}
    for output, told in (
        (
            folder,
            f"{folder}: not empty, and no collection, but a.png; expected a folder of its own",
        ),
        (folder / "a.png", f"{folder}/a.png: a file; expected a folder for the shards"),
    ):
        capsys.readouterr()
        assert main(["embed", str(folder), "--output", str(output), "--model", "./nowhere"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"align-tf: error: {told}")
    assert {path.name for path in folder.iterdir()} == names
    (tmp_path / ".DS_Store").touch()
    check_own(tmp_path)


def test_an_index_may_take_an_empty_folder(embedded, tmp_path):
    (tmp_path / "index").mkdir()
    build_index(embedded, tmp_path / "index")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match="other: there already, and no index"):
        build_index(embedded, tmp_path / "other")
