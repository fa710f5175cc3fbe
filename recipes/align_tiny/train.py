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
from card import write_card, write_examples
from dataset import TrainingSet, make_dataset, make_training_set
from emoji import read_concepts, split
from evaluate import evaluate

from align_tf import AlignConfig, AlignImageProcessor, AlignModel, AlignProcessor
from align_tf.checkpoint import BUNDLED

STEPS = 4800
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.0  # the things are few and each comes often: a sharp target is right
# While nothing is learned yet the temperature would rise and rise.
TEMPERATURE, TEMPERATURE_BOUNDS = 0.05, (0.02, 0.07)
# Small pictures teach faster; the last steps fit filters and BatchNorm to the full size.
# side in pixels, share of the steps, share of the epochs in which like things come together
STAGES = ((64, 0.8, 0.0), (96, 0.2, 0.0))
DRAWINGS_SHARE = 0.0  # of a batch: drawings with noisy captions; what they did: recipes/README.md
STEPS_PER_EPOCH = 50  # between two lines of progress and saves


def make_model(vocab_size: int) -> AlignModel:
    """Builds a fresh align-tiny."""
    config = AlignConfig.from_preset("align-tiny")
    text_config = dataclasses.replace(config.text_config, vocab_size=vocab_size)
    return AlignModel(
        dataclasses.replace(config, text_config=text_config, temperature_init_value=TEMPERATURE),
        label_smoothing=LABEL_SMOOTHING,
        temperature_bounds=TEMPERATURE_BOUNDS,
    )


def make_schedule(steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """A linear warmup and a cosine decay to zero."""
    warmup = min(WARMUP_STEPS, steps // 5)
    return keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=LEARNING_RATE, warmup_steps=warmup
    )


def make_optimizer(steps: int) -> keras.optimizers.Optimizer:
    """AdamW that leaves norms, biases, embeddings and the temperature undecayed."""
    optimizer = keras.optimizers.AdamW(
        make_schedule(steps), weight_decay=WEIGHT_DECAY, beta_2=0.98, global_clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay(
        var_names=["bias", "gamma", "beta", "temperature", "embeddings"]
    )
    return optimizer


class Checkpoint(keras.callbacks.Callback):
    """Saves the model after each epoch, and says on stderr how training goes."""

    def __init__(self, folder: pathlib.Path, steps: int):
        super().__init__()
        self.folder, self.steps, self.started = folder, steps, time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        done = int(self.model.optimizer.iterations)
        seconds = time.monotonic() - self.started
        print(
            f"step {done}/{self.steps}  loss {logs['loss']:.3f}  "
            f"temperature {float(self.model.temperature):.4f}  "
            f"{seconds / 60:.1f} min, about {seconds / done * (self.steps - done) / 60:.0f} left",
            file=sys.stderr,
            flush=True,
        )
        self.model.save_pretrained(self.folder, dtype="float16")


def fit(
    model: AlignModel,
    data: TrainingSet,
    folder: pathlib.Path,
    steps: int,
    drawings_share: float,
    seed: int,
) -> None:
    """Trains through the stages, under one schedule."""
    model.compile(optimizer=make_optimizer(steps))
    checkpoint, epochs = Checkpoint(folder, steps), 0
    for side, share, like_share in STAGES:
        first, epochs = epochs, epochs + round(share * steps / STEPS_PER_EPOCH)
        model.fit(
            make_dataset(data, side, BATCH_SIZE, drawings_share, like_share, seed + first),
            initial_epoch=first,
            epochs=epochs,
            steps_per_epoch=STEPS_PER_EPOCH,
            shuffle=False,  # the dataset is
            callbacks=[checkpoint],
            verbose=0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=BUNDLED["align-tiny"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--drawings-share", type=float, default=DRAWINGS_SHARE, help="of a batch, from openclipart"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(arguments.seed)

    concepts = read_concepts()
    parts = split(concepts, arguments.seed)
    trained, held_out = clipart.split(clipart.read_drawings(), arguments.seed)
    vocab_size = AlignConfig.from_preset("align-tiny").text_config.vocab_size
    data, tokenizer = make_training_set(
        concepts, parts, trained if arguments.drawings_share else [], vocab_size, arguments.seed
    )
    model = make_model(len(tokenizer.vocab))
    side = model.config.vision_config.image_size
    image_processor = AlignImageProcessor(size=side, crop_size=side, do_center_crop=False)
    AlignProcessor(image_processor, tokenizer).save_pretrained(arguments.output)
    print(
        f"{len(data.pictures)} pictures of {len(data.concepts)} concepts and "
        f"{len(data.drawings)} titles, "
        f"{len(tokenizer.vocab)} tokens, {model.count_params():,} parameters",
        file=sys.stderr,
    )
    steps, share = arguments.steps, arguments.drawings_share
    fit(model, data, arguments.output, steps, share, arguments.seed)

    model = AlignModel.from_pretrained(arguments.output)
    processor = AlignProcessor.from_pretrained(arguments.output)
    figures = evaluate(model, processor, concepts, parts, held_out)
    write_examples(arguments.output / "examples", concepts, parts)
    print(write_card(arguments.output, model, figures))


if __name__ == "__main__":
    main()
