"""Memory and time of accumulation (GradCache) and of rematerialisation.

    python benchmarks/accumulation.py [--side 96] [--rounds 3] [--json]

Each row is a process of its own, of which the peak of its resident memory is taken, less what it
held before its first step. The time of the accumulated batch is held against plain steps on its
parts, in turn in one process.

The loss of n pairs needs its n x n logits a dozen times over, 67 MB each for 4,096 pairs, in
however many parts the towers run, and the batch lies in memory once more than the data.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import keras
import numpy as np
from side_by_side import compare, show

from align_tf import AlignConfig, AlignModel

PAIRS, PART, TOKENS = 4096, 64, 8

# name: (pairs that train, batch_size, accumulation, remat)
CASES = {
    "4,096 pairs in 64 parts": (PAIRS, PAIRS, PAIRS // PART, False),
    "64 steps of 64 pairs": (PAIRS, PART, 1, False),
    "512 pairs at once": (512, 512, 1, False),
    "512 pairs at once, remat": (512, 512, 1, True),
}


def make_data(pairs: int, side: int) -> dict[str, np.ndarray]:
    """Pictures and texts of noise."""
    rng = np.random.default_rng(0)
    return {
        "pixel_values": rng.random((pairs, side, side, 3), "float32"),
        "input_ids": rng.integers(1, 6000, (pairs, TOKENS), "int32"),
    }


def make_step(name: str, side: int) -> Callable[[], None]:
    """Returns what goes once through the pairs of a case, compiled."""
    pairs, batch_size, accumulation, remat = CASES[name]
    data = make_data(pairs, side)
    model = AlignModel(AlignConfig.from_preset("align-tiny"))
    model.compile(optimizer=keras.optimizers.SGD(1e-3), accumulation=accumulation, remat=remat)
    steps = pairs // batch_size
    batches = [
        {key: value[i * batch_size : (i + 1) * batch_size] for key, value in data.items()}
        for i in range(steps)
    ]

    def step() -> None:
        for batch in batches:
            model.train_on_batch(batch)

    return step


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
        before = megabytes()
        step()
        print(megabytes() - before)
        return
    peaks = {name: peak(name, side) for name in CASES}
    rows = [{"": name, "MB beside weights and data": value} for name, value in peaks.items()]
    results = [{"title": f"peak memory of steps, pictures of {side} pixels", "table": rows}]
    if arguments.rounds:
        steps = {name: make_step(name, side) for name in list(CASES)[:2]}
        title = f"one step of {PAIRS:,} pairs of {side} pixels"
        results.append(compare(title, steps, items=PAIRS, rounds=arguments.rounds))
    show(results, arguments.json)


if __name__ == "__main__":
    main()
