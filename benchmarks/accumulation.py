"""Memory and time of accumulation (GradCache) and of rematerialisation.

    python benchmarks/accumulation.py [--side 96] [--rounds 3] [--json]

Each row is a process of its own, of which the peak of its resident memory is taken, less what it
held before its first step: the process, the weights, and the batches as tensors, as an input
pipeline hands them over (Linux). The time of the accumulated batch is held against plain steps on
its parts, in turn in one process.
"""

import argparse
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import keras
from models import peak_gib, status_gib
from side_by_side import compare, show

from align_tf import AlignConfig, AlignModel

PAIRS, PART, TOKENS = 4096, 64, 8

# name: (pairs that train, batch_size, accumulation, remat)
CASES = {
    "4,096 pairs in 64 parts": (PAIRS, PAIRS, PAIRS // PART, False),
    "64 steps of 64 pairs": (PAIRS, PART, 1, False),
    "128 pairs in 2 parts": (2 * PART, 2 * PART, 2, False),
    "512 pairs at once": (512, 512, 1, False),
    "512 pairs at once, remat": (512, 512, 1, True),
}


def make_batch(pairs: int, side: int) -> dict[str, Any]:
    """Pictures and texts of noise, as tensors."""
    return {
        "pixel_values": keras.random.uniform((pairs, side, side, 3)),
        "input_ids": keras.random.randint((pairs, TOKENS), 1, 6000),
    }


def make_step(name: str, side: int) -> Callable[[], None]:
    """Returns what goes once through the pairs of a case, compiled."""
    pairs, batch_size, accumulation, remat = CASES[name]
    model = AlignModel(AlignConfig.from_preset("align-tiny"))
    model.compile(optimizer=keras.optimizers.SGD(1e-3), accumulation=accumulation, remat=remat)
    batches = [make_batch(batch_size, side) for _ in range(pairs // batch_size)]

    def step() -> None:
        for batch in batches:
            model.train_on_batch(batch)

    return step


def peak(name: str, side: int) -> float:
    """Runs a case in a process of its own; returns the megabytes that its steps took."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", name, "--side", str(side)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=32, help="of a picture, in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="0 measures the memory alone")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    side = arguments.side
    if arguments.case:
        step = make_step(arguments.case, side)
        before = status_gib("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak anew
        step()
        print(1024 * (peak_gib() - before))
        return
    peaks = {name: peak(name, side) for name in CASES}
    rows = [{"": name, "MB beside weights and batch": value} for name, value in peaks.items()]
    results = [{"title": f"peak memory of steps, pictures of {side} pixels", "table": rows}]
    if arguments.rounds:
        steps = {name: make_step(name, side) for name in list(CASES)[:2]}
        title = f"one step of {PAIRS:,} pairs of {side} pixels"
        results.append(compare(title, steps, items=PAIRS, rounds=arguments.rounds))
    show(results, arguments.json)


if __name__ == "__main__":
    main()
