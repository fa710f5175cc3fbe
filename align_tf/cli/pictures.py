"""The image files that a command is given: files, folders, globs, and a list on stdin."""

import collections
import io
import pathlib
import sys

from align_tf.cli.common import import_tensorflow, say
from align_tf.data.patterns import matching

PHOTOGRAPH_SHARE = 0.25  # of its pixels: no colour of a photograph, but an emoji's, has as many
SAMPLED = 64  # pixels a side that are looked at


def find_pictures(given: list[str]) -> list[str]:
    """Finds image files, in the order in which they are given, those of folders and globs sorted.

    Args:
        given: files, folders, whose images are taken with those of the folders within, globs, or
            `-` for such a list on stdin, one a line.

    Raises:
        FileNotFoundError: some are not there; the message names all of them.
        ValueError: a folder or the list has none.
    """
    found, missing = [], []
    for name in _listed(given):
        path = pathlib.Path(name).expanduser()
        if path.is_dir():
            found += _pictures_of(path)
        elif path.is_file():
            found.append(str(path))
        else:
            matches = matching(str(path))
            found += [match for match in matches if pathlib.Path(match).is_file()]
            missing += [] if matches else [name]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file")
    if not found:
        raise ValueError(f"{', '.join(given)}: no files, expected one or more")
    return found


def _listed(given: list[str]) -> list[str]:
    names = []
    for name in given:
        if name != "-":
            names.append(name)
            continue
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a name need not be UTF-8
        lines = [line.rstrip("\r\n") for line in sys.stdin]
        if not any(lines):
            raise ValueError("-: nothing on stdin, expected paths, one a line")
        names += filter(None, lines)
    return names


def _pictures_of(folder: pathlib.Path) -> list[str]:
    say(f"Listing {folder} ...")
    import_tensorflow()
    from align_tf.data.folders import pictures  # which loads it
    from align_tf.data.sources import IMAGE

    found = sorted(path for path, _ in pictures(folder))
    if not found:
        raise ValueError(f"{folder}: no images; expected {', '.join(IMAGE)}")
    return found


def looks_like_a_photograph(path: str) -> bool:
    """Says whether no colour fills much of a picture, as the ground of an emoji does."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            pixels = image.convert("RGB").resize((SAMPLED, SAMPLED), PIL.Image.Resampling.NEAREST)
    except (OSError, SyntaxError, ValueError):  # damaged, though TensorFlow has read it
        return False
    data = pixels.tobytes()
    colours = collections.Counter(
        tuple(value >> 4 for value in data[place : place + 3]) for place in range(0, len(data), 3)
    )
    return colours.most_common(1)[0][1] < PHOTOGRAPH_SHARE * SAMPLED**2
