"""The text of a program for TPUs: its collectives, and what has no place in it."""

import collections
import dataclasses
import math
import re

# As the compiler names them.
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# What has no place on a TPU: the text that gives it away, and what it is.
FOREIGN = {
    r"\bf64\[": "float64",
    r"\bc128\[": "complex128",
    r"xla_python_\w*callback|xla_ffi_python": "a callback to the host",
    r"\) (?:infeed|recv)\(|\] (?:outfeed|send)\(": "a transfer to the host",
}

BITS = re.compile(r"\d+")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
# `%name = f32[512,640]{1,0:T(8,128)} all-reduce(...), channel_id=3, ...`, or a tuple of arrays.
CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(.*?channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind on arrays of one type.

    Args:
        kind: such as `all-gather`.
        dtype: such as `bf16`, as the compiler writes it.
        count: how many.
        num_bytes: of their results on each chip, together.
        largest: the shape of the largest result.
    """

    kind: str
    dtype: str
    count: int
    num_bytes: int
    largest: tuple[int, ...]


def collectives_of(text: str) -> list[Collective]:
    """Finds the collectives of a program.

    The compiler cuts a long one into pieces that run beside the arithmetic: what has one
    `channel_id` counts once, by its largest result.

    Args:
        text: of the compiled program.

    Returns:
        One row for each kind and dtype, the most bytes first.
    """
    whole: dict[tuple[str, int], list[tuple[str, tuple[int, ...]]]] = {}
    for line in text.splitlines():
        found = CALL.search(line)
        if found is None:
            continue
        arrays = [(dtype, _shape(sizes)) for dtype, sizes in ARRAY.findall(found[1])]
        key = found[2], int(found[3])
        whole[key] = max(whole.get(key, []), arrays, key=_total_bytes)
    rows = collections.defaultdict(list)
    for (kind, _), arrays in whole.items():
        for dtype in {dtype for dtype, _ in arrays}:
            rows[kind, dtype].append([array for array in arrays if array[0] == dtype])
    made = [
        Collective(
            kind,
            dtype,
            len(calls),
            sum(map(_total_bytes, calls)),
            max((array for call in calls for array in call), key=_num_bytes)[1],
        )
        for (kind, dtype), calls in rows.items()
    ]
    return sorted(made, key=lambda row: row.num_bytes, reverse=True)


def foreign_parts(text: str) -> list[str]:
    """Names what a program holds that has no place on a TPU."""
    return [name for pattern, name in FOREIGN.items() if re.search(pattern, text)]


def _shape(sizes: str) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes.split(",") if size)


def _num_bytes(array: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = array
    bits = BITS.search(dtype)
    return math.prod(shape) * (int(bits[0]) if bits else 8) // 8


def _total_bytes(arrays: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(map(_num_bytes, arrays))
