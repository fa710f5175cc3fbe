"""What `fit` watches: that it ends, its batches so far, and that there is something to learn."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

CONTRASTED = "contrasted"  # the metric, not shown: the share of batches that held two pairs or more

ENDLESS = -1  # tf.data.INFINITE_CARDINALITY, without importing TensorFlow on JAX


class FitWatch(keras.callbacks.Callback):
    """Counts the batches of a training, and ends one that nothing can come of."""

    async_safe = True  # else Keras would wait after each batch

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._before_epoch = self.model.trained_batches
        self._unchecked = f"epoch {epoch + 1}"

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        # Keras calls this from several threads, in any order, and with steps_per_execution counts
        # the last execution as a whole. `_model`: on JAX, `model` would fetch the weights.
        done = self._before_epoch + min(batch + 1, self.params.get("steps") or math.inf)
        self._model.trained_batches = max(done, self._model.trained_batches)

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        self._check()  # before the validation takes the metrics

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._check()

    def _check(self) -> None:
        if self._unchecked:
            check_contrast(self.model, self._unchecked)
            if self.params.get("steps") is None and self.model.steps_per_execution > 1:
                self.model.trained_batches = self._before_epoch + self._seen()
        self._unchecked = ""

    def _seen(self) -> int:
        """The batches that the metrics have seen in this epoch; each replica has counted them."""
        strategy = getattr(self.model, "_distribute_strategy", None)  # TensorFlow's alone
        replicas = 1 if strategy is None else strategy.num_replicas_in_sync
        return round(_number(self.model.batch_metrics[CONTRASTED].count) / replicas)


def watched(callbacks: Any, watch: FitWatch, model: keras.Model) -> Any:
    """Puts the watch before the callbacks that are given to `fit`, in whatever form it takes."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        watch.set_model(model)
        watch.set_params(callbacks.params or {})
        callbacks.callbacks.insert(0, watch)
        return callbacks
    if callbacks is None or isinstance(callbacks, keras.callbacks.Callback):
        callbacks = [callbacks] if callbacks else []
    return [watch, *callbacks]


def check_contrast(model: keras.Model, what: str) -> None:
    """Raises where the metrics have seen batches, and in none of them two pairs.

    Args:
        model: an `AlignModel`.
        what: what the batches are of, for the message.

    Raises:
        ValueError: there was no usable pair, or one alone in each batch.
    """
    contrasted, loss = (model.batch_metrics[name] for name in (CONTRASTED, "loss"))
    if not _number(contrasted.count) or _number(contrasted.total):
        return
    if not _number(loss.count):
        raise ValueError(
            f"{what}: no usable pair, so nothing to learn or to measure: every row has a "
            "sample_weight of 0, as those without a readable image or a caption have"
        )
    raise ValueError(
        f"{what}: one pair in each batch, so nothing to learn or to measure: a pair is told from "
        "the others of its batch; expected a batch_size of 2 or more"
    )


def check_ends(data: Any, steps: int | None, argument: str) -> None:
    """Raises where data is known to be endless, and the steps to take of it are not.

    Args:
        data: what `fit`, `evaluate` or `predict` is given; a tf.data.Dataset knows it.
        steps: how many are asked for.
        argument: the name of `steps`, for the message.

    Raises:
        ValueError: no steps are given.
    """
    if steps is None and is_endless(data):
        raise ValueError(
            f"an endless dataset: expected {argument}, the number of batches to take; "
            "make_dataset(training=True) is endless unless epochs is given"
        )


def is_endless(data: Any) -> bool:
    """Says whether data is a tf.data.Dataset, distributed or not, that knows that it has no end."""
    cardinality = getattr(data, "cardinality", None)  # of a distributed one it is a number
    cardinality = cardinality() if callable(cardinality) else cardinality
    return cardinality is not None and int(cardinality) == ENDLESS


def _number(variable: Any) -> float:
    return float(np.sum(ops.convert_to_numpy(variable)))
