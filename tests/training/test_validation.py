"""A training that watches itself: sets by name, the best checkpoint kept, an early end."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from align_tf import AlignModel, AlignProcessor
from align_tf.cli.main import main
from align_tf.training import Recipe, RetrievalEvaluation, validation

# A training, and towers traced for it.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("png_alone")]


def recipe(place, output, **changes):
    settings = {
        "model": str(place / "tiny"),
        "data": str(place / "pairs"),
        "output": str(output),
        "batch_size": 8,
        "steps": 12,
        "save_every": 2,
        "log_every": 1,
        "keep": 1,
        "learning_rate": 0.001,
        "ema_momentum": 0.5,
        "validation_data": {
            "colors": {"data": str(place / "classes"), "task": "zero-shot"},
            "pairs": str(place / "pairs"),
        },
        **changes,
    }
    return Recipe(**settings)


def run(recipe, path):
    recipe.save(path)
    return main(["train", str(path)])


def validated(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    return {line["step"]: line for line in lines if "val_loss" in line}


def scripted(monkeypatch, figures):
    """Has the figure that is watched be a given one at each step."""
    on_epoch_end = validation.Best.on_epoch_end

    def at_step(self, epoch, logs=None):
        logs = {**logs, self.key: figures[self.model.trained_batches]}
        on_epoch_end(self, epoch, logs)

    monkeypatch.setattr(validation.Best, "on_epoch_end", at_step)


def checkpoints(output):
    return sorted(path.name for path in output.glob("checkpoint-*"))


FIGURES = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.2, 10: 0.4, 12: 0.5}


@pytest.fixture(scope="module")
def unbroken(place, png_alone, tmp_path_factory):
    """The best checkpoint of a training was that of step 4, which ended at step 8."""
    folder = tmp_path_factory.mktemp("validation")
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, FIGURES)
        settings = recipe(place, folder / "out", keep_best="val_colors_top1", early_stop=2)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert run(settings, folder / "recipe.yaml") == 0
    (folder / "said.txt").write_text(said.getvalue())
    return folder / "out"


def test_sets_are_measured_by_name(unbroken, place):
    found = validated(unbroken)
    assert list(found) == [2, 4, 6, 8]
    names = [name for name in found[4] if name.startswith("val_")]
    assert set(recipe(place, unbroken).figures()) <= set(names)
    assert "val_colors_top1" in names and "val_pairs_r1_t2i" in names
    said = (unbroken.parent / "said.txt").read_text().splitlines()
    line = next(line for line in said if line.startswith("step 4/12  epoch 2/4  val_loss "))
    assert "  val_pairs_r1_t2i " in line and "  val_colors_top1 " in line
    end = "No better val_colors_top1 in 2 validations than 0.5000 at step 4: done."
    assert end in said
    assert not [line for line in said if line.startswith("Embedding")]  # within the bar's place


def test_the_sets_share_one_embedder(place):
    processor = AlignProcessor.from_pretrained(place / "tiny")
    _, measures = validation.make_validation(recipe(place, "out"), processor, (8,))
    model = AlignModel.from_pretrained(place / "tiny")
    for _ in range(2):  # as for a validation before `fit`, and for `fit`
        for callback in measures:
            callback.set_model(model)
    assert len(measures) == 2
    assert measures[0].embedder is measures[1].embedder
    alone = RetrievalEvaluation({})
    alone.set_model(model)
    assert alone.embedder is not measures[0].embedder


def test_labels_of_a_set_are_a_file_of_them(place, tmp_path):
    (tmp_path / "labels.txt").write_text("red\tcrimson\ngreen\nblue\n")
    processor = AlignProcessor.from_pretrained(place / "tiny")
    colors = {"data": str(place / "classes"), "task": "zero-shot"}

    def measure(name):
        sets = {"colors": {**colors, "labels": str(tmp_path / name)}}
        changed = recipe(place, "out", validation_data=sets)
        return validation.make_validation(changed, processor, (8,))[1][0]

    assert measure("labels.txt").opened["labels"] == {
        "red": "crimson",
        "green": "green",
        "blue": "blue",
    }
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file$"):
        measure("none.txt")


def test_the_best_is_kept_and_is_the_trained_model(unbroken, place):
    assert checkpoints(unbroken) == ["checkpoint-4", "checkpoint-8"]
    read = safetensors.numpy.load_file
    whole, best, last = (
        read(unbroken / name / "model.safetensors")
        for name in (".", "checkpoint-4", "checkpoint-8")
    )
    for name, value in whole.items():
        np.testing.assert_array_equal(value, best[name], err_msg=name)
    assert any(not np.array_equal(value, last[name]) for name, value in whole.items())


@pytest.mark.parametrize("lost", ["validation", "nothing"])
def test_what_was_watched_is_remembered(lost, unbroken, place, tmp_path, monkeypatch, capsys):
    """After a kill between the last checkpoint and its validation, and after the end."""
    output = tmp_path / "out"
    shutil.copytree(unbroken, output)
    for name in (output / "recipe.yaml", tmp_path / "recipe.yaml"):
        text = (unbroken / "recipe.yaml").read_text()
        name.write_text(text.replace(str(unbroken), str(output)))
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):  # the real figures, in the place of which others stood
        values = json.loads(line)
        if "val_loss" in values:
            values["val_colors_top1"] = FIGURES[values["step"]]
            lines[number] = json.dumps(values) + "\n"
    if lost == "validation":
        lines = [line for line in lines if '"step": 8, "val' not in line]
    (output / "metrics.jsonl").write_text("".join(lines))
    scripted(monkeypatch, FIGURES)
    before = (output / "model.safetensors").read_bytes()
    (output / "model.safetensors").unlink()
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    err = capsys.readouterr().err
    assert "The best val_colors_top1, 0.5000, was that of step 4." in err
    assert ("It ended at step 8." in err) == (lost == "nothing")
    assert checkpoints(output) == ["checkpoint-4", "checkpoint-8"]
    assert list(validated(output)) == [2, 4, 6, 8]
    assert (output / "model.safetensors").read_bytes() == before
