"""Accumulation by cached embeddings (GradCache, arXiv 2101.06983): a large batch part by part.

The contrastive loss couples all pairs of a batch, so that gradients of parts do not add up to
the gradient of the whole. The embeddings do: they are computed part by part without keeping
activations, the loss of all of them gives the gradient at each embedding, and a second run of
each part, with the dropout of the first, carries it on to the weights. The loss too compares part
by part, so that the logits of all pairs are never there at once.

A part is every N-th row, so that the rows of each device stay on it. BatchNorm, where it trains,
takes the statistics of a part; rows of the batch again fill a part that is short.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from align_tf.models.sharded_state import spread, whole_beside
from align_tf.models.step_state import step_variables

EMBEDS = ("image_embeds", "text_embeds")


def accumulated_step(model: keras.Model, *state_and_data: Any) -> Any:
    """Takes the step of a whole batch in `model.accumulation` parts; as Keras's `train_step`.

    Args:
        model: an `AlignModel`.
        *state_and_data: what the backend's `train_step` takes.

    Returns:
        What the backend's `train_step` returns.
    """
    step = {"tensorflow": _tensorflow_step, "jax": _jax_step}[keras.backend.backend()]
    return step(model, *state_and_data)


class _Parts:
    """The parts of a batch, and the towers that run on one of them."""

    def __init__(self, model: keras.Model, x: dict[str, Any], fixed: list) -> None:
        self.model = model
        self.count = model.accumulation
        self.moving = step_variables(model)
        self.fixed = fixed  # (variable, value) of all but the weights that train
        self.rows = ops.shape(x["pixel_values"])[0]
        inputs = {key: x[key] for key in model.tower_inputs if x.get(key) is not None}
        self.x = {
            key: _split(_filled(value, self.count), self.count) for key, value in inputs.items()
        }

    def start(self) -> list:
        """The values of what a forward pass moves, before the first part."""
        values = {id(variable): value for variable, value in self.fixed}
        return [values[id(variable)] for variable in self.moving]

    def embed(self, weights: list, moving: list, index: Any) -> tuple[list, list]:
        """Runs both towers on one part; returns its embeddings and what it moved."""
        mapping = [
            *self.fixed,
            *zip(self.model.trainable_variables, weights, strict=True),
            *zip(self.moving, moving, strict=True),
        ]
        with keras.StatelessScope(whole_beside(self.model, mapping)) as scope:
            part = {key: value[:, index] for key, value in self.x.items()}
            output = self.model(part, training=True)
        moved = [scope.get_current_value(variable) for variable in self.moving]
        return [output[key] for key in EMBEDS], moved

    def embed_all(self, weights: list) -> tuple[list, list]:
        """Embeds part by part; returns the embeddings of the batch and what was moved."""

        def step(moving: list, index: Any) -> tuple[list, list]:
            embeds, moved = self.embed(weights, moving, index)
            return moved, embeds

        moved, embeds = _scan(step, self.start(), self.count, len(EMBEDS))
        return [_join(array, self.rows) for array in embeds], moved

    def gradients(self, weights: list, start: list, by_embeds: list, pull_back: Callable) -> list:
        """Adds to the gradients `start` what comes through the embeddings of each part."""
        by_embeds = [_split(array, self.count) for array in by_embeds]

        def step(carry: list, index: Any) -> tuple[list, list]:
            gradients, moving = carry
            by_part = [array[:, index] for array in by_embeds]
            added, moved = pull_back(
                lambda values: self.embed(values, moving, index), weights, by_part
            )
            return [[a + b for a, b in zip(gradients, added, strict=True)], moved], []

        return _scan(step, [start, self.start()], self.count, 0)[0][0]


def map_rows(function: Callable, rows: Any, others: Sequence, count: int, num_outputs: int) -> list:
    """Calls a function on rows in parts, one after the other, and keeps no activations of it.

    Args:
        function: takes int (r,), the numbers of some rows; (r, ...), these rows; and the others.
            Returns arrays (r,). Its gradient computes it again.
        rows: (n, ...).
        others: arrays that go to each call whole.
        count: how many parts; 1 calls the function as it is.
        num_outputs: how many arrays the function returns.

    Returns:
        What the function returns, of all rows: arrays (n,).
    """
    total = ops.shape(rows)[0]
    if count == 1:
        return list(function(ops.arange(total), rows, *others))
    numbers, parts = _split(ops.arange(total), count), _split(rows, count)
    others = [spread(array, rows=False) for array in others]  # once, and not for each part anew

    def step(carry: list, part: Any) -> tuple[list, list]:
        again = keras.remat(functools.partial(function, spread(numbers[:, part], rows=True)))
        return carry, list(again(spread(parts[:, part], rows=True), *others))

    return [_join(array, total) for array in _scan(step, [], count, num_outputs)[1]]


def _filled(value: Any, count: int) -> Any:
    """Repeats rows from the first on, to a multiple of `count`: zeros would move BatchNorm."""
    rows = ops.shape(value)[0]
    missing = -rows % count
    if isinstance(missing, int) and not missing:
        return value
    return ops.take(value, ops.arange(rows + missing) % rows, axis=0)


def _split(value: Any, count: int) -> Any:
    """(rows, ...) to (rows of a part, count, ...): row i * count + k is row i of part k.

    Rows of zeros fill the last; nothing reads what comes of them.
    """
    missing = -ops.shape(value)[0] % count
    if not isinstance(missing, int) or missing:
        value = ops.pad(value, [(0, missing)] + [(0, 0)] * (len(value.shape) - 1))
    return ops.reshape(value, (-1, count, *ops.shape(value)[1:]))


def _join(parts: Any, rows: Any) -> Any:
    """(count, rows of a part, ...) to (rows, ...)."""
    order = (1, 0, *range(2, len(parts.shape)))
    return ops.reshape(ops.transpose(parts, order), (-1, *parts.shape[2:]))[:rows]


def _scan(step: Callable, carry: Any, count: int, num_outputs: int) -> tuple[Any, list]:
    """Calls step(carry, index) -> (carry, outputs) in a loop of the graph; stacks the outputs."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.scan(step, carry, ops.arange(count))
    import tensorflow as tf

    # Keras's own scan expects outputs of the carry's shape on this backend.
    arrays = [tf.TensorArray("float32", count) for _ in range(num_outputs)]

    def body(index: Any, carry: Any, arrays: list) -> tuple[Any, Any, list]:
        carry, outputs = step(carry, index)
        arrays = [a.write(index, value) for a, value in zip(arrays, outputs, strict=True)]
        return index + 1, carry, arrays

    start = (tf.constant(0), carry, arrays)
    # One part at a time: several at once would take the memory of several.
    _, carry, arrays = tf.while_loop(
        lambda index, *_: index < count,
        body,
        start,
        parallel_iterations=1,
        maximum_iterations=count,  # XLA takes a gradient of no other loop
    )
    return carry, [array.stack() for array in arrays]


def _jax_step(model: keras.Model, state: tuple, data: Any) -> tuple[dict, tuple]:
    import jax

    weights, others, optimizer_state, metrics = state
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    parts = _Parts(model, x, list(zip(model.non_trainable_variables, others, strict=True)))
    embeds, moved = parts.embed_all(weights)

    def loss_of(weights: list, embeds: list) -> tuple[Any, tuple]:
        y_pred = dict(zip(EMBEDS, embeds, strict=True))
        loss, (_, _, updated) = model.stateless_compute_loss(
            weights, others, metrics, x, y, y_pred, sample_weight, training=True
        )
        mapping = list(zip(model.optimizer.variables, optimizer_state, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            scaled = model.optimizer.scale_loss(loss)
        return scaled, (loss, updated)

    def pull_back(embed: Callable, weights: list, by_part: list) -> tuple[list, list]:
        _, pull, moved = jax.vjp(embed, weights, has_aux=True)
        return pull(by_part)[0], moved

    grad = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    (_, (loss, metrics)), (gradients, by_embeds) = grad(weights, embeds)
    gradients = parts.gradients(weights, gradients, by_embeds, pull_back)
    weights, optimizer_state = model.optimizer.stateless_apply(optimizer_state, gradients, weights)
    y_pred = dict(zip(EMBEDS, embeds, strict=True))
    logs, metrics = model._update_metrics_variables(metrics, loss, x, y, y_pred, sample_weight)
    values = {id(variable): value for variable, value in zip(parts.moving, moved, strict=True)}
    others = [
        values.get(id(variable), value)
        for variable, value in zip(model.non_trainable_variables, others, strict=True)
    ]
    return logs, (weights, others, optimizer_state, metrics)


def _tensorflow_step(model: keras.Model, data: Any) -> dict:
    import tensorflow as tf

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    values = [(v, tf.convert_to_tensor(v.value)) for v in model.variables]
    trainable = {id(variable) for variable in model.trainable_variables}
    weights = [value for variable, value in values if id(variable) in trainable]
    parts = _Parts(model, x, values)
    embeds, moved = parts.embed_all(weights)

    def pull_back(embed: Callable, weights: list, by_part: list) -> tuple[list, list]:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            embeds, moved = embed(weights)
        return _gradients(tape, embeds, weights, by_part), moved

    with tf.GradientTape() as tape:
        tape.watch(embeds)
        y_pred = dict(zip(EMBEDS, embeds, strict=True))
        loss = model.compute_loss(x, y, y_pred, sample_weight, training=True)
        scaled = model.optimizer.scale_loss(loss)
    variables = [variable.value for variable in model.trainable_variables]
    gradients = _gradients(tape, scaled, [*variables, *embeds])
    gradients, by_embeds = gradients[: len(variables)], gradients[len(variables) :]
    gradients = parts.gradients(weights, gradients, by_embeds, pull_back)
    model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    for variable, value in zip(parts.moving, moved, strict=True):
        variable.assign(value)
    return model.compute_metrics(x, y, y_pred, sample_weight)


def _gradients(tape: Any, target: Any, sources: list, by_target: list | None = None) -> list:
    """Dense gradients, zero where the target does not depend on the source."""
    import tensorflow as tf

    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(target, sources, by_target, unconnected_gradients=zero)
    return [tf.convert_to_tensor(gradient) for gradient in gradients]
