"""The embedded server: what it adds to a request, and what merging requests gains.

    python benchmarks/server.py [--quick] [--rounds 5] [--json FILE]

At align-tiny, the bundled checkpoint, and at align-base. The load, the kill and the memory over
time are `serving.py`'s.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import models
from side_by_side import aim, run, throughput

from serving import BATCHING, added_seconds, batching_against_none, exported, overhead

CLIENTS = 32
# signature: calls of a round at align-base
BASE_CALLS = {"embed_text": 20, "embed_image": 4}


def tiny_overhead(version: pathlib.Path, rounds: int, times: int) -> dict[str, Any]:
    result = overhead(version, rounds, times=times)
    result["title"] += ", align-tiny"
    result["aims"] = [
        aim(f"{name} adds, ms", seconds * 1e3, at_most=5)
        for name, seconds in added_seconds(result).items()
    ]
    return result


def base_overhead(version: pathlib.Path, rounds: int, signature: str, times: int) -> dict[str, Any]:
    result = overhead(version, rounds, signature, times)
    result["title"] += ", align-base"
    direct = result["rows"][0]["seconds"]
    result["aims"] = [
        aim(f"{name} adds, share of a direct call", seconds / direct, at_most=0.03)
        for name, seconds in added_seconds(result).items()
    ]
    return result


def measure(quick: bool, rounds: int | None, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Compares the server with direct calls, and with itself without batching."""
    rounds = rounds or (1 if quick else 5)
    with exported() as version:
        yield tiny_overhead(version, rounds, 5 if quick else 50)
        parameters = version.parent / "batching.txt"
        parameters.write_text(BATCHING)
        clients = 4 if quick else CLIENTS
        for result in batching_against_none(version.parent, parameters, clients, rounds):
            gained = throughput(result, "batching", ["one at a time"])
            result["aims"] = [aim("batching by one at a time", gained, at_least=1.5)]
            yield result
    base = models.exported(folder, quick)
    for signature, calls in BASE_CALLS.items():
        yield base_overhead(base, rounds, signature, 2 if quick else calls)


if __name__ == "__main__":
    run(__doc__, measure)
