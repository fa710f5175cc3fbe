"""Broken files of a collection and its index: one line, whichever bytes are changed or cut."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil

import numpy as np
import pytest

from align_tf.cli.main import main
from align_tf.search import Index, build_index
from align_tf.search.collection import Collection, Settings, Shard, write_shard

pytest.importorskip("faiss")

TRIES = int(os.environ.get("ALIGN_TF_FUZZ", "40"))  # of each file
ROWS, DIM, SHARD = 300, 16, 100


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(ROWS, DIM))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def whole(vectors, tmp_path_factory) -> pathlib.Path:
    """A folder with a collection of three shards, and a flat and an ivf index over it."""
    folder = tmp_path_factory.mktemp("whole")
    settings = Settings("vectors", ROWS, SHARD, "float16", DIM, "align-tiny", "none")
    for number in range(settings.shards):
        rows = range(SHARD * number, SHARD * (number + 1))
        columns = {
            "id": [f"image {row}" for row in rows],
            "path": [f"/nowhere/{row}.png" for row in rows],
            "caption": [f"text {row}" if row % 2 else None for row in rows],
            "thumbnail": [None for _ in rows],
            "image_embeds": vectors[rows],
            "text_embeds": vectors[rows],
        }
        write_shard(folder / "embeds", settings, Shard(number, SHARD, 0, {}), columns)
    for kind in ("flat", "ivf"):
        build_index(folder / "embeds", folder / kind, kind=kind)
    return folder


def broken(content: bytes, chance: random.Random) -> bytes:
    """Cuts a file, or changes some of its bytes, of its beginning and end more often."""
    if chance.random() < 0.3:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        near = chance.randrange(min(1000, len(changed)))
        place = chance.choice((near, -near - 1, chance.randrange(len(changed))))
        changed[place] = chance.choice((0, 127, 255, chance.randrange(256)))
    return bytes(changed)


def use_index(folder: pathlib.Path, vectors: np.ndarray) -> None:
    index = Index(folder)
    for scores, rows in zip(*index.search(vectors[:5], 10), strict=True):
        index.hits(scores, rows)


def use_collection(folder: pathlib.Path, vectors: np.ndarray) -> None:
    collection = Collection(folder)
    collection.labelled(50)
    assert sum(map(len, collection.image_embeds())) == ROWS
    list(collection.text_embeds())


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize(
    ("folder", "name", "use", "message"),
    [
        ("flat", "index.json", use_index, "a broken index"),
        ("flat", "index.faiss", use_index, "a broken index"),
        ("ivf", "index.faiss", use_index, "a broken index"),
        ("flat", "records.arrow", use_index, "a broken index"),
        ("embeds", "shard-000001.parquet", use_collection, "not a whole shard|another collection"),
    ],
)
def test_a_broken_file_is_one_line(whole, vectors, tmp_path, folder, name, use, message, summed):
    shutil.copytree(whole / folder, tmp_path / "used")
    about = tmp_path / "used" / "index.json"
    if not summed and about.exists():  # as one has it that was made to be broken
        kept = json.loads(about.read_text())
        del kept["files"]
        about.write_text(json.dumps(kept))
    content = (tmp_path / "used" / name).read_bytes()
    refused = 0
    for seed in range(TRIES):
        changed = broken(content, random.Random(f"{folder}/{name} {seed}"))
        (tmp_path / "used" / name).write_bytes(changed)
        try:
            use(tmp_path / "used", vectors)
        except ValueError as error:
            refused += 1
            assert re.search(message, str(error)) and "\n" not in str(error), seed
    assert refused > TRIES / 4
    (tmp_path / "used" / name).write_bytes(content)
    use(tmp_path / "used", vectors)


def test_a_changed_vector_is_noticed(whole, vectors, tmp_path):
    shutil.copytree(whole / "flat", tmp_path / "index")
    content = bytearray((tmp_path / "index" / "index.faiss").read_bytes())
    content[-100] ^= 1
    (tmp_path / "index" / "index.faiss").write_bytes(content)
    with pytest.raises(ValueError, match="index: a broken index; `align-tf index` builds it anew"):
        Index(tmp_path / "index")


def test_a_changed_byte_of_a_shard_changes_no_vector(whole, tmp_path):
    shutil.copytree(whole / "embeds", tmp_path / "embeds")
    file = tmp_path / "embeds" / "shard-000001.parquet"
    content = file.read_bytes()
    stored = np.concatenate(list(Collection(tmp_path / "embeds").image_embeds()))
    for place in range(10, len(content), 199):
        changed = bytearray(content)
        changed[place] ^= 4
        file.write_bytes(changed)
        with contextlib.suppress(ValueError):
            found = np.concatenate(list(Collection(tmp_path / "embeds").image_embeds()))
            np.testing.assert_array_equal(found, stored)


def test_the_commands_end_in_one_line(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "used")
    (tmp_path / "used" / "flat" / "index.json").write_text('{"kind": ["flat"]}')
    (tmp_path / "used" / "embeds" / "shard-000002.parquet").write_bytes(b"PAR1 and no more PAR1")
    for arguments, message in (
        (["search", "flat", "red"], "flat: a broken index; `align-tf index` builds it anew"),
        (["index", "embeds", "--output", "x"], "shard-000002.parquet: not a whole shard of"),
        (["plot", "embeddings", "embeds", "--output", "x.png"], "2.parquet: not a whole shard of"),
    ):
        arguments = [
            str(tmp_path / "used" / word) if word in ("flat", "embeds") else word
            for word in arguments
        ]
        assert main(arguments) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("align-tf: error:") and message in last
