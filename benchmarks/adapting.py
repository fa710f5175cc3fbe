"""A step of LoRA beside one of full fine-tuning, here and by peft on PyTorch: seconds and memory.

    python benchmarks/adapting.py [--quick] [--rounds 5] [--batch-size 8] [--json FILE]

Each contender is a process of its own, so that its memory is its own, and they take their steps in
turn, so that a ratio is of times of one round. The model is an EfficientNet-B0 beside six layers of
BERT's of width 384, with random weights; the adapters are of rank 8, on the same layers; BatchNorm
is frozen, and all take AdamW. Peak memory is the process's, beside what it held before the first
step, libraries and weights.
"""

import argparse
import contextlib
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
from side_by_side import run, to_rows

WARM = 2  # steps that do not count
PAUSE = 0.5  # seconds in which the threads of the one before it stop spinning
RANK = 8

# name: (framework, whether LoRA)
CONTENDERS = {
    "align_tf, LoRA": ("tensorflow", True),
    "align_tf, all weights": ("tensorflow", False),
    "PyTorch with peft, LoRA": ("torch", True),
    "PyTorch, all weights": ("torch", False),
}


def make_config(quick: bool) -> dict[str, Any]:
    if quick:
        return models.tiny_config()
    text = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
    text |= {"intermediate_size": 1536}
    vision = {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0}
    vision |= {"hidden_dim": 1280}
    return {"text_config": text, "vision_config": vision, "projection_dim": 320}


def checkpoint(folder: pathlib.Path, quick: bool) -> pathlib.Path:
    """Writes the checkpoint, and an adapter of it, unless they are there."""
    target = folder / "adapted"
    if not target.is_dir():
        import keras

        from align_tf import AlignConfig, AlignModel

        keras.utils.set_random_seed(0)
        AlignModel(AlignConfig(**make_config(quick))).save_pretrained(target)
        model = AlignModel.from_pretrained(target)
        model.enable_lora(RANK)
        model.save_adapter(target / "adapter")
    return target


def make_batch(config: dict[str, Any], batch_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    side = config["vision_config"]["image_size"]
    ids = rng.integers(5, config["text_config"].get("vocab_size", 30522), (batch_size, MAX_TOKENS))
    return {
        "pixel_values": rng.normal(size=(batch_size, side, side, 3)).astype("float32"),
        "input_ids": ids.astype("int32"),
        "attention_mask": np.ones(ids.shape, "int32"),
    }


def tensorflow_step(
    source: pathlib.Path, batch: dict[str, np.ndarray], lora: bool
) -> Callable[[], Any]:
    import keras
    import tensorflow as tf

    from align_tf import AlignModel

    model = AlignModel.from_pretrained(source)
    if lora:
        model.load_adapter(source / "adapter")
    model.compile(keras.optimizers.AdamW(1e-4))
    batch = {name: tf.constant(value) for name, value in batch.items()}
    return lambda: model.train_on_batch(batch)


def torch_step(source: pathlib.Path, batch: dict[str, np.ndarray], lora: bool) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(models.THREADS)
    model = models.peer(source, channels_last=True)
    if lora:
        import peft

        model = peft.PeftModel.from_pretrained(model, source / "adapter", is_trainable=True)
    model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    pixels = torch.from_numpy(batch["pixel_values"].transpose(0, 3, 1, 2).copy())
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    tokens = {name: torch.from_numpy(batch[name]).long() for name in batch if name[0] != "p"}

    def step() -> float:
        optimizer.zero_grad()
        loss = model(pixel_values=pixels, return_loss=True, **tokens).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def take_steps(name: str, source: pathlib.Path, quick: bool, batch_size: int) -> None:
    """Takes a step for each line of stdin and prints its seconds, at the end the memory: what a
    contender's process does."""
    framework, lora = CONTENDERS[name]
    if framework == "tensorflow":
        models.set_tensorflow_threads()
    make = {"tensorflow": tensorflow_step, "torch": torch_step}[framework]
    step = make(source, make_batch(make_config(quick), batch_size), lora)
    before = models.status_gib("VmRSS")
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        print(time.perf_counter() - started, flush=True)
    peak = models.peak_gib()
    print(json.dumps({"peak_GiB": peak, "step_GiB": peak - before}))


def answer(name: str, child: subprocess.Popen) -> str:
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"{name}: its process ended with exit code {child.wait()}")
    return line


def measure(
    quick: bool, rounds: int | None, folder: pathlib.Path, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Runs the contenders' processes, which take their steps in turn."""
    rounds = rounds or (2 if quick else 5)
    source = checkpoint(folder, quick)
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # as `align-tf train` sets it
    children: dict[str, subprocess.Popen] = {}
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with contextlib.ExitStack() as stack:
        for name in CONTENDERS:
            settings = [name, os.fspath(source), str(int(quick)), str(batch_size)]
            child = subprocess.Popen(
                [sys.executable, __file__, "--contender", *settings],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            children[name] = stack.enter_context(child)
            stack.callback(child.kill)  # where another one fails
            answer(name, child)  # ready, before the next one starts
        for turn in range(WARM + rounds):
            for name, child in children.items():
                time.sleep(PAUSE)
                print(file=child.stdin, flush=True)
                seconds = float(answer(name, child))
                print(f"{name}: step {turn + 1}: {seconds:.2f} s", file=sys.stderr, flush=True)
                if turn >= WARM:
                    times[name].append(seconds / batch_size)
        rows = to_rows(times)
        for row, child in zip(rows, children.values(), strict=True):
            child.stdin.close()
            row |= json.loads(answer(row["name"], child))
    return [{"title": f"a step of LoRA, batch {batch_size}", "rows": rows}]


def main() -> None:
    if sys.argv[1:2] == ["--contender"]:
        name, source, quick, batch_size = sys.argv[2:]
        take_steps(name, pathlib.Path(source), quick == "1", int(batch_size))
        return
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--batch-size", type=int, default=8, help="pairs of a step")
    run(__doc__, measure, more)


if __name__ == "__main__":
    main()
