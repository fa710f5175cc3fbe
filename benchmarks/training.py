"""A training step at align-base (forward, backward, optimizer): seconds and peak memory.

    python benchmarks/training.py [--quick] [--rounds 3] [--batch-size 8] [--json FILE]

Each contender is a process of its own, one after another, so that its memory is its own. All
start from the same checkpoint with BatchNorm and drop-connect as in training from scratch; ours
takes LAMB, PyTorch AdamW. Peak memory is the process's, libraries and weights included.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import models
import numpy as np
from models import MAX_TOKENS
from side_by_side import aim, run, throughput, to_rows

WARM = 2  # steps that do not count: tracing, compiling, the optimizer's slots

OURS, OURS_BFLOAT16 = "align_tf, LAMB", "align_tf, LAMB, mixed_bfloat16"
EAGER, LAST = "PyTorch, AdamW, eager", "PyTorch, AdamW, channels last"
COMPILED = "PyTorch, AdamW, torch.compile"
AUTOCAST = "PyTorch, AdamW, bfloat16 autocast"

# name: (framework, settings)
CONTENDERS = {
    OURS: ("tensorflow", {"dtype": "float32"}),
    OURS_BFLOAT16: ("tensorflow", {"dtype": "mixed_bfloat16"}),
    EAGER: ("torch", {}),
    LAST: ("torch", {"channels_last": True}),
    COMPILED: ("torch", {"channels_last": True, "compiled": True}),
    AUTOCAST: ("torch", {"channels_last": True, "autocast": True}),
}


def make_batch(config: Any, batch_size: int) -> dict[str, np.ndarray]:
    """Pictures and texts of noise, each text of full length."""
    rng = np.random.default_rng(0)
    side, vocab = config.vision_config.image_size, config.text_config.vocab_size
    ids = rng.integers(5, vocab, (batch_size, MAX_TOKENS), "int32")
    return {
        "pixel_values": rng.normal(size=(batch_size, side, side, 3)).astype("float32"),
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
    }


def tensorflow_step(
    source: pathlib.Path, batch: dict[str, np.ndarray], dtype: str
) -> Callable[[], Any]:
    import tensorflow as tf

    from align_tf import AlignModel
    from align_tf.training import make_optimizer

    model = AlignModel.from_pretrained(source, dtype=dtype)
    model.unfreeze_batch_norm()
    model.compile(optimizer=make_optimizer(model, total_steps=10_000))
    batch = {name: tf.constant(value) for name, value in batch.items()}
    return lambda: model.train_on_batch(batch)


def torch_step(
    source: pathlib.Path,
    batch: dict[str, np.ndarray],
    channels_last: bool = False,
    compiled: bool = False,
    autocast: bool = False,
) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(models.THREADS)
    model = models.peer(source, channels_last=channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-5)
    pixels = torch.from_numpy(batch["pixel_values"].transpose(0, 3, 1, 2).copy())
    if channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    tokens = {name: torch.from_numpy(batch[name]).long() for name in batch if name[0] != "p"}
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(pixel_values=pixels, return_loss=True, **tokens).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def take_steps(name: str, source: pathlib.Path, quick: bool, batch_size: int, rounds: int) -> None:
    """Prints a contender's seconds and its peak memory: what its process does."""
    framework, settings = CONTENDERS[name]
    if framework == "tensorflow":
        models.set_tensorflow_threads()
    make = {"tensorflow": tensorflow_step, "torch": torch_step}[framework]
    step = make(source, make_batch(models.make_config(quick), batch_size), **settings)
    times = []
    for turn in range(WARM + rounds):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
        print(f"{name}: step {turn + 1}: {times[-1]:.2f} s", file=sys.stderr, flush=True)
    figures = {"times": times[WARM:], "first": times[0], "peak_GiB": models.peak_gib()}
    print(json.dumps(figures))


def measure(
    quick: bool, rounds: int | None, folder: pathlib.Path, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Runs the contenders' processes."""
    rounds = rounds or (2 if quick else 3)
    source = models.checkpoint(folder, quick)
    done: dict[str, dict[str, Any]] = {}
    for name in CONTENDERS:
        if quick and name == COMPILED:  # a minute of compiling that proves nothing
            continue
        settings = [name, os.fspath(source), str(int(quick)), str(batch_size), str(rounds)]
        child = subprocess.run(
            [sys.executable, __file__, "--contender", *settings],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # as `align-tf train` sets it
        )
        if child.returncode:
            print(f"{name}: ended with {child.returncode}, left out", file=sys.stderr)
            continue
        done[name] = json.loads(child.stdout.splitlines()[-1])
    return [report(done, batch_size)]


def report(done: dict[str, dict[str, Any]], batch_size: int) -> dict[str, Any]:
    rows = to_rows({n: [t / batch_size for t in figures["times"]] for n, figures in done.items()})
    for row in rows:
        row["first_step_s"] = done[row["name"]]["first"]
        row["peak_GiB"] = done[row["name"]]["peak_GiB"]
    result = {"title": f"training step, batch {batch_size}", "rows": rows}
    aims = []
    for ours, theirs in ((OURS, (EAGER, LAST, COMPILED)), (OURS_BFLOAT16, (AUTOCAST,))):
        there = [name for name in theirs if name in done]
        if ours not in done or not there:
            continue
        best = min(there, key=lambda name: sum(done[name]["times"]))
        speed = throughput(result, ours, [best])
        memory = done[ours]["peak_GiB"] / done[best]["peak_GiB"]
        aims.append(aim(f"{ours}: throughput by {best}", speed, at_least=1.4))
        aims.append(aim(f"{ours}: peak memory by {best}", memory, at_most=1.0))
    return {**result, "aims": aims}


def main() -> None:
    if sys.argv[1:2] == ["--contender"]:
        name, source, quick, batch_size, rounds = sys.argv[2:]
        take_steps(name, pathlib.Path(source), quick == "1", int(batch_size), int(rounds))
        return
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--batch-size", type=int, default=8, help="pairs of a step")
    run(__doc__, measure, more)


if __name__ == "__main__":
    main()
