"""What is said on stderr of work that takes long, and of work that does not."""

import io
import types

import pytest

from align_tf import progress
from align_tf.progress import Bar, Rate, counted
from align_tf.terminal import say


@pytest.fixture
def clock(monkeypatch):
    """The clock of the rates, which stands unless a test moves it."""
    clock = types.SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_work_of_a_known_size_is_told_at_its_end(capsys, clock):
    with Rate("Embedding", 1200, "images") as rate:
        rate.skip(200)
        clock.now += 4
        rate.advance(1000)
    assert capsys.readouterr().err == (
        "Embedding: 1,200 of 1,200 images, 250.0 images/s, in 0:00:04\n"
    )


def test_work_that_takes_long_is_told_what_is_left(capsys, clock):
    with Rate("Embedding", 1200, "images") as rate:
        rate.skip(200)
        clock.now += 10
        rate.advance(200)
        assert capsys.readouterr().err == (
            "Embedding: 400 of 1,200 images, 20.0 images/s, 0:00:40 left\n"
        )


def test_a_count_of_what_is_over_at_once_is_not_told(capsys, clock):
    assert list(counted("abc", "Listing", "images")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_count_of_what_takes_long_is(capsys, clock):
    def slow():
        for item in "abc":
            clock.now += 6
            yield item

    assert list(counted(slow(), "Listing", "images")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [
        "Listing: 2 images, 0.2 images/s, so far",
        "Listing: 3 images, 0.2 images/s, in 0:00:18",
    ]


def test_a_count_that_is_broken_off_passes_the_error_on(capsys, clock):
    def broken():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(counted(broken(), "Listing", "images"))
    assert capsys.readouterr().err == ""


def test_a_bar_is_for_a_terminal_and_goes(monkeypatch, capsys):
    with Bar("Training", 10, "steps", 3) as bar:
        bar.advance(1, "loss 2.5")
    assert capsys.readouterr().err == ""

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Bar("Training", 10, "steps", 3) as bar:
        bar.advance(1, "loss 2.5")
        say("step 4/10")
    assert "Training" in terminal.getvalue() and "loss 2.5" in terminal.getvalue()
    assert " 4/10" in terminal.getvalue() and "step 4/10\n" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is gone
