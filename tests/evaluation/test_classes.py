"""Classes that `align-tf evaluate` and `ZeroShotEvaluation` cannot measure."""

import argparse

import numpy as np
import pytest
from PIL import Image

from align_tf.evaluation import (
    class_figures,
    confusion_matrix,
    tasks,
    zero_shot_metrics,
    zero_shot_predictions,
)
from align_tf.training import ZeroShotEvaluation


@pytest.fixture
def classes(tmp_path):
    """A folder of three classes, two pictures each."""
    for seed, name in enumerate(("red", "green", "blue")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(2):
            image = Image.new("RGB", (20, 20), (50 * seed, 90 * number, 9))
            image.save(tmp_path / "classes" / name / f"{number}.png")
    return tmp_path / "classes"


@pytest.fixture
def evaluate(model, processor):
    def run(task, data, labels=None):
        options = argparse.Namespace(
            task=task, data=str(data), image_key=None, caption_key=None, train_data=None
        )
        options.labels, options.templates = labels, None
        return tasks.evaluate(model, processor, options)

    return run


@pytest.mark.parametrize("label", ["a red", "A Red"])  # the tokenizer takes no case
def test_two_classes_of_one_label_are_refused(evaluate, classes, tmp_path, label):
    file = tmp_path / "labels.txt"
    file.write_text(f"red\ta red\ngreen\t{label}\nblue\n")
    message = f"labels 'a red' and '{label}' of two classes are the same to the model"
    with pytest.raises(ValueError, match=message):
        evaluate("zero-shot", classes, labels=[str(file)])


def test_two_folders_of_one_name_are_refused(evaluate, classes):
    (classes / "blue").rename(classes / "a_red")
    (classes / "green").rename(classes / "a red")
    with pytest.raises(ValueError, match="labels 'a red' and 'a red' of two classes"):
        evaluate("zero-shot", classes)


def test_a_callback_refuses_two_classes_of_one_label(processor):
    images, tokenizer = np.zeros((2, 16, 16, 3), "float32"), processor.tokenizer
    with pytest.raises(ValueError, match="labels 'red' and 'Red' of two classes are the same"):
        ZeroShotEvaluation(images, [0, 1], ["red", "blue", "Red"], tokenizer)


def test_a_blank_label_is_refused(evaluate, classes, tmp_path):
    (tmp_path / "labels.txt").write_text("red\t\ngreen\nblue\n")
    with pytest.raises(ValueError, match="--labels: class 'red' has a blank label"):
        evaluate("zero-shot", classes, labels=[str(tmp_path / "labels.txt")])


@pytest.mark.parametrize("task", ["zero-shot", "knn"])
def test_a_class_without_a_picture_that_can_be_read_is_refused(evaluate, classes, task):
    for path in (classes / "green").iterdir():
        path.write_bytes(b"no picture")
    message = r"class 'green': none of its 2 images can be decoded, such as .*green/0\.png"
    with pytest.raises(ValueError, match=message):
        evaluate(task, classes)


def test_retrieval_tells_why_there_is_no_picture(evaluate, tmp_path):
    (tmp_path / "table.csv").write_text("path,caption\nimages/a.png,a red\nimages/b.png,a blue\n")
    message = (
        r"none of 2 images can be decoded, such as images/a: 2 x no image, or its file cannot be "
        rf"read \(paths are taken relative to the folder of the table, {tmp_path}\)"
    )
    with pytest.raises(ValueError, match=message):
        evaluate("retrieval", tmp_path / "table.csv")


# --- class by class --------------------------------------------------------------------------


def test_class_figures_put_the_worst_class_first():
    labels = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    predicted = [0, 0, 0, 1, 1, 3, 3, 2, 2, 2]
    figures = class_figures(labels, predicted, ["cat", "dog", "panda", "rose"])
    assert figures == {
        "dog": {"images": 3, "top1": 1 / 3, "mistaken_for": {"rose": 2}},
        "cat": {"images": 4, "top1": 0.75, "mistaken_for": {"dog": 1}},
        "panda": {"images": 3, "top1": 1.0, "mistaken_for": {}},
    }
    assert list(figures) == ["dog", "cat", "panda"]  # no image is of a rose
    with pytest.raises(ValueError, match="predicted hold 4: expected rows 0 to 3"):
        class_figures([0], [4], ["cat", "dog", "panda", "rose"])
    with pytest.raises(ValueError, match=r"predicted of shape \(1,\): expected \(2,\)"):
        class_figures([0, 1], [1], ["cat", "dog"])


def test_a_confusion_of_many_classes_has_those_of_the_most_mistakes():
    figures = class_figures(
        [0, 0, 0, 0, 1, 1, 1, 2, 2, 2],
        [0, 0, 0, 1, 1, 3, 3, 2, 2, 2],
        ["cat", "dog", "panda", "rose"],
    )
    matrix, rows, columns = confusion_matrix(figures, limit=2)
    assert (rows, columns) == (["cat", "dog"], ["cat", "dog", "others"])
    assert matrix.tolist() == [[3, 1, 0], [0, 1, 2]]
    right = class_figures([0, 1], [0, 1], ["cat", "dog"])
    matrix, rows, columns = confusion_matrix(right, limit=9)
    assert (matrix.tolist(), columns) == ([[1, 0], [0, 1]], ["cat", "dog"])


def test_what_an_image_is_taken_for_is_what_its_rank_says():
    rng = np.random.default_rng(0)
    classes = np.concatenate([np.eye(3), np.eye(3)[:1]])  # the last is as near as the first
    labels = rng.integers(0, 4, 50)
    images = np.eye(4)[:, :3][rng.integers(0, 3, 50)] + 0.1 * rng.random((50, 3))
    predicted = zero_shot_predictions(images, classes, labels)
    nearest = (images @ classes.T).argmax(axis=1)
    tied = nearest == 0
    assert (predicted[~tied] == nearest[~tied]).all()
    assert (predicted[tied & (labels == 0)] == 3).all()
    assert (predicted[tied & (labels == 3)] == 0).all()
    assert np.mean(predicted == labels) == zero_shot_metrics(images, classes, labels)["top1"]


def test_zero_shot_tells_each_class(evaluate, classes):
    report = evaluate("zero-shot", classes)
    figures = report["per_class"]
    assert sorted(figures) == ["blue", "green", "red"]
    assert [of["images"] for of in figures.values()] == [2, 2, 2]
    top1 = [of["top1"] for of in figures.values()]
    assert sorted(top1) == top1 and np.mean(top1) == pytest.approx(report["metrics"]["top1"])
