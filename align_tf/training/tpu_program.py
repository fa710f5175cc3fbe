"""A program for TPUs: its collectives, what has no place in it, and what it computes."""

import collections
import dataclasses
import functools
import math
import re
from typing import Any

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
CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(.*?channel_id=(\d+)")
# What a start gives before its results: what it has taken.
TAKEN = ("all-gather", "collective-permute")

# `%name (a: f32[8]) -> (f32[8], f32[2]) {`, or `ENTRY %name ...`.
COMPUTATION = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\) -> (.+) \{$")
CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([^\s,()}]+)")
LOOP = re.compile(r" while\(.*condition=%?([^\s,()}]+)")
ROUNDS = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
# A computation in which an all-reduce is cut at once: together a reduce-scatter.
CUT = "all-reduce-scatter"


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
    `channel_id` counts once, by its largest result. In a loop it counts once a round.

    Args:
        text: of the compiled program.

    Returns:
        One row for each kind and dtype, the most bytes first.
    """
    computations = _computations(text)
    rounds = _rounds(computations)
    whole: dict[tuple[str, int], tuple[int, list]] = {}
    for name, (result, lines) in computations.items():
        for line in lines:
            found = CALL.search(line)
            if found is None:
                continue
            kind, arrays = found[2], _arrays(found[1])
            if name.startswith(CUT):
                kind, arrays = "reduce-scatter", _arrays(result)
            elif found[3] and kind in TAKEN:
                arrays = arrays[len(arrays) // 2 :]
            key = kind, int(found[4])
            largest = max(whole.get(key, (0, []))[1], arrays, key=_total_bytes)
            whole[key] = rounds[name], largest
    rows = collections.defaultdict(list)
    for (kind, _), (times, arrays) in whole.items():
        for dtype in {dtype for dtype, _ in arrays}:
            rows[kind, dtype] += [[array for array in arrays if array[0] == dtype]] * times
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


def flops_of(jaxpr: Any) -> float:
    """Counts the operations of a step's products and convolutions, a multiplication and a sum two.

    The compiler's own count has one round of each loop alone.

    Args:
        jaxpr: JAX's, of what is compiled.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            left, right = (variable.aval.shape for variable in equation.invars)
            numbers = parameters["dimension_numbers"]
            if name == "dot_general":
                reached = math.prod(left[axis] for axis in numbers[0][0])
            else:
                reached = math.prod(right[axis] for axis in numbers.rhs_spec[1:])  # all but out
                # Zeros between the pixels, as in a gradient, cost nothing.
                reached /= math.prod(parameters["lhs_dilation"])
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * reached
        inner = [flops_of(part) for part in _inner(parameters)]
        if name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * parameters.get("length", 1)
    return total


def _inner(parameters: dict[str, Any]) -> list[Any]:
    """The programs within an operation, such as the body of a loop."""
    found = []
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found


def _computations(text: str) -> dict[str, tuple[str, list[str]]]:
    """Returns the computations of a program by name: what each gives, and its lines."""
    found: dict[str, tuple[str, list[str]]] = {"": ("", [])}
    lines = found[""][1]
    for line in text.splitlines():
        header = None if line.startswith(" ") else COMPUTATION.match(line)
        if header is not None:
            lines = []
            found[header[1]] = header[2], lines
        else:
            lines.append(line)
    return found


def _rounds(computations: dict[str, tuple[str, list[str]]]) -> dict[str, int]:
    """Counts how often each computation runs: the body of a loop as often as it turns."""
    callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for name, (_, lines) in computations.items():
        for line in lines:
            loop = LOOP.search(line)
            times = 1 if loop is None else _turns(computations.get(loop[1], ("", []))[1])
            for called in CALLED.findall(line):
                callers[called].append((name, times))

    @functools.cache
    def count(name: str) -> int:
        return max((times * count(caller) for caller, times in callers[name]), default=1)

    return {name: count(name) for name in computations}


def _turns(condition: list[str]) -> int:
    """Reads from a loop's condition, which compares a counter, how often it turns."""
    found = [int(match[1]) for line in condition if (match := ROUNDS.search(line))]
    return max(found, default=1)


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, _shape(sizes)) for dtype, sizes in ARRAY.findall(text)]


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
