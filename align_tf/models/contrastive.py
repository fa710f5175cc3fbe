"""Contrastive training: the loss of a batch's pairs, inside Keras's compile, fit and evaluate."""

import contextlib
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from align_tf.graph_errors import plain_errors
from align_tf.models.accumulation import EMBEDS, accumulated_step, map_rows
from align_tf.models.fit_watch import CONTRASTED, FitWatch, check_contrast, check_ends, watched
from align_tf.models.inputs import check_batches
from align_tf.models.loss import (
    contrastive_rows,
    gather_across_replicas,
    has_workers,
    initial_logit_bias,
    num_replicas,
    own_pairs,
    positive_pairs,
    reduce_directions,
    right_rows,
    sigmoid_rows,
    weighted_mean,
)
from align_tf.models.sharded_state import (
    check_not_gathered,
    check_own_rows,
    on_devices,
    whole_beside,
)
from align_tf.models.surgery import open_for_change

METRICS = ("loss", "loss_i2t", "loss_t2i", "accuracy_i2t", "accuracy_t2i", "temperature")

LEARNING_RATE = 1e-5  # of the optimizer where none is given: that of fine-tuning


class ContrastiveTraining:
    """What a model of two towers needs to be trained by the loss of its pairs."""

    def compile(
        self,
        optimizer: Any = None,
        loss: None = None,
        loss_weights: None = None,
        metrics: None = None,
        weighted_metrics: None = None,
        *,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
        accumulation: int = 1,
        remat: bool = False,
        loop_blocks: bool = False,
    ) -> None:
        """Prepares the model for `fit`; the loss and the metrics are its own.

        Args:
            optimizer: as Keras takes it, where a name has Keras's learning rate, 1e-3 of `adamw`;
                None takes AdamW at 1e-5, for fine-tuning.
            loss, loss_weights: None; see `use_sigmoid_loss` for the other loss.
            metrics, weighted_metrics: None; `align_tf.training.RetrievalEvaluation` adds figures.
            run_eagerly: do not compile the step.
            steps_per_execution: batches that one call runs.
            jit_compile: compile the step by XLA.
            auto_scale_loss: scale the loss of a mixed_float16 model.
            accumulation: parts that a batch goes through the towers in, one after the other, to
                the step of the whole batch with the activations of one part (GradCache,
                arXiv 2101.06983); see `align_tf.models.accumulation`.
            remat: compute the activations inside a block again for its gradient instead of
                keeping them: less memory, more time.
            loop_blocks: on JAX, run blocks that are alike in a loop, which is compiled once and
                keeps less: for a TPU; see `align_tf.models.block_loop`.

        Raises:
            ValueError: a loss or a metric is given, accumulation is not a positive integer, or
                loop_blocks on another backend.
        """
        losses = {"loss": loss, "loss_weights": loss_weights}
        _check_own(losses, metrics=metrics, weighted_metrics=weighted_metrics)
        if not isinstance(accumulation, int) or accumulation < 1:
            raise ValueError(f"accumulation={accumulation!r}: expected a positive integer")
        if loop_blocks and keras.backend.backend() != "jax":
            raise ValueError("loop_blocks=True: the loop is JAX's; expected KERAS_BACKEND=jax")
        if optimizer is None:
            optimizer = keras.optimizers.AdamW(LEARNING_RATE)
        self._keep_frozen()  # whatever was set of a layer alone
        super().compile(
            optimizer=optimizer,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        self.accumulation = accumulation
        for tower in (self.text_model, self.vision_model):
            tower.remat, tower.loop_blocks = remat, loop_blocks

    def get_compile_config(self) -> dict[str, Any]:
        if not self.compiled:
            return {}
        tower = self.vision_model
        options = {"remat": tower.remat, "loop_blocks": tower.loop_blocks}
        options["accumulation"] = self.accumulation
        return {**super().get_compile_config(), **options}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x: Any = None,
        y: None = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: Any = 1,
    ) -> keras.callbacks.History:
        """As Keras's `fit`, on pairs alone, and with the sample_weight of arrays.

        Raises:
            ValueError: there are targets or weights of classes, the data is endless and no number
                of steps is given, or an epoch held no usable pair, or no two in a batch.
        """
        _check_no_classes(class_weight)
        check_ends(x, steps_per_epoch, "steps_per_epoch")
        check_ends(validation_data, validation_steps, "validation_steps")
        x, y = self._with_weight(x, y, sample_weight)
        if validation_data is not None:  # of (x, None, weight) Keras drops the weight
            validation_data = keras.utils.unpack_x_y_sample_weight(validation_data)
            validation_data, _ = self._with_weight(*validation_data)
        with on_devices(self), plain_errors():
            return super().fit(
                x,
                y,
                batch_size,
                epochs,
                verbose,
                watched(callbacks, FitWatch(), self),
                validation_split=validation_split,
                validation_data=validation_data,
                shuffle=shuffle,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                validation_batch_size=validation_batch_size,
                validation_freq=validation_freq,
            )

    def evaluate(
        self,
        x: Any = None,
        y: None = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        **kw: Any,
    ) -> Any:
        """As Keras's `evaluate`; see `fit`."""
        check_ends(x, steps, "steps")
        x, y = self._with_weight(x, y, sample_weight)
        with on_devices(self), plain_errors():
            logs = super().evaluate(x, y, batch_size, verbose, steps=steps, **kw)
        check_contrast(self, "the data")
        return logs

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> dict[str, Any]:
        """As Keras's `predict`; see `predict_step`.

        Raises:
            ValueError: the rows are spread over several processes, or the data is endless and no
                number of steps is given.
        """
        check_ends(x, steps, "steps")
        check_own_rows()
        x, _ = self._with_weight(x, None, None)
        with on_devices(self), plain_errors():
            return super().predict(x, batch_size, verbose, steps, callbacks)

    def train_on_batch(
        self,
        x: Any,
        y: None = None,
        sample_weight: Any = None,
        class_weight: None = None,
        return_dict: bool = False,
    ) -> Any:
        """As Keras's `train_on_batch`, on a dict of pairs; see `fit`.

        Raises:
            ValueError: as `fit`; or on TensorFlow several replicas would each take the batch whole.
        """
        _check_no_classes(class_weight)
        x, y = self._one_batch(x, y, sample_weight)
        with on_devices(self), plain_errors():
            return super().train_on_batch(x, y, return_dict=return_dict)

    def test_on_batch(
        self, x: Any, y: None = None, sample_weight: Any = None, return_dict: bool = False
    ) -> Any:
        """As Keras's `test_on_batch`, on a dict of pairs; see `train_on_batch`."""
        x, y = self._one_batch(x, y, sample_weight)
        with on_devices(self), plain_errors():
            return super().test_on_batch(x, y, return_dict=return_dict)

    def predict_on_batch(self, x: Any) -> dict[str, Any]:
        """As Keras's `predict_on_batch`, on a dict of pairs; see `predict`."""
        check_own_rows()
        x, _ = self._one_batch(x, None, None)
        with on_devices(self), plain_errors():
            return super().predict_on_batch(x)

    def _one_batch(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any]:
        """Takes a batch as `_with_weight` does, which Keras gives to the devices as it is."""
        strategy = getattr(self, "_distribute_strategy", None)  # TensorFlow's alone
        if strategy is not None and strategy.num_replicas_in_sync > 1:
            raise ValueError(
                f"a batch by itself: each of {strategy.num_replicas_in_sync} replicas would take "
                "all of it; expected fit, evaluate or predict, which share it"
            )
        if not isinstance(x, Mapping):
            raise ValueError(f"a batch of {type(x).__name__}: expected a dict of pixel_values, ...")
        return self._with_weight(x, y, sample_weight)

    def _with_weight(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any]:
        """Moves the sample weight of arrays into the batch."""
        _check_no_targets(y)
        if x is None:
            raise ValueError("x: missing; expected a data set, or a dict of pixel_values, ...")
        x = dict(x) if isinstance(x, Mapping) else x
        if isinstance(x, dict) or hasattr(x, "shape"):
            self._check_inputs(x)  # here, since on JAX a step that fails takes the weights with it
            _check_rows(x)
        if batch := check_batches(x):
            self._check_inputs(batch)
        if isinstance(x, types.GeneratorType):  # of which Keras takes tuples alone
            x = ((batch,) if isinstance(batch, Mapping) else batch for batch in x)
        if not isinstance(x, dict):
            if sample_weight is not None:
                raise ValueError(
                    "sample_weight beside a dataset: expected it as a key of its batches"
                )
            return x, y
        given = [w for w in (x.get("sample_weight"), sample_weight) if w is not None]
        for weight in given:
            _check_weight(weight, len(x["pixel_values"]))
        return {**x, "sample_weight": product(*given)} if given else x, y

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The loss of a batch of pairs, against the negatives of all replicas.

        Each replica takes the whole loss of the global batch and its share of it, so that the
        gradients that a distribution strategy sums are those of one device.

        Args:
            x: the batch; its `image_ids`, `text_ids` and `sample_weight` count, see `call`.
            y: None.
            y_pred: what `call` returns.
            sample_weight: (n,), times the one in `x`.
            training: not used.

        Raises:
            ValueError: there are targets.
        """
        _check_no_targets(y)
        ids = [gather_across_replicas(x.get(key)) for key in ("image_ids", "text_ids")]
        weight = gather_across_replicas(product(x.get("sample_weight"), sample_weight))
        images, texts = (gather_across_replicas(y_pred[key]) for key in EMBEDS)
        values = {}
        for name, rows, columns in (("t2i", texts, images), ("i2t", images, texts)):
            loss, accuracy = self._compare(rows, columns, ids, weight)
            values |= {f"loss_{name}": loss, f"accuracy_{name}": accuracy}
        loss = reduce_directions(values["loss_t2i"], values["loss_i2t"], self.loss_reduction)
        loss += sum(self.losses)
        weight = ops.ones(ops.shape(images)[0]) if weight is None else weight
        self._update_metrics({"loss": loss, **values}, weight)
        return loss / num_replicas()

    def _compare(self, rows: Any, columns: Any, ids: list, weight: Any) -> tuple[Any, Any]:
        """Returns the loss and the accuracy of one direction, of all (n, d) by all (n, d).

        An accumulated batch makes its (n, n) logits part by part too.
        """

        def compare(index: Any, part: Any, columns: Any, *scale: Any) -> tuple[Any, Any]:
            logits = similarities(part, columns, *scale)
            positives = positive_pairs(*ids, rows=index)
            if positives is None:
                positives = own_pairs(logits, index)
            losses = self._loss_rows(logits, positives, weight)
            return losses, right_rows(logits, positives, weight)

        # As values: what is computed again for the gradient takes no variables.
        scale = [ops.convert_to_tensor(variable.value) for variable in self._scale()]
        of_rows = map_rows(compare, rows, (columns, *scale), self.accumulation, num_outputs=2)
        return tuple(weighted_mean(values, weight) for values in of_rows)

    def _loss_rows(self, logits: Any, positives: Any, weight: Any) -> Any:
        """Returns the loss of each row, (r,)."""
        if self.has_logit_bias:
            return sigmoid_rows(logits, positives, weight)
        return contrastive_rows(logits, positives, weight, self.label_smoothing)

    def _update_metrics(self, values: dict[str, Any], weight: Any) -> None:
        for name, value in values.items():
            self.batch_metrics[name].update_state(value, sample_weight=ops.sum(weight))
        pairs = ops.sum(ops.cast(weight > 0, "float32"))
        self.batch_metrics[CONTRASTED].update_state(ops.cast(pairs > 1, "float32"))
        # Of the temperature the last value is wanted, not the mean.
        self.batch_metrics["temperature"].reset_state()
        self.batch_metrics["temperature"].update_state(self.temperature)

    @property
    def metrics(self) -> list:
        """Keras's, without the mean of `loss` over rows: filler rows would count in it."""
        keras_loss = getattr(self, "_loss_tracker", None)
        return [metric for metric in super().metrics if metric is not keras_loss]

    def get_metrics_result(self) -> dict[str, Any]:
        results = super().get_metrics_result()
        return {name: value for name, value in results.items() if name != CONTRASTED}

    def train_step(self, *state_and_data: Any) -> Any:
        self._check_batch(state_and_data)
        if self.accumulation == 1:
            return _over_workers(super().train_step(*state_and_data))
        return _over_workers(accumulated_step(self, *state_and_data))

    def test_step(self, *state_and_data: Any) -> Any:
        self._check_batch(state_and_data)
        return _over_workers(super().test_step(*state_and_data))

    def make_train_function(self, force: bool = False) -> Any:
        # Made within the step, an optimizer's variables would have TensorFlow trace it twice.
        if not self.optimizer.built:
            strategy = getattr(self, "_distribute_strategy", None)  # TensorFlow's alone
            with contextlib.nullcontext() if strategy is None else strategy.scope():
                self.optimizer.build(self.trainable_variables)
        made = super().make_train_function(force)
        self.train_function = _keeping_weights(self, self.train_function)
        return made

    def make_test_function(self, force: bool = False) -> Any:
        made = super().make_test_function(force)
        self.test_function = _keeping_weights(self, self.test_function)
        return made

    def make_predict_function(self, force: bool = False) -> Any:
        made = super().make_predict_function(force)
        self.predict_function = _keeping_weights(self, self.predict_function)
        return made

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Does nothing: the model is built as it is made.

        Under a strategy Keras would take a batch first and average its replicas, which of a dict
        fails between workers (keras issue 20329).
        """

    def stateless_call(
        self, trainable_variables: list, non_trainable_variables: list, *args: Any, **kw: Any
    ) -> Any:
        """As Keras's, which the steps of the JAX backend call."""
        pairs = (
            zip(self.trainable_variables, trainable_variables, strict=True),
            zip(self.non_trainable_variables, non_trainable_variables, strict=True),
        )
        values = [[value for _, value in whole_beside(self, group)] for group in pairs]
        return super().stateless_call(*values, *args, **kw)

    def predict_step(self, *state_and_data: Any) -> Any:
        """Keeps what batches can be joined in: the embeddings; (n, m) logits cannot.

        `sample_weight` goes along where the batch has one: a row of 0 is no pair.
        """
        self._check_batch(state_and_data)
        output = super().predict_step(*state_and_data)
        output, *state = output if isinstance(output, tuple) else (output,)
        joined = {key: output[key] for key in ("image_embeds", "text_embeds")}
        x, _, weight = keras.utils.unpack_x_y_sample_weight(state_and_data[-1])
        weight = product(x.get("sample_weight"), weight)
        if weight is not None:
            joined["sample_weight"] = weight
        return (joined, *state) if state else joined

    def _check_batch(self, state_and_data: tuple) -> None:
        # Here too: on JAX a step goes to `call` past `__call__`.
        x, _, _ = keras.utils.unpack_x_y_sample_weight(state_and_data[-1])
        self._check_inputs(x)

    @property
    def has_logit_bias(self) -> bool:
        """Whether the model has the learned bias of the sigmoid loss."""
        return self.config.logit_bias_init_value is not None

    def use_sigmoid_loss(self, batch_size: int) -> None:
        """Takes the pairwise sigmoid loss (SigLIP, arXiv 2303.15343); compile again after it.

        The logits get a learned bias, the weight `logit_bias`, which is saved with the model:
        from then on it trains by this loss, also after it is loaded again.

        Args:
            batch_size: pairs in a batch, over all replicas: the bias starts at
                log(p / (1 - p)), p = 1 / batch_size.

        Raises:
            ValueError: batch_size is not an integer of 2 or more; or LoRA is on, of which the bias
                is no part.
        """
        check_not_gathered(self)
        value = initial_logit_bias(batch_size)
        if self.base_frozen:
            raise ValueError(
                "the bias of the sigmoid loss is no part of an adapter: expected "
                "use_sigmoid_loss(batch_size) after merge_adapter(), or no LoRA"
            )
        added = not self.has_logit_bias
        self.config.logit_bias_init_value = value
        if not added:
            self.logit_bias.assign(value)
            return
        with open_for_change(self):
            self._add_logit_bias()


def _check_own(losses: dict[str, Any], **metrics: Any) -> None:
    """Checks that `compile` is given neither another loss nor metrics of targets."""
    for name, value in losses.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r}: expected None; AlignModel minimises its contrastive loss, or "
                "after use_sigmoid_loss(batch_size) the pairwise sigmoid loss"
            )
    for name, value in metrics.items():
        if value:
            raise ValueError(
                f"{name}={value!r}: expected None, as there are no targets to compare with; "
                f"{', '.join(METRICS)} are logged, and "
                "align_tf.training.RetrievalEvaluation in fit's callbacks adds to them"
            )


def _check_no_targets(y: Any) -> None:
    if y is not None:
        raise ValueError(
            "targets beside the batch: expected none; AlignModel learns from pairs alone, and "
            "what makes positives are the batch's image_ids and text_ids"
        )


def _check_no_classes(class_weight: Any) -> None:
    if class_weight is not None:
        raise ValueError("class_weight: expected None; pairs have no class, but sample_weight")


def _check_rows(batch: Mapping[str, Any]) -> None:
    rows = {
        name: value.shape[0]
        for name, value in batch.items()
        if name != "sample_weight" and getattr(value, "shape", ())  # that has a check of its own
    }
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} of {count}" for name, count in rows.items())
        raise ValueError(
            f"rows of pairs, {counts}: expected as many of each, an image and its text a row; "
            "for all images by all texts call model(inputs)"
        )


def _check_weight(weight: Any, rows: int) -> None:
    weight = np.asarray(weight)
    if weight.shape not in ((rows,), (rows, 1)) or not np.all(np.isfinite(weight) & (weight >= 0)):
        raise ValueError(
            f"sample_weight of shape {weight.shape}: expected {rows} finite numbers of 0 or more"
        )


def product(*weights: Any) -> Any:
    """Multiplies those of the sample weights that are given, (n,) or (n, 1); None for none."""
    given = [ops.reshape(ops.cast(w, "float32"), (-1,)) for w in weights if w is not None]
    return math.prod(given[1:], start=given[0]) if given else None


def _keeping_weights(model: keras.Model, function: Callable) -> Callable:
    """Has a model of the JAX backend keep its weights where an epoch ends in an error.

    Meanwhile they are in the state that goes from step to step alone.
    """
    if keras.backend.backend() != "jax" or hasattr(function, "keeps_weights"):
        return function

    def kept(state: tuple, iterator: Any) -> Any:
        try:
            return function(state, iterator)
        except StopIteration:  # the end of an epoch, after which Keras puts them back
            raise
        except BaseException:
            variables = [model.trainable_variables, model.non_trainable_variables]
            variables += [model.optimizer.variables] if len(state) == 4 else []
            variables += [model.metrics_variables] if len(state) > 2 else []
            for owners, values in zip(variables, state, strict=True):
                for variable, value in zip(owners, values, strict=True):
                    if not value.is_deleted():  # by a step that had begun
                        variable._value = value
            model._jax_state_synced = True
            raise

    kept.keeps_weights = True
    return kept


def _over_workers(logs: Any) -> Any:
    """Gives the logs of one of several workers the axis that Keras averages them over."""
    # `fit` reduces scalars over axis 0, an error (keras issue 20585).
    return {key: value[None] for key, value in logs.items()} if has_workers() else logs


def similarities(rows: Any, columns: Any, temperature: Any, bias: Any = None) -> Any:
    """Compares (r, d) with (n, d): cosines divided by the temperature, plus the bias if any."""
    logits = ops.matmul(rows, ops.transpose(columns)) / temperature
    return logits if bias is None else logits + bias
