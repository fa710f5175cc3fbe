"""Names that stand for several files: wildcards, and braces as shells and webdataset have them."""

import glob
import itertools
import os
import re
from collections.abc import Iterator

from align_tf import addresses

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_NAMES = 1_000_000  # of one range


def matching(pattern: str) -> list[str]:
    """Finds what a pattern stands for, such as `shards/{00000..00010}.tar` or `a/**/*.{jpg,png}`.

    Args:
        pattern: a path or an address; what is there by this very name is that alone.

    Returns:
        Files and folders, those of each wildcard sorted; none where there is nothing.

    Raises:
        FileNotFoundError: some of those that braces name are not there, and others are.
        ValueError: braces name too many.
    """
    exists, those_like = os.path.exists, lambda name: sorted(glob.glob(name, recursive=True))
    if addresses.is_remote(pattern):
        exists, those_like = addresses.state, addresses.matching
    if exists(pattern):
        return [pattern]
    found, missing = [], []
    for name in _expanded(pattern):
        there = [name] if exists(name) else those_like(name)
        found += there
        missing += [] if there or glob.has_magic(name) else [name]
    if found and missing:
        raise FileNotFoundError(
            f"{pattern}: {len(missing)} of its files are not there, such as {missing[0]}"
        )
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """Writes out the braces that hold a list or a range; other braces are as they are."""
    end, parts = 0, []
    for braces in BRACES.finditer(pattern):
        parts += [[pattern[end : braces.start()]], _alternatives(pattern, braces)]
        end = braces.end()
    return map("".join, itertools.product(*parts, [pattern[end:]]))


def _alternatives(pattern: str, braces: re.Match) -> list[str]:
    ends = RANGE.fullmatch(braces[1])
    if not ends:
        return braces[1].split(",") if "," in braces[1] else [braces[0]]
    first, last = map(int, ends.groups())
    if abs(last - first) >= MOST_NAMES:
        raise ValueError(f"{pattern}: {braces[0]} is more than {MOST_NAMES:,} names")
    padded = any(text.startswith("0") and len(text) > 1 for text in ends.groups())
    width = max(map(len, ends.groups())) if padded else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}}" for number in range(first, last + step, step)]
