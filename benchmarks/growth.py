"""How the exported towers' time grows with batch, image size, text length and threads.

    python benchmarks/growth.py [--quick] [--rounds 3] [--plot FILE.png] [--json FILE]

Each row has the share of the cores' own peak that it reaches; each series the slope of its time
over its operations in logarithms, where 1 is the FLOP line. Each count of threads is a process
of its own, since TensorFlow's is fixed when it starts.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import models
import numpy as np
from models import BATCH, MAX_TOKENS
from side_by_side import run

THREADS = (1, 2)
# series: (what varies, its values, those of `--quick`)
SERIES = {
    "image, by batch": ("batch", (1, 2, 4, 8, 16, 32, 64), (1, 2)),
    "image, by side": ("side", (224, 289, 380, 456, 600), (33, 48)),
    "text, by batch": ("batch", (1, 2, 4, 8, 16, 32, 64), (1, 2)),
    "text, by length": ("length", (8, 16, 32, 64), (8, 16)),
}
SIDE_BATCH = 2  # images of a call where the side varies


def make_call(functions: Any, config: Any, series: str, value: int) -> tuple[Any, int]:
    """Returns what embeds a batch of this size, and its operations."""
    import tensorflow as tf

    kind, what = series.split(", by ")
    side, batch = config.vision_config.image_size, BATCH
    batch = {"batch": value, "side": SIDE_BATCH}.get(what, batch)
    if kind == "image":
        side = value if what == "side" else side
        pixels = tf.random.normal([batch, side, side, 3])
        flops = batch * models.image_flops(config.vision_config, side)
        return lambda: functions["embed_pixels"](pixel_values=pixels), flops
    length = value if what == "length" else MAX_TOKENS
    rng = np.random.default_rng(0)
    ids = rng.integers(5, config.text_config.vocab_size, (batch, length), "int32")
    tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}
    tokens = {name: tf.constant(array) for name, array in tokens.items()}
    flops = batch * models.text_flops(config.text_config, length)
    return lambda: functions["embed_tokens"](**tokens), flops


def time_series(version: pathlib.Path, quick: bool, threads: int, rounds: int) -> None:
    """Prints the rows of every series: what the process of a count of threads does."""
    models.set_threads(threads)
    functions, config = models.signatures(version), models.make_config(quick)
    peak = models.peak_flops(256 if quick else 2048)["float32"]
    rows = []
    for series, (_, full, short) in SERIES.items():
        for value in short if quick else full:
            call, flops = make_call(functions, config, series, value)
            times = []
            for _ in range(rounds + 1):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            seconds = statistics.median(times[1:])
            row = {"series": series, "threads": threads, "value": value, "seconds": seconds}
            rows.append({**row, "gflop": flops / 1e9, "of_peak": flops / seconds / peak})
            print(f"{series} {value}, threads {threads}: {seconds:.3f} s", file=sys.stderr)
    print(json.dumps(rows))


def slope(rows: list[dict[str, Any]]) -> float:
    """Fits the time's power of the operations; 1 is the FLOP line."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("gflop", "seconds"))
    return statistics.linear_regression(x, y).slope


def draw(rows: list[dict[str, Any]], file: pathlib.Path) -> None:
    """Draws seconds over operations, with the line of one count of threads' own peak."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(THREADS), figsize=(11, 4.5), sharey=True)
    for axis, threads in zip(axes, THREADS, strict=True):
        mine = [row for row in rows if row["threads"] == threads]
        for series in SERIES:
            points = [row for row in mine if row["series"] == series]
            label = f"{series} (slope {slope(points):.2f})"
            axis.plot(
                [row["gflop"] for row in points],
                [row["seconds"] for row in points],
                "o-",
                label=label,
                markersize=4,
            )
        ends = [min(row["gflop"] for row in mine), max(row["gflop"] for row in mine)]
        peak = mine[0]["gflop"] / mine[0]["seconds"] / mine[0]["of_peak"]
        axis.plot(ends, [end / peak for end in ends], "k--", label=f"{peak:.0f} GFLOP/s")
        axis.set(xscale="log", yscale="log", xlabel="GFLOP of a call")
        axis.set_title(f"{threads} thread{'s' if threads > 1 else ''}")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("seconds of a call")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def measure(
    quick: bool, rounds: int | None, folder: pathlib.Path, plot: pathlib.Path | None = None
) -> list[dict[str, Any]]:
    """Times the series at each count of threads."""
    version = models.exported(folder, quick)
    rows = []
    for threads in THREADS:
        settings = [os.fspath(version), str(int(quick)), str(threads), str(rounds or 2)]
        child = subprocess.run(
            [sys.executable, __file__, "--threads", *settings],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows += json.loads(child.stdout.splitlines()[-1])
    slopes = []
    for series in SERIES:
        row = {"": series}
        for threads in THREADS:
            mine = [r for r in rows if (r["series"], r["threads"]) == (series, threads)]
            row[f"slope, {threads} threads" if threads > 1 else "slope, 1 thread"] = slope(mine)
        slopes.append(row)
    if plot:
        draw(rows, plot)
    return [
        {"title": "growth of the exported towers, float32", "table": rows},
        {"title": "slope of time over operations (the FLOP line: 1)", "table": slopes},
    ]


def main() -> None:
    if sys.argv[1:2] == ["--threads"]:
        version, quick, threads, rounds = sys.argv[2:]
        time_series(pathlib.Path(version), quick == "1", int(threads), int(rounds))
        return
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the series")
    run(__doc__, measure, more)


if __name__ == "__main__":
    main()
