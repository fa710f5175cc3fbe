"""Trains align-tiny: fetches the pictures, fits, saves, evaluates, writes the model card."""

import argparse
import dataclasses
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import clipart
import keras
import tensorflow as tf
from card import write_card, write_examples
from dataset import TrainingSet, make_dataset, make_training_set
from emoji import CACHE, read_concepts, split
from evaluate import evaluate

from align_tf import AlignConfig, AlignImageProcessor, AlignModel, AlignProcessor
from align_tf.hub import BUNDLED
from align_tf.training import ResumableCheckpoint
from align_tf.training.optimization import WarmupDecay

BATCH_SIZE = 128
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.05
# Two drawings of a thing differ, so that pictures are drawn anew and blocks dropped; the words are
# the same, so that dropout in the text tower would only slow it.
DROP_CONNECT_RATE, DROPOUT = 0.1, 0.0
LABEL_SMOOTHING = 0.0  # the things are few and each comes often: a sharp target is right
# While nothing is learned yet the temperature would rise and rise.
TEMPERATURE, TEMPERATURE_BOUNDS = 0.05, (0.02, 0.07)
# Each cycle of the learning rate warms up and decays to zero: steps, peak
CYCLES = ((10000, 1e-3), (1500, 5e-4))
STEPS = sum(steps for steps, _ in CYCLES)
# Small pictures teach faster; the last steps fit filters and BatchNorm to the full size, and
# need a rate of their own for it. Drawings with noisy captions are for the end: README.md.
# side in pixels, steps, share of a batch that are drawings
STAGES = ((64, 8500, 0.0), (96, 1500, 0.0), (96, 1500, 0.2))
STEPS_PER_EPOCH = 50  # between two lines of progress and checkpoints


def make_model(vocab_size: int) -> AlignModel:
    """Builds a fresh align-tiny."""
    config = AlignConfig.from_preset("align-tiny")
    text_config = dataclasses.replace(
        config.text_config,
        vocab_size=vocab_size,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
    )
    vision_config = dataclasses.replace(config.vision_config, drop_connect_rate=DROP_CONNECT_RATE)
    return AlignModel(
        dataclasses.replace(
            config,
            text_config=text_config,
            vision_config=vision_config,
            temperature_init_value=TEMPERATURE,
        ),
        label_smoothing=LABEL_SMOOTHING,
        temperature_bounds=TEMPERATURE_BOUNDS,
    )


class Cycles(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warmups and cosine decays to zero, one after the other.

    Args:
        steps: of the whole training; the cycles shrink or grow with it.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.first_steps, self.parts, first = [], [], 0
        for share, peak in CYCLES:
            length = max(1, share * steps // STEPS)
            warmup = min(WARMUP_STEPS, length // 5)
            self.parts.append(WarmupDecay(peak, warmup, length, "cosine"))
            self.first_steps.append(first)
            first += length

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        rate = 0.0
        for first, part in zip(self.first_steps, self.parts, strict=True):
            rate = tf.where(step < first, rate, part(step - first))
        return rate


def make_optimizer(steps: int) -> keras.optimizers.Optimizer:
    """AdamW that leaves norms, biases, embeddings and the temperature undecayed."""
    optimizer = keras.optimizers.AdamW(
        Cycles(steps), weight_decay=WEIGHT_DECAY, beta_2=0.98, global_clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay(
        var_names=["bias", "gamma", "beta", "temperature", "embeddings"]
    )
    return optimizer


class Progress(keras.callbacks.Callback):
    """Says on stderr after each epoch how training goes."""

    def __init__(self, steps: int, first_step: int):
        super().__init__()
        self.steps, self.first_step, self.started = steps, first_step, time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        done = int(self.model.optimizer.iterations)
        seconds = time.monotonic() - self.started
        left = seconds / (done - self.first_step) * (self.steps - done)
        print(
            f"step {done}/{self.steps}  loss {logs['loss']:.3f}  "
            f"temperature {float(self.model.temperature):.4f}  "
            f"{seconds / 60:.1f} min, about {left / 60:.0f} left",
            file=sys.stderr,
            flush=True,
        )


def fit(
    model: AlignModel,
    data: TrainingSet,
    checkpoints: ResumableCheckpoint,
    steps: int,
    seed: int,
) -> None:
    """Trains through the stages, under one schedule, on from the last checkpoint."""
    model.compile(optimizer=make_optimizer(steps))
    step = checkpoints.restore(model)
    callbacks, epochs = [Progress(steps, step), checkpoints], 0
    for side, length, drawings_share in STAGES:
        first, epochs = epochs, epochs + round(length * steps / STEPS / STEPS_PER_EPOCH)
        first = max(first, step // STEPS_PER_EPOCH)
        if first < epochs:
            model.fit(
                make_dataset(data, side, BATCH_SIZE, drawings_share, seed + first),
                initial_epoch=first,
                epochs=epochs,
                steps_per_epoch=STEPS_PER_EPOCH,
                shuffle=False,  # the dataset is
                callbacks=callbacks,
                verbose=0,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=BUNDLED["align-tiny"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(arguments.seed)

    concepts = read_concepts()
    parts = split(concepts, arguments.seed)
    trained, held_out = clipart.split(clipart.read_drawings(), arguments.seed)
    vocab_size = AlignConfig.from_preset("align-tiny").text_config.vocab_size
    steps, seed = arguments.steps, arguments.seed
    folder = CACHE / f"training-{steps}-{seed}"
    data, tokenizer = make_training_set(
        concepts, parts, trained, vocab_size, seed, folder / "vocab.txt"
    )
    model = make_model(len(tokenizer.vocab))
    side = model.config.vision_config.image_size
    image_processor = AlignImageProcessor(size=side, crop_size=side, do_center_crop=False)
    processor = AlignProcessor(image_processor, tokenizer)
    print(
        f"{len(data.pictures)} pictures of {len(data.concepts)} concepts and "
        f"{len(data.drawings)} titles, "
        f"{len(tokenizer.vocab)} tokens, {model.count_params():,} parameters",
        file=sys.stderr,
    )
    checkpoints = ResumableCheckpoint(folder, processor, keep=1)
    fit(model, data, checkpoints, steps, seed)

    model.save_pretrained(arguments.output, dtype="float16")
    processor.save_pretrained(arguments.output)
    model = AlignModel.from_pretrained(arguments.output)
    figures = evaluate(model, processor, concepts, parts, held_out)
    write_examples(arguments.output / "examples", concepts, parts)
    print(write_card(arguments.output, model, figures))


if __name__ == "__main__":
    main()
