"""The data of a training: broken, changed, or of several sources by weights."""

import re
import shutil

import pytest
from small_training import flags

from align_tf.cli.main import main
from align_tf.training import Recipe, train

pytestmark = pytest.mark.usefixtures("traced_once")


def test_a_training_on_nothing_is_an_error(settings, place, tmp_path):
    """Each picture is there, and no caption beside it."""
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    for file in (tmp_path / "pairs").glob("*.txt"):
        file.write_text(" ")
    settings |= {"data": str(tmp_path / "pairs"), "max_errors": 24}
    with pytest.raises(ValueError, match=r"no caption|no usable pair"):
        train(Recipe(**settings))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_broken_data_end_the_training_in_one_line(settings, place, tmp_path, capsys):
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    (tmp_path / "pairs" / "07.png").rename(tmp_path / "pairs" / "it's [7] ö.png")
    (tmp_path / "pairs" / "it's [7] ö.png").write_bytes(b"no picture")
    settings |= {"data": str(tmp_path / "pairs"), "max_errors": 0}
    assert main(["train", *flags(settings)]) == 2
    err = capsys.readouterr().err
    expected = r"align-tf: error: .*/pairs: it's \[7\] ö: not a decodable image .* max_errors=0.*"
    *said, last = err.splitlines()
    assert re.fullmatch(expected, last)
    assert not any("error" in line or "Traceback" in line for line in said)


def test_data_that_changed_are_refused(settings, place, tmp_path):
    """A step is a place in the data: others would be read twice or never."""
    pairs = tmp_path / "pairs"
    shutil.copytree(place / "pairs", pairs)
    settings["data"] = str(pairs)
    train(Recipe(**settings))
    train(Recipe(**settings))
    (pairs / "03.png").rename(pairs / "30.png")
    shutil.copy(pairs / "05.png", pairs / "04.png")
    message = (
        rf"{pairs}: changed since .*out was begun: 03\.png gone, 03\.txt gone, 04\.png replaced"
    )
    with pytest.raises(ValueError, match=f"{message}.*expected the same files, or another output"):
        train(Recipe(**settings))
