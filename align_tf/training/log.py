"""What a training says: its header, how it goes, in `metrics.jsonl` and for trackers."""

import contextlib
import json
import math
import pathlib
import tempfile
import time
from typing import Any

import keras
from keras import ops

from align_tf import addresses, files
from align_tf.data.mixing import Mixture
from align_tf.data.sources import Source
from align_tf.models.fit_watch import check_contrast
from align_tf.progress import Bar
from align_tf.terminal import say
from align_tf.training import devices, hosts, trackers
from align_tf.training.recipe import Recipe

METRICS_NAME = "metrics.jsonl"

# Of what a validation finds, what ends so is shown; `metrics.jsonl` has all.
VALIDATION_SHOWN = ("val_loss", "r1_i2t", "r1_t2i", "r5_i2t", "r5_t2i", "top1")


def say_header(
    recipe: Recipe, model: keras.Model, opened: Source | Mixture, device_count: int
) -> None:
    """Says on stderr what is trained, on what and for how long.

    Args:
        recipe: the settings, its steps counted.
        model: the model, compiled.
        opened: its data.
        device_count: how many devices share a batch.
    """
    _say_data(recipe, opened)
    share = f"{device_count} of " if device_count < devices.count_devices() else ""
    say(f"Devices: {share}{devices.describe_devices()}, {recipe.dtype}")
    trained = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    adapted = "" if recipe.lora_rank is None else f", LoRA of rank {recipe.lora_rank}"
    frozen = [_said_frozen(tower, blocks) for tower, blocks in recipe.frozen().items()]
    if recipe.batch_norm == "frozen" or (recipe.batch_norm is None and recipe.model is not None):
        frozen.append("BatchNorm")
    end = f"; frozen: {', '.join(frozen)}" if frozen else ""
    say(f"Training: {trained:,} of {model.count_params():,} weights{adapted}{end}")
    say(
        f"Optimizer: {recipe.optimizer}, learning_rate {recipe.learning_rate:g}, warmup_steps "
        f"{recipe.warmup_steps:,}, schedule {recipe.schedule}"
    )
    say(
        f"Steps: {recipe.steps:,}, {opened.count // recipe.batch_size:,} an epoch; a line every "
        f"{recipe.log_every:,}, a checkpoint every {recipe.save_every:,}"
    )


def _say_data(recipe: Recipe, opened: Source | Mixture) -> None:
    """Says what a training is on, and of several sources how much and how often each is read."""
    names, in_a_batch = recipe.said_data(), f"{recipe.batch_size:,} in a batch"
    if len(names) == 1:
        say(f"Data: {names[0]}, {opened.count:,} pairs, {in_a_batch}")
        return
    say(f"Data: {len(names)} sources, {opened.count:,} pairs, {in_a_batch}")
    drawn = opened.drawn(recipe.steps * recipe.batch_size)
    for name, source, pairs in zip(names, opened.sources, drawn, strict=True):
        say(f"  {name}: {source.count:,} pairs, each {pairs / source.count:.3g} times in all")


def _said_frozen(tower: str, blocks: list[int] | None) -> str:
    name = {"text": "the text tower", "vision": "the image tower"}[tower]
    return name if blocks is None else f"blocks {', '.join(map(str, blocks))} of {name}"


class Log(keras.callbacks.Callback):
    """Tells how the training goes: on stderr, in `metrics.jsonl` and to the trackers asked for.

    It is entered before `fit`, and left after it. Each value is the mean since the line before it.
    On a terminal a bar is beside the lines.

    Args:
        recipe: the settings.
        output: the folder of the training; to a remote one the files are sent with checkpoints.
        step: steps taken before; later lines of `metrics.jsonl` are of a run that was killed,
            and go.
        epoch_steps: steps of a pass over the data; None where that is not known.
        bar: shows the steps on a terminal.
    """

    def __init__(
        self, recipe: Recipe, output: addresses.Place, step: int, epoch_steps: int | None, bar: Bar
    ) -> None:
        super().__init__()
        self.recipe, self.step, self.epoch_steps, self.bar = recipe, step, epoch_steps, bar
        self.output = self.folder = output
        self.tells = hosts.is_first()  # all of several processes count alike
        if not addresses.is_local(output):
            self.copies = tempfile.TemporaryDirectory(prefix="align_tf-")
            self.folder = pathlib.Path(self.copies.name)
        self.path = self.folder / METRICS_NAME
        self.trackers = contextlib.ExitStack()
        self.first: tuple[int, float] | None = None  # step and time when the model is compiled
        self.marked: tuple[int, float] | None = None  # those since which steps alone are timed
        if not self.tells:
            return
        kept = addresses.content(output / METRICS_NAME) or b""
        lines = kept.decode(errors="replace").splitlines()
        files.write_text(self.path, "".join(f"{x}\n" for x in lines if _step_of(x) <= step))

    def __enter__(self) -> "Log":
        if self.tells:
            started = trackers.started(self.recipe, self.output, self.folder)
            self.track = self.trackers.enter_context(started)
        return self

    def __exit__(self, *error: Any) -> None:
        self.trackers.__exit__(*error)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        hosts.say_first("Compiling the first step, which takes longer than those after it ...")

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.step += 1
        now = time.monotonic()
        self.bar.advance(1, f"loss {logs['loss']:.4f}")
        if self.first is None:
            self.first = self.marked = (self.step, now)
        if self.step % self.recipe.log_every and self.step != self.recipe.steps:
            return
        model = self.model
        values = {
            **logs,
            "temperature": float(ops.convert_to_numpy(model.temperature)),
            "learning_rate": float(ops.convert_to_numpy(model.optimizer.learning_rate)),
        }
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if getattr(optimizer, "gradient_norm", None) is not None:
            values["gradient_norm"] = float(ops.convert_to_numpy(optimizer.gradient_norm))
        line = f"{self._place()}  loss {values['loss']:.4f}  "
        line += f"temperature {values['temperature']:.4f}  rate {values['learning_rate']:.2e}"
        if self.step > self.marked[0]:
            seconds = (now - self.marked[1]) / (self.step - self.marked[0])
            values["images_per_second"] = self.recipe.batch_size / seconds
            # With the checkpoints and validations between the steps.
            seconds = (now - self.first[1]) / (self.step - self.first[0])
            left = _duration((self.recipe.steps - self.step) * seconds)
            line += f"  {values['images_per_second']:.1f} images/s  {left} left"
        self.marked = (self.step, now)
        hosts.say_first(line)
        self._write(values)
        check_contrast(model, f"step {self.step}")
        model.reset_metrics()

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self.first is not None:  # a checkpoint was written, and validated
            self.marked = (self.step, time.monotonic())

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        values = {key: value for key, value in logs.items() if key.startswith("val_")}
        if values:
            shown = [key for end in VALIDATION_SHOWN for key in values if key.endswith(end)]
            shown = "  ".join(f"{key} {values[key]:.4f}" for key in shown)
            hosts.say_first(f"{self._place()}  {shown}")
            self._write(values)
        self._send()

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        self.bar.advance(0, "validating")

    def _place(self) -> str:
        place = f"step {self.step}/{self.recipe.steps}"
        if not self.epoch_steps:
            return place
        epoch, epochs = (math.ceil(n / self.epoch_steps) for n in (self.step, self.recipe.steps))
        return f"{place}  epoch {epoch}/{epochs}"

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._send()

    def _send(self) -> None:
        """Copies what was logged beside the checkpoints, where these are remote."""
        if self.tells and self.folder is not self.output:
            addresses.send_folder(self.folder, self.output)

    def _write(self, values: dict[str, float]) -> None:
        if not self.tells:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.track(self.step, values)


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite where a kill has cut it."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
