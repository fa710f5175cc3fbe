"""`align-tf evaluate` on align-tiny and its example pictures."""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal

import pytest
from PIL import Image

from align_tf.cli import evaluate as command
from align_tf.cli.main import main
from align_tf.evaluation import Embedder, tasks
from align_tf.evaluation.tasks import class_folders, class_labels, read_templates
from align_tf.hub import BUNDLED

EXAMPLES = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))
BROKEN = EXAMPLES[0].read_bytes()[:200]


@pytest.fixture(scope="module", autouse=True)
def one_model():
    """Loads align-tiny once, and traces it once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load", functools.cache(command.load))
        patch.setattr(tasks, "Embedder", functools.cache(tasks.Embedder))
        yield


@pytest.fixture(scope="module")
def evaluate(one_model):
    """Runs a task."""
    model, processor = command.load("align-tiny")

    def run(task, data, train_data=None, labels=None, templates=None, caption_key=None):
        options = argparse.Namespace(
            task=task, data=str(data), train_data=train_data, labels=labels, templates=templates
        )
        options.image_key, options.caption_key = None, caption_key
        return tasks.evaluate(model, processor, options)

    return run


@pytest.fixture
def pairs(tmp_path):
    """The examples, each with its name as caption."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for path in EXAMPLES:
        shutil.copy(path, folder)
        (folder / f"{path.stem}.txt").write_text(path.stem.replace("_", " "))
    return folder


@pytest.fixture
def classes(tmp_path):
    """A folder for each example, with six turns of it."""
    folder = tmp_path / "classes"
    for path in EXAMPLES:
        (folder / path.stem).mkdir(parents=True)
        with Image.open(path) as image:
            for angle in range(0, 12, 2):
                turned = image.convert("RGB").rotate(angle, fillcolor="white")
                turned.save(folder / path.stem / f"{angle}.png")
    return folder


def test_retrieval(evaluate, pairs):
    (pairs / "broken.png").write_bytes(BROKEN)
    (pairs / "broken.txt").write_text("a broken picture")
    Image.new("RGB", (50, 60), "red").save(pairs / "silent.png")
    # The same picture once more, with a second caption: one image with two captions.
    shutil.copy(EXAMPLES[1], pairs / "again.png")
    (pairs / "again.txt").write_text("something else")
    report = evaluate("retrieval", pairs)
    assert (report["images"], report["texts"]) == (6, 7)
    assert {key.split("/")[-1].split(".")[0] for key in report["skipped"]} == {"broken", "silent"}
    metrics = report["metrics"]
    assert metrics["r1_i2t"] == 1.0  # its own name is nearest to each
    assert 6 / 7 <= metrics["r1_t2i"] <= 1.0  # but "something else" may be anything
    assert metrics["median_rank_t2i"] == 1.0


def test_files_that_are_missing_are_each_named(evaluate, pairs):
    table = pairs / "table.csv"
    rows = [f"{path.name},{path.stem}\n" for path in EXAMPLES[:2]]
    table.write_text("".join(["image,caption\n", *rows, "none.png,a\n", "gone.png,b\n"]))
    report = evaluate("retrieval", table)
    assert (report["images"], report["texts"], len(report["skipped"])) == (2, 2, 2)
    assert all("no image" in reason for reason in report["skipped"].values())


def test_captions_of_several_columns_have_figures_of_their_own(
    evaluate, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    rows = [f"{path},{path.stem.replace('_', ' ')}," for path in EXAMPLES]
    # The second column has the wrong names of two.
    other = [EXAMPLES[1].stem, EXAMPLES[0].stem, *["" for _ in EXAMPLES[2:]]]
    table = tmp_path / "table.csv"
    lines = [row + name for row, name in zip(rows, other, strict=True)]
    table.write_text("\n".join(["path,short,wrong", *lines]))
    report = evaluate("retrieval", table, caption_key=["short", "wrong"])
    assert (report["images"], report["texts"]) == (6, 6)
    short, wrong = report["by_caption"]["short"], report["by_caption"]["wrong"]
    assert (short["images"], short["texts"], short["metrics"]["r1_i2t"]) == (6, 6, 1.0)
    assert (wrong["images"], wrong["texts"], wrong["metrics"]["r1_i2t"]) == (2, 2, 0.0)
    arguments = ["evaluate", "--data", str(table), "--caption-key", "short", "wrong"]
    assert main(arguments) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    shown = [row[1].strip() for row in rows if len(row) > 1]
    assert shown == ["all", "all", "short", "short", "wrong", "wrong"]
    with pytest.raises(ValueError, match="expected 'none', or the name of another"):
        evaluate("retrieval", table, caption_key=["short", "none"])


def test_zero_shot(evaluate, classes, tmp_path):
    (classes / "star" / "bad.jpg").write_bytes(b"no picture")
    report = evaluate("zero-shot", classes)
    assert (report["images"], report["classes"], report["templates"]) == (36, 6, 1)
    assert report["metrics"]["top1"] >= 0.9
    assert [os.path.basename(key) for key in report["skipped"]] == ["bad.jpg"]
    # Labels that are exchanged are wrong for the two.
    names = [path.stem for path in EXAMPLES]
    exchanged = tmp_path / "labels.txt"
    spoken = dict(zip(names, [names[1], names[0], *names[2:]], strict=True))
    exchanged.write_text("".join(f"{k}\t{v.replace('_', ' ')}\n" for k, v in spoken.items()))
    report = evaluate("zero-shot", classes, labels=[str(exchanged)], templates="imagenet")
    assert report["templates"] == 80
    assert 0.5 <= report["metrics"]["top1"] <= 4 / 6


@pytest.mark.parametrize("task", ["knn", "linear-probe"])
def test_learning_from_examples(evaluate, classes, task):
    report = evaluate(task, classes)
    assert (report["images"], report["train_images"], report["classes"]) == (6, 30, 6)
    assert report["metrics"]["top1"] == 1.0
    assert report["per_class"]["police_car"] == {"images": 1, "top1": 1.0, "mistaken_for": {}}
    (classes / "rose" / "other.png").write_bytes((classes / "star" / "0.png").read_bytes())
    report = evaluate(task, classes, train_data=str(classes))
    assert (report["images"], report["train_images"]) == (37, 37)
    figures = report["per_class"]["rose"]
    assert (figures["images"], figures["mistaken_for"]) == (7, {"star": 1})
    assert report["metrics"]["mean_per_class"] == pytest.approx((5 + 6 / 7) / 6)


def test_nothing_to_measure_is_an_error(evaluate, pairs, tmp_path):
    for text in pairs.glob("*.txt"):
        text.unlink()
    with pytest.raises(ValueError, match="caption"):
        evaluate("retrieval", pairs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        evaluate("retrieval", tmp_path / "empty")
    only = tmp_path / "only" / "cat"
    only.mkdir(parents=True)
    (only / "0.png").write_bytes(BROKEN)
    with pytest.raises(ValueError, match=r"none of 1 images can be decoded, such as .*0\.png"):
        evaluate("zero-shot", tmp_path / "only")


def test_class_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        class_folders(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no sub-folders; expected one for each class"):
        class_folders(str(tmp_path))
    for name in ("dog/puppies", "cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "dog" / "puppies" / "a.JPG").touch()
    (tmp_path / "dog" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"cat: no images; expected \.jpg"):
        class_folders(str(tmp_path))
    (tmp_path / "cat" / "b.png").touch()
    for hidden in (".ipynb_checkpoints", "__MACOSX", "cat/.thumbnails"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "c.png").touch()
    (tmp_path / "cat" / "._b.png").touch()
    found = {name: [file.name for file in files] for name, files in class_folders(tmp_path).items()}
    assert found == {"cat": ["b.png"], "dog": ["a.JPG"]}


def test_class_labels(tmp_path):
    folders = ["cat", "police_car"]
    assert class_labels(None, folders) == {"cat": "cat", "police_car": "police car"}
    more = class_labels(["police car", "cat", "dog"], folders)
    assert more == {"police_car": "police car", "cat": "cat", "dog": "dog"}
    file = tmp_path / "labels.txt"
    file.write_text("cat\ta small cat\n\npolice_car\n")
    named = {"cat": "a small cat", "police_car": "police_car"}
    assert class_labels([str(file)], folders) == named
    table = tmp_path / "labels.csv"
    table.write_text("folder,label\ncat,a small cat\npolice_car,police_car\n")
    assert class_labels([str(table)], folders) == named
    with pytest.raises(ValueError, match="unknown class 'police_car'"):
        class_labels(["cat", "dog"], folders)
    with pytest.raises(ValueError, match="class 'cat' comes twice"):
        class_labels(["cat", "cat"], folders)


def test_templates(tmp_path):
    assert read_templates(None) == ["{}"]
    templates = read_templates("imagenet")
    assert len(set(templates)) == len(templates) == 80
    assert templates[0] == "a bad photo of a {}."
    assert templates[1] == "a photo of many {}."
    assert templates[44] == "a origami {}."
    assert templates[79] == "a tattoo of the {}."
    assert all(template.count("{}") == 1 for template in templates)
    file = tmp_path / "templates.txt"
    file.write_text("# mine\na {}\nno place\n")
    with pytest.raises(ValueError, match=r"templates\.txt: template 'no place': expected a {}"):
        read_templates(str(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"templates\.txt: empty"):
        read_templates(str(file))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_templates(str(tmp_path / "none.txt"))


def test_the_command_prints_a_table_and_writes_json(capsys, classes, tmp_path):
    output = tmp_path / "new" / "figures.json"
    (classes / "star" / "bad.jpg").write_bytes(b"no picture")
    arguments = ["evaluate", "--task", "zero-shot", "--data", str(classes), "--output", str(output)]
    picture = tmp_path / "confusion.png"
    assert main([*arguments, "--plot", str(picture)]) == 0
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    captured = capsys.readouterr()
    assert "top-1" in captured.out and "%" in captured.out
    assert "mistaken for" in captured.out and "police car" in captured.out
    assert "left out 1 image" in captured.err and "bad.jpg" in captured.err
    report = json.loads(output.read_text())
    assert (report["task"], report["model"], report["images"]) == ("zero-shot", "align-tiny", 36)
    assert report["per_class"]["panda"]["images"] == 6
    assert [path.name for path in output.parent.iterdir()] == ["figures.json"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


@pytest.mark.usefixtures("interruptible")
def test_interrupted_it_writes_nothing(classes, tmp_path, monkeypatch, capsys):
    output = tmp_path / "figures.json"
    embed = Embedder.images

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return embed(*arguments)

    monkeypatch.setattr(Embedder, "images", interrupted)
    arguments = ["evaluate", "--task", "zero-shot", "--data", str(classes)]
    code = None
    with contextlib.suppress(KeyboardInterrupt):  # which would end all tests
        code = main([*arguments, "--output", str(output)])
    assert code == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "align-tf: stopped"
    assert not output.exists()
