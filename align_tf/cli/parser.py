"""The parser of the command line: mistakes in one line, with the nearest of what there is."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn

from align_tf.terminal import literal_lines

NEAR = 0.7  # of difflib's ratios: below it two words have little in common


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are a line, without the usage of all that there is.

    Attributes:
        when_missing: what is said beside the error where an argument is missing.
    """

    when_missing = ""

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            message += self.when_missing
        self.exit(2, literal_lines(f"{self.prog}: error: {message} (see {self.prog} --help)\n"))

    def flags(self) -> dict[str, str]:
        """Returns the flag of each argument that has one, those of commands within included."""
        found = {}
        for action in self._actions:
            if isinstance(action.choices, dict):
                for command in action.choices.values():
                    found |= command.flags()
            if action.option_strings:
                found[action.dest] = action.option_strings[-1]
        return found


def by_flags(message: str, flags: dict[str, str]) -> str:
    """Names flags in an error that begins with an argument by its name in Python.

    Args:
        message: such as `batch_size=0: expected 1 or more`, which becomes `--batch-size 0: ...`.
        flags: argument -> flag.
    """
    first = re.match(r"(\w+)(=|: an empty name)", message)
    if first is None or first[1] not in flags:
        return message
    if first[2] != "=":
        return flags[first[1]] + message[first.end(1) :]
    return re.sub(
        r"(?<![\w./-])(\w+)=",
        lambda found: f"{flags[found[1]]} " if found[1] in flags else found[0],
        message,
    )


def check_spelling(parser: Parser, arguments: list[str]) -> None:
    """Ends with the nearest command or flag where one is given that there is not.

    Args:
        parser: of the whole command line, or of a command.
        arguments: those after its name.
    """
    named = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    if not named:
        _check_flags(parser, arguments)
        return
    (commands,) = named
    place = next((n for n, word in enumerate(arguments) if word[:1] != "-"), len(arguments))
    _check_flags(parser, arguments[:place])
    if place < len(arguments):
        if arguments[place] not in commands:
            near = _nearest(arguments[place], commands) or f"expected one of {', '.join(commands)}"
            parser.error(f"unknown command {arguments[place]!r}; {near}")
        check_spelling(commands[arguments[place]], arguments[place + 1 :])


def _check_flags(parser: Parser, words: list[str]) -> None:
    known = parser._option_string_actions
    short = [flag for flag in known if not flag.startswith("--")]
    for word in words:
        name = word.partition("=")[0]
        if word == "--":  # what follows is no flag
            return
        # As argparse has it: what has a space is none, a long one may be cut short, and a value may
        # stand right behind a short one.
        if not re.match(r"--?[a-zA-Z]", name) or " " in name:
            continue
        if not any(flag.startswith(name) for flag in known) and not name.startswith(tuple(short)):
            near = _nearest(f"--{name.lstrip('-')}", known)
            parser.error(f"unknown flag {name}" + (f"; {near}" if near else ""))


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.replace("_", "-").lower(), known, n=1, cutoff=NEAR)
    return f"did you mean {near[0]}?" if near else ""
