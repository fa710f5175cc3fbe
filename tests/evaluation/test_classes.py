"""Classes that `align-tf evaluate` and `ZeroShotEvaluation` cannot measure."""

import argparse

import numpy as np
import pytest
from PIL import Image

from align_tf.evaluation import tasks
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
            task=task, data=str(data), train_data=None, labels=labels, templates=None
        )
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
