"""How many records each shard holds: counted several at a time, once, and kept in a file."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from align_tf import addresses
from align_tf.files import write_text
from align_tf.progress import counted


class Count(NamedTuple):
    """What a walk through a shard finds.

    Attributes:
        records: their number.
        dotted: the number of images that are left out for a dot before the last one.
        example: the name of the first of them.
        unread: suffixes that are not read -> the number of files.
    """

    records: int
    dotted: int = 0
    example: str = ""
    unread: Mapping[str, int] = {}


# file -> its size and state, with what else the count depends on; and the count
Counts = dict[str, tuple[list, Count]]

_of_this_process: Counts = {}


def count_shards(
    name: str,
    files: Sequence[addresses.Place],
    way: list,
    count: Callable[[Any], Count],
    index: addresses.Place | None = None,
) -> list[Count]:
    """Counts the records of shards, but for those that are as they were when they were counted.

    Args:
        name: of the source, for the progress.
        files: the shards.
        way: what a count depends on beside the file, as JSON has it.
        count: walks through one of them; several are walked at a time.
        index: the file that keeps the counts; None keeps them in this process alone.

    Returns:
        The count of each.
    """
    kept = _read(index)
    known = {**kept, **_of_this_process}
    states = {str(file): [*(addresses.state(str(file)) or ()), *way] for file in files}
    new = [file for file in files if known.get(str(file), (None,))[0] != states[str(file)]]
    found = counted(addresses.each(count, new), f"Counting {name}", "files")
    for file, one in zip(new, found, strict=True):
        known[str(file)] = (states[str(file)], one)
    of_these = {file: known[file] for file in states}
    _of_this_process.update(of_these)
    if index is not None and {**kept, **of_these} != kept:
        write_text(index, json.dumps({**kept, **of_these}, ensure_ascii=False) + "\n")
    return [of_these[str(file)][1] for file in files]


def _read(index: addresses.Place | None) -> Counts:
    """Reads the counts that are kept; none of a file that is gone or broken."""
    content = None if index is None else addresses.content(index)
    try:
        kept = json.loads(content or b"{}")
        return {file: (state, _checked(Count(*one))) for file, (state, one) in kept.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _checked(count: Count) -> Count:
    kinds = (int, int, str, dict)
    numbers = (count.records, count.dotted, *count.unread.values())
    if not all(map(isinstance, count, kinds)) or not all(isinstance(n, int) for n in numbers):
        raise ValueError(f"{count}: no count")
    return count
