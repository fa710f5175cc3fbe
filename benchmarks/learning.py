"""Trains align-tiny by its recipe here and in transformers' PyTorch: who is ahead, and when.

Both start from the same weights, see the same batches and take AdamW with the same schedule.
transformers' BatchNorm gets the momentum that its number means in Keras (its own, 0.99 in
PyTorch's convention, keeps the statistics of the last batch alone).
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "recipes" / "align_tiny"))

import keras
import numpy as np
import torch
import train as recipe
import transformers
from dataset import make_dataset, make_training_set
from emoji import read_concepts, split
from evaluate import embed, evaluation_pairs

from align_tf import AlignImageProcessor, AlignModel, AlignProcessor
from align_tf.evaluation import retrieval_metrics

SIDE = 48  # pixels
SET = "held-out renderings, no skin tones"


def train_here(folder: pathlib.Path, batches: Any, steps: int) -> Iterator[Callable[[], None]]:
    """Takes a step at each turn; yields what saves the model."""
    model = AlignModel.from_pretrained(folder)
    model.unfreeze_batch_norm()
    model.label_smoothing = recipe.LABEL_SMOOTHING
    model.temperature_bounds = recipe.TEMPERATURE_BOUNDS
    model.compile(optimizer=recipe.make_optimizer(steps))
    for batch in batches:
        model.train_on_batch(batch)
        yield lambda: model.save_pretrained(folder)


def train_transformers(
    folder: pathlib.Path, batches: Any, steps: int
) -> Iterator[Callable[[], None]]:
    """The same in PyTorch."""
    model = transformers.AlignModel.from_pretrained(folder).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0 - module.momentum
    schedule = recipe.Cycles(steps)
    decayed, plain = [], []
    for name, weight in model.named_parameters():
        kept = weight.ndim < 2 or "embeddings" in name
        (plain if kept else decayed).append(weight)
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.WEIGHT_DECAY},
            {"params": plain, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        eps=1e-7,
    )
    for step, batch in enumerate(batches):
        arrays = {name: torch.from_numpy(np.array(value)) for name, value in batch.items()}
        arrays["pixel_values"] = arrays["pixel_values"].permute(0, 3, 1, 2).contiguous()
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        logits = model(**{k: v if v.is_floating_point() else v.long() for k, v in arrays.items()})
        target = torch.arange(len(arrays["pixel_values"]))
        losses = [
            torch.nn.functional.cross_entropy(side, target, label_smoothing=recipe.LABEL_SMOOTHING)
            for side in (logits.logits_per_image, logits.logits_per_text)
        ]
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.temperature.clamp_(*recipe.TEMPERATURE_BOUNDS)
        yield lambda: model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=200, help="steps between two figures")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    concepts = read_concepts()
    parts = split(concepts)
    vocabulary = pathlib.Path(tempfile.mkdtemp()) / "vocab.txt"
    data, tokenizer = make_training_set(concepts, parts, [], 6000, 0, vocabulary)
    pairs = evaluation_pairs(concepts, parts, [])[SET]
    processor = AlignProcessor(AlignImageProcessor(size=SIDE, do_center_crop=False), tokenizer)
    print("| seed | | steps | minutes | text to image R@1/5/10 | image to text R@1/5/10 |")
    print("|---|---|---|---|---|---|")
    for seed in range(arguments.seeds):
        for name, trainer in (("align_tf", train_here), ("transformers", train_transformers)):
            keras.utils.set_random_seed(seed)
            torch.manual_seed(seed)
            folder = pathlib.Path(tempfile.mkdtemp())
            recipe.make_model(len(tokenizer.vocab)).save_pretrained(folder)
            batches = make_dataset(data, SIDE, recipe.BATCH_SIZE, 0.0, seed)
            turns = trainer(folder, batches.take(arguments.steps), arguments.steps)
            for step, minutes, save in _timed(turns, arguments.every):
                save()
                figures = retrieval_metrics(
                    *embed(AlignModel.from_pretrained(folder), processor, pairs)
                )
                shown = [
                    " / ".join(f"{100 * figures[f'r{k}_{way}']:.1f}" for k in (1, 5, 10))
                    for way in ("t2i", "i2t")
                ]
                row = f"| {seed} | {name} | {step} | {minutes:.1f} | {shown[0]} | {shown[1]} |"
                print(row, flush=True)


def _timed(
    turns: Iterator[Callable[[], None]], every: int
) -> Iterator[tuple[int, float, Callable[[], None]]]:
    """Yields steps, minutes spent in them, and what saves the model, every so many steps."""
    seconds, started = 0.0, time.perf_counter()
    for step, save in enumerate(turns, start=1):
        if step % every == 0:
            seconds += time.perf_counter() - started
            yield step, seconds / 60, save
            started = time.perf_counter()


if __name__ == "__main__":
    main()
