"""Lines for people: what comes from files and names is shown literally, whatever it holds."""

import functools
import re
import sys

# What would steer a terminal, end a line or turn the order of what is read: control characters,
# separators, the embeddings and overrides of bidirectional text; and lone surrogates, which no
# encoding has: they stand for the bytes of a name that is not UTF-8.
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def literal(text: str) -> str:
    r"""Writes what a terminal would not show but act on as an escape, such as `\x1b`."""
    return _STEERING.sub(_escaped, text)


def _escaped(found: re.Match) -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":  # a byte, as Python reads it from a file's name
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def literal_lines(text: str) -> str:
    """Does the same to each line of several."""
    return "\n".join(map(literal, text.split("\n")))


def say(message: str) -> None:
    """Writes a line, or several, to stderr at once."""
    print(literal_lines(message), file=sys.stderr, flush=True)


@functools.cache
def say_once(message: str) -> None:
    """Does the same, the first time in this process."""
    say(message)
