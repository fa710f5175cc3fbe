"""The data of a training: broken, changed, or of several sources by weights."""

import re
import shutil
import tarfile

import pytest
from small_training import assert_same_end, flags

from align_tf.cli.main import main
from align_tf.data import counting, streams
from align_tf.data.readers import list_files
from align_tf.training import Recipe, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("traced_once")]


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


@pytest.fixture
def mixed(settings, place, tmp_path):
    """A recipe of three in four from a folder and the rest from a tar of eight dark pairs."""
    with tarfile.open(tmp_path / "dark.tar", "w") as tar:
        for index in range(0, 16, 2):
            for suffix in ("png", "txt"):
                tar.add(place / "pairs" / f"{index:02}.{suffix}", f"{index:02}.{suffix}")
    sources = [
        {"source": str(place / "pairs"), "weight": 3},
        {"source": str(tmp_path / "dark.tar")},
    ]
    return {**settings, "data": sources, "keep": 4}


def test_a_training_on_weighted_sources_goes_on_to_the_same_weights(
    mixed, place, tmp_path, capsys, monkeypatch
):
    del mixed["steps"]
    mixed["epochs"] = 5  # of 32 pairs
    output = train(Recipe(**mixed))
    names = [f"{place / 'pairs'} (75%)", f"{tmp_path / 'dark.tar'} (25%)"]
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "Data: 2 sources, 32 pairs, 8 in a batch",
        f"  {names[0]}: 24 pairs, each 5 times in all",
        f"  {names[1]}: 8 pairs, each 5 times in all",
    ]
    assert "Steps: 20, 4 an epoch; a line every 5, a checkpoint every 6" in said
    again = tmp_path / "again"
    shutil.copytree(output, again)
    for step in (12, 18, 20):
        shutil.rmtree(again / f"checkpoint-{step}")
    text = (output / "recipe.yaml").read_text().replace(str(output), str(again))
    (again / "recipe.yaml").write_text(text)
    monkeypatch.setattr(counting, "_of_this_process", {})
    monkeypatch.setattr(streams, "count_tar", lambda *_, **__: 1 / 0)  # was counted, and is kept
    assert main(["train", str(again / "recipe.yaml")]) == 0
    said = capsys.readouterr().err
    assert f" on {', '.join(names)}: loading TensorFlow ..." in said
    assert "Going on from step 6, " in said
    assert_same_end(again, output)


def test_weighted_sources_that_changed_are_refused(mixed, place, tmp_path, capsys):
    output = tmp_path / "out"
    (output / "checkpoint-6").mkdir(parents=True)
    Recipe(**mixed).save(output / "recipe.yaml")
    listing = list_files(place / "pairs")
    listing.extend(list_files(tmp_path / "dark.tar"))
    listing.records = 32
    listing.save(output / "data_listing.npz")
    sources = (str(place / "pairs"), str(tmp_path / "dark.tar"))
    weights = ["--data", *sources, "--data-weights", "2", "1"]
    given = ["train", str(output / "recipe.yaml")]
    assert main([*given, *weights]) == 2
    assert "out: belongs to a training with data=[{'source': '" in capsys.readouterr().err
    size = (tmp_path / "dark.tar").stat().st_size
    with tarfile.open(tmp_path / "dark.tar", "w") as tar:
        for name in ("03.png", "03.txt", "05.png", "05.txt"):
            tar.add(place / "pairs" / name, name)
    with open(tmp_path / "dark.tar", "ab") as tar:
        tar.truncate(size)
    for _ in range(2):  # what was counted anew is not taken for what was there
        assert main(given) == 2
        assert f": 32 pairs when {output} was begun, now 26; expected the same files, or" in (
            capsys.readouterr().err
        )
    with open(tmp_path / "dark.tar", "ab") as tar:
        tar.write(bytes(10240))
    assert main(given) == 2
    assert (
        f"pairs (75%), {tmp_path / 'dark.tar'} (25%): changed since {output} was begun: "
        f"{tmp_path / 'dark.tar'} replaced; expected the same files, or another output"
    ) in capsys.readouterr().err
    (tmp_path / "dark.tar").unlink()
    assert main(given) == 2
    assert f"align-tf: error: {tmp_path / 'dark.tar'}: no such file" in capsys.readouterr().err
