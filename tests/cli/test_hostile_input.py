"""Hostile files and arguments: each command ends in an answer or one line, never in a traceback.

A try is a command of `COMMANDS` over files of which one is spoiled. ALIGN_TF_FUZZ states how many
are made, from ALIGN_TF_FUZZ_SEED on; a try is told by its number, and made again by it.
"""

import gzip
import json
import os
import pathlib
import random
import shutil
import tarfile

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from align_tf import AlignModel
from align_tf.cli.main import main
from align_tf.data import write_tfrecords

if keras.backend.backend() != "tensorflow":
    pytest.skip("embed runs on the TensorFlow backend", allow_module_level=True)

TRIES = int(os.environ.get("ALIGN_TF_FUZZ", "15"))
SEED = int(os.environ.get("ALIGN_TF_FUZZ_SEED", "0"))
LONGEST_ERROR = 2000  # characters: a line, not a dump of what was read

# Commands; what is in braces stands for a file of `seeds`, a text, a number or a new name.
COMMANDS = (
    "classify {image} {image} --labels {text} {text} --model {model}",
    "classify {image} --labels {labels} --json --model {model}",
    "classify {folder} --labels {text} --csv --top {number} --model {model}",
    "classify {image} --labels a b --template {text} --model {model}",
    "classify {image} --labels a b --model {checkpoint}",
    "evaluate --data {pairs} --model {model} --output {new}.json",
    "evaluate --data {folder} --task zero-shot --labels {labels} --model {model}",
    "evaluate --data {folder} --task zero-shot --templates {labels} --model {model}",
    "evaluate --data {folder} --task knn --model {model}",
    "evaluate --data {folder} --task {task} --train-data {folder} --model {model} --plot {new}.png",
    "evaluate --data {pairs} --image-key {text} --caption-key {text} {text} --model {model}",
    "embed {pairs} --output {new} --model {model}",
    "embed {pairs} --output {new} --model {model} --caption-key {text} --batch-size {number}",
    "embed {folder} --output {new} --model {model} --shard-size {number}",
    "embed {pairs} --output {old} --model {model} --image-key {text} --dtype float32",
    "index {collection} --output {new}",
    "index {collection} --output {old} --kind ivf",
    "search {index} {text} --model {model} -k {number}",
    "search {index} --image {image} --model {model} --html {new}.html --montage {new}.png",
    "search {index} {text} --add {text} --subtract {text} --model {model} --html {new}.html",
    "plot heatmap --images {image} {image} --texts {text} {text} --output {new}.png "
    "--model {model}",
    "plot embeddings {collection} --output {new}.svg",
    "plot curves {log} --output {new}.png",
    "plot curves {log} --output {old}",
    "convert --from {checkpoint} --to hf --output {new} --dry-run",
    "convert --from {checkpoint} --to keras --output {new}.keras --dry-run --config {config}",
    "convert --from {keras} --to hf --output {new} --dry-run",
    "convert --from {checkpoint} --to {format} --output {old} --processor {checkpoint} --dry-run",
    "train {recipe} --data {gone}",
    "train {recipe} --output {old} --data {pairs} --batch-size {number} --epochs {number}",
    "train --model {checkpoint} --data {pairs} --output {new} --steps {number} --augment {text}",
    "serve {gone} --model-config-file {recipe} --batching-parameters-file {labels}",
    "serve {gone} --monitoring-config-file {recipe} --grpc-port {number}",
)
TEXTS = (
    *("red", "", " ", "[/b]", "[red]", "{}", "{} {x}", "a {} of {}", "%s", "\x1b[2J", "\udce9"),
    *("-", "--", "-1", "~", "a\nb", "🐼" * 50, "红色 图片", "\u202e", "x" * 1000, "$x_1^2$", "\0"),
)
TASKS = ("retrieval", "zero-shot", "knn", "linear-probe")
FORMATS = ("hf", "keras", "savedmodel")
NUMBERS = ("0", "1", "2", "-1", "3.5", "1e400", "nan", "", "9" * 30, "x")
SNIPPETS = (
    *(b"", b"\0", b"\xff\xfe", b"[/b]", b'"', b"\n\n", b"\\ud83d", b"NaN", b"1e999", b"-1"),
    *(b"[" * 3000, b"{" * 3000, b"9" * 5000, b"\x1b[2J", b"../../etc/passwd", b"null", b"[]"),
)
CHOICES = {"{text}": TEXTS, "{number}": NUMBERS, "{task}": TASKS, "{format}": FORMATS}
VALUES = (None, -1, 0, 1e300, float("nan"), 2**70, "", "x", [], {}, [[]], True, "../..", 10**9)


@pytest.fixture(scope="module")
def seeds(checkpoint, tmp_path_factory) -> dict[str, list[pathlib.Path]]:
    """Good files of each kind, small."""
    folder = tmp_path_factory.mktemp("seeds")
    pictures = folder / "pictures"
    rng = np.random.default_rng(0)
    for number, suffix in enumerate(("png", "jpg", "gif", "bmp")):
        for name in ("cats", "dogs"):
            (pictures / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (20, 24, 3), "uint8")
            Image.fromarray(pixels).save(pictures / name / f"{number}.{suffix}")
    images = sorted(pictures.glob("*/*"))
    rows = [(str(image), f"a {image.stem} picture") for image in images]
    (folder / "pairs.tsv").write_text("".join(f"{path}\t{text}\n" for path, text in rows))
    (folder / "pairs.csv").write_text(
        "image,caption\n" + "".join(f'{path},"{text}"\n' for path, text in rows)
    )
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"image": path, "caption": text}) + "\n" for path, text in rows)
    )
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for number, (path, text) in enumerate(rows):
            tar.add(path, f"{number}{pathlib.Path(path).suffix}")
            caption = folder / f"{number}.txt"
            caption.write_text(text)
            tar.add(caption, caption.name)
    write_tfrecords(
        ((path, text) for path, text in rows), folder / "records", progress=False
    ).pop().rename(folder / "pairs.tfrecord")
    (folder / "pairs.tar.gz").write_bytes(gzip.compress((folder / "pairs.tar").read_bytes()))
    table = {"image": [image.read_bytes() for image in images], "caption": [t for _, t in rows]}
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    AlignModel.from_pretrained(checkpoint).save(folder / "model.keras")
    (folder / "labels.csv").write_text("folder,label\ncats,a red cat\ndogs,a blue {}\n")
    (folder / "labels.txt").write_text("cats\ta red cat\ndogs\ta blue {}\n")
    (folder / "recipe.yaml").write_text(f"model: {checkpoint}\nbatch_size: 2\nsteps: 1\n")
    (folder / "log").mkdir()
    log = [{"step": step, "loss": 1 / step, "temperature": 1.0} for step in range(1, 5)]
    (folder / "log" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
    collection, index = folder / "collection", folder / "index"
    embed = ["embed", str(pictures), "--output", str(collection), "--model", str(checkpoint)]
    assert main(embed) == 0
    assert main(["index", str(collection), "--output", str(index)]) == 0
    return {
        "image": images,
        "folder": [pictures],
        "pairs": sorted(folder.glob("pairs.*")),
        "keras": [folder / "model.keras"],
        "labels": [folder / "labels.txt", folder / "labels.csv"],
        "recipe": [folder / "recipe.yaml"],
        "config": [checkpoint / "config.json"],
        "log": [folder / "log"],
        "collection": [collection],
        "index": [index],
        "checkpoint": [checkpoint],
        "model": [checkpoint],
    }


@pytest.fixture(scope="module")
def loaded_once(checkpoint):
    """Reads the good checkpoint once."""
    model = AlignModel.from_pretrained(checkpoint)
    read = AlignModel.from_pretrained

    def from_pretrained(name, *arguments, **settings):
        if os.fspath(name) == os.fspath(checkpoint):
            return model
        return read(name, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignModel, "from_pretrained", from_pretrained)
        yield


def spoil(path: pathlib.Path, rng: random.Random) -> None:
    """Spoils one file, or one of a folder."""
    if path.is_dir():
        path = rng.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    content = path.read_bytes()
    way = rng.randrange(8)
    place = rng.randrange(len(content) + 1)
    if way == 0:
        content = content[:place]
    elif way == 1:
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            if flipped:
                flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        content = bytes(flipped)
    elif way in (2, 3):
        content = content[:place] + rng.choice(SNIPPETS) + content[place:]
    elif way == 4:
        content = rng.choice(SNIPPETS)
    elif way == 5 and path.suffix in (".json", ".jsonl"):
        content = "\n".join(spoiled_json(line, rng) for line in content.decode().split("\n"))
        content = content.encode("utf-8", "surrogatepass")
    elif way == 6:
        path.unlink()
        return path.mkdir()
    elif way == 7:
        return path.unlink()
    path.write_bytes(content)


def spoiled_json(line: str, rng: random.Random) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        return line
    if isinstance(value, dict) and value:
        inner = value
        while True:
            key = rng.choice(sorted(inner))
            if not isinstance(inner[key], dict) or not inner[key]:
                break
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[key]
        else:
            inner[key] = rng.choice(VALUES)
    return json.dumps(value)


def make_try(number: int, seeds: dict, folder: pathlib.Path) -> list[str]:
    """Returns the arguments of a try, its files written to a folder."""
    rng = random.Random(number)
    words = rng.choice(COMMANDS).split()
    spoiled = rng.randrange(len(words))
    arguments = []
    for place, word in enumerate(words):
        kind = word.strip("{}").partition("}")[0]
        if word in CHOICES:
            word = rng.choice(CHOICES[word])
        elif word == "{old}":
            word = str(write_old(folder, rng))
        elif kind in ("new", "gone"):
            word = word.replace("{new}", str(folder / "new")).replace("{gone}", str(folder / "-"))
        elif word.startswith("{"):
            path = rng.choice(seeds[kind])
            if kind != "model" and (place >= spoiled or rng.random() < 0.3):
                copy = folder / f"{place}-{path.name}"
                (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
                spoil(copy, rng)
                path = copy
            word = str(path)
        arguments.append(word)
    if rng.random() < 0.1:
        arguments.insert(rng.randrange(1, len(arguments) + 1), rng.choice(TEXTS))
    return arguments


def write_old(folder: pathlib.Path, rng: random.Random) -> pathlib.Path:
    """Writes what is there already where an output is to go: a file, or a folder."""
    old = folder / rng.choice(("old", "old.png", "old.keras"))
    if rng.random() < 0.5:
        old.write_text("someone's")
    else:
        old.mkdir()
        (old / rng.choice(("notes.txt", "recipe.yaml", "index.json", "model.safetensors"))).touch()
    return old


@pytest.mark.slow  # a sweep, of which a few tries find little
def test_no_hostile_input_ends_in_a_traceback(seeds, loaded_once, tmp_path, capsys):
    failed = []
    for number in range(SEED, SEED + TRIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = make_try(number, seeds, folder)
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as error:  # argparse's
            code = error.code
        except Exception as error:
            failed.append((number, arguments, repr(error)[:300]))
            continue
        told = capsys.readouterr().err
        error = "".join(line for line in told.splitlines() if "error:" in line)
        if code not in (0, 2) or (code and not error) or len(error) > LONGEST_ERROR:
            failed.append((number, arguments, code, told[-600:]))
        elif "Traceback" in told or "\x1b" in told:
            failed.append((number, arguments, told[-600:]))
        shutil.rmtree(folder)
    assert not failed, "\n\n".join(map(repr, failed))
