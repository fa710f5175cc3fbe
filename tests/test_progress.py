"""What is said on stderr of work that takes long, and of work that does not."""

import re

import pytest

from align_tf import progress
from align_tf.progress import Rate, counted


def test_work_of_a_known_size_is_told_at_its_end(capsys):
    with Rate("Embedding", 1200, "images") as rate:
        rate.skip(200)
        rate.advance(1000)
    err = capsys.readouterr().err
    assert re.fullmatch(r"Embedding: 1,200 of 1,200 images, [\d,.]+ images/s, in 0:00:0\d\n", err)


def test_a_count_of_what_is_over_at_once_is_not_told(capsys):
    assert list(counted("abc", "Listing", "images")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_count_of_what_takes_long_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    assert list(counted("ab", "Listing", "images")) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    shown = [re.sub(r"[\d,.]+ images/s", "R", line) for line in lines]
    assert shown == [
        "Listing: 1 images, R, so far",
        "Listing: 2 images, R, so far",
        "Listing: 2 images, R, in 0:00:00",
    ]


def test_a_count_that_is_broken_off_passes_the_error_on(capsys):
    def broken():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(counted(broken(), "Listing", "images"))
    assert capsys.readouterr().err == ""
