"""What a training is validated on, and what it does by that: keeps the best, ends early."""

import functools
import itertools
import json
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from align_tf import addresses
from align_tf.data.dataset import make_dataset
from align_tf.evaluation import tasks
from align_tf.evaluation.embedder import Embedder
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.training import hosts
from align_tf.training.callbacks import RetrievalEvaluation, ZeroShotFolders
from align_tf.training.recipe import Recipe, lower_is_better


def make_validation(
    recipe: Recipe, processor: AlignProcessor, lengths: Sequence[int]
) -> tuple[Any, list]:
    """Opens the sets of a recipe's `validation_data`.

    Args:
        recipe: the settings.
        processor: prepares images and texts.
        lengths: that texts are padded to.

    Returns:
        The batches whose loss `fit` measures, those of the first set of pairs, or None; and the
        callbacks that measure the figures of each set.

    Raises:
        FileNotFoundError, ValueError: a set is not there, or none that its task can measure.
    """
    first, callbacks = None, []
    for name, options in recipe.validations().items():
        if options["task"] == "zero-shot":
            absent = dict.fromkeys(("labels", "templates", "image_key", "caption_key"))
            if "labels" in options:  # a file of them, of which the command takes a list
                options = {**options, "labels": [options["labels"]]}
            options = types.SimpleNamespace(**{**absent, **options})
            opened = tasks.read(options)
            callbacks.append(ZeroShotFolders(processor, options, opened, name=name))
            continue
        opened = functools.partial(
            make_dataset,
            options["data"],
            processor,
            length_buckets=lengths,
            max_errors=recipe.max_errors,
        )
        # Retrieval is among the pairs of all processes; of their loss each finds its part.
        dataset = opened(batch_size=recipe.batch_size)
        callbacks.append(RetrievalEvaluation(Passes(dataset), name=name))
        index, processes = hosts.place()
        if first is None and processes > 1:
            dataset = opened(batch_size=recipe.batch_size // processes, shard=(index, processes))
        first = dataset if first is None else first
    once = functools.lru_cache(maxsize=1)(Embedder)  # of a model, whose towers are traced once
    for callback in callbacks:
        callback.make_embedder = once
    return first, callbacks


class Passes:
    """The passes over a data set, by one iterator: another one takes most of a second.

    Args:
        dataset: one that ends.
    """

    def __init__(self, dataset: tf.data.Dataset) -> None:
        self.dataset, self.steps = dataset, count_steps(dataset)
        self._iterator: Iterator | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.steps is None:
            yield from self.dataset
            return
        # A pass that breaks off leaves none behind.
        iterator, self._iterator = self._iterator, None
        iterator = iter(self.dataset.repeat()) if iterator is None else iterator
        yield from itertools.islice(iterator, self.steps)
        self._iterator = iterator


def count_steps(dataset: tf.data.Dataset) -> int | None:
    """Returns the batches of a data set that ends, or None where only a pass tells."""
    steps = int(dataset.cardinality())
    return steps if steps >= 0 else None


class Best(keras.callbacks.Callback):
    """Knows the best validation of a training, and ends one that no longer gets better.

    Args:
        recipe: the settings.
        metrics: the file of its figures, of which those up to `step` count.
        step: steps taken before.
    """

    def __init__(self, recipe: Recipe, metrics: addresses.Place, step: int) -> None:
        super().__init__()
        self.key, self.patience = recipe.watched(), recipe.early_stop
        self.values: dict[int, float] = {}  # of each step that was validated
        for line in (addresses.content(metrics) or b"").decode(errors="replace").splitlines():
            self._read(line, step)

    def _read(self, line: str, last: int) -> None:
        try:
            values = json.loads(line)
        except ValueError:  # cut by a kill
            return
        if self.key in values and values["step"] <= last:
            self.values[values["step"]] = values[self.key]

    @property
    def step(self) -> int | None:
        """The step whose figure is the best, the first of equal ones; None before there is one."""
        sign = -1 if lower_is_better(self.key or "") else 1
        finite = {step: value for step, value in self.values.items() if math.isfinite(value)}
        return max(finite, key=lambda step: sign * finite[step], default=None)

    @property
    def over(self) -> bool:
        """Whether as many validations as `early_stop` says have brought nothing better."""
        if self.patience is None or self.step is None:
            return False
        return sum(step > self.step for step in self.values) >= self.patience

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self.key is None:
            return
        self.values[self.model.trained_batches] = float(logs[self.key])
        if self.over:
            hosts.say_first(
                f"No better {self.key} in {self.patience} validations than "
                f"{self.values[self.step]:.4f} at step {self.step}: done."
            )
            self.model.stop_training = True
