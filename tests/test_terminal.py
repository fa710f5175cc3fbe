"""Lines for people show data literally."""

import pytest

from align_tf.terminal import literal, say


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a cat [b] :smile: ¥ שלום 你好 👩‍🚀", "a cat [b] :smile: ¥ שלום 你好 👩‍🚀"),
        ("\x1b[31mred\x07\x9b", r"\x1b[31mred\x07\x9b"),
        ("one\ntwo\tthree\r\u2028", r"one\ntwo\tthree\r\u2028"),
        ("user\u202etxt.exe\u2066", r"user\u202etxt.exe\u2066"),
        (b"caf\xe9.png".decode("utf-8", "surrogateescape"), r"caf\xe9.png"),
        ("cut \ud83d", r"cut \ud83d"),
    ],
)
def test_what_would_steer_a_terminal_is_escaped(text, shown):
    assert literal(text) == shown


def test_a_message_keeps_its_lines(capsys):
    say("one \x1b[2J\ntwo")
    assert capsys.readouterr().err == "one \\x1b[2J\ntwo\n"
