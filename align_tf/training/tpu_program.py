"""A program for TPUs: its collectives, what has no place in it, and what it computes."""

import collections
import dataclasses
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
CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(.*?channel_id=(\d+)")
# `%body (parameter: ...) -> ... {`, and in it ` while(...), condition=%less, body=%body`, whose
# condition compares with how many rounds there are.
COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
ROUNDS = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
CALLED = re.compile(r" calls=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind on arrays of one type.

    Args:
        kind: such as `all-gather`.
        dtype: such as `bf16`, as the compiler writes it.
        count: how many a step.
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
    `channel_id` counts once, by its largest result; one in a loop counts once a round.

    Args:
        text: of the compiled program.

    Returns:
        One row for each kind and dtype, the most bytes first.
    """
    whole: dict[tuple[str, int], list[tuple[str, tuple[int, ...]]]] = {}
    times = {}
    for line, rounds in _with_rounds(text):
        found = CALL.search(line)
        if found is None:
            continue
        arrays = [(dtype, _shape(sizes)) for dtype, sizes in ARRAY.findall(found[1])]
        key = found[2], int(found[3])
        whole[key], times[key] = max(whole.get(key, []), arrays, key=_total_bytes), rounds
    rows = collections.defaultdict(list)
    for key, arrays in whole.items():
        for dtype in {dtype for dtype, _ in arrays}:
            of_dtype = [array for array in arrays if array[0] == dtype]
            rows[key[0], dtype] += [of_dtype] * times[key]
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


def _with_rounds(text: str) -> list[tuple[str, int]]:
    """The lines of a program, each with how often a step runs it."""
    computation = ""
    lines, outer, bounds = [], {}, {}
    loops = []
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            computation = head[1]
        elif bound := ROUNDS.search(line):
            bounds[computation] = int(bound[1])
        elif loop := LOOP.search(line):
            loops.append((computation, loop[1], loop[2]))
        elif called := CALLED.search(line):
            outer[called[1]] = computation, 1
        lines.append((line, computation))
    outer |= {body: (within, bounds.get(condition, 1)) for within, condition, body in loops}

    def rounds(computation: str) -> int:
        within, count = outer.get(computation, (None, 1))
        return count if within is None else count * rounds(within)

    return [(line, rounds(computation)) for line, computation in lines]


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
