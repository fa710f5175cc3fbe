"""Optimizers and learning rate schedule: LAMB and AdamW with a rate for each tower and depth."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

OPTIMIZERS = ("lamb", "adamw")
SCHEDULES = ("linear", "cosine", "constant")

# Variables that are no kernel and no embedding: weight decay would only pull them from where
# normalisation and temperature put them (the original excludes them too).
NOT_DECAYED = ("gamma", "beta", "bias", "logit_bias", "temperature")

# Numbers of a weight up to which it takes LAMB's step joined with others: of align-base's 906
# weights 706, 2 % of their numbers; the others have 16 sizes.
JOINED = 2**16


@keras.saving.register_keras_serializable(package="align_tf")
class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that rises in a line from zero, then decays to zero.

    The formulas are those of Hugging Face's `get_linear_schedule_with_warmup`,
    `get_cosine_schedule_with_warmup` and `get_constant_schedule_with_warmup`.

    Args:
        learning_rate: the rate at the end of the warmup.
        warmup_steps: steps of the rise; the very first step has rate zero. 0 starts at the top.
        total_steps: the step at which the rate is zero again.
        decay: `linear`, `cosine`, or `constant` for none.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, learning_rate: float, warmup_steps: int, total_steps: int, decay: str = "linear"
    ) -> None:
        super().__init__()
        if decay not in SCHEDULES:
            raise ValueError(f"schedule={decay!r}: expected one of {', '.join(SCHEDULES)}")
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"warmup_steps={warmup_steps!r}: expected 0 or more, and fewer than the "
                f"{total_steps} steps of the training"
            )
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay = decay

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        rise = step / max(1, self.warmup_steps)
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        done = ops.clip(done, 0.0, 1.0)
        if self.decay == "linear":
            fall = 1.0 - done
        elif self.decay == "cosine":
            fall = 0.5 * (1.0 + ops.cos(math.pi * done))
        else:
            fall = ops.ones_like(done)
        return self.learning_rate * ops.where(step < self.warmup_steps, rise, fall)

    def get_config(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "decay": self.decay,
        }


class _OwnRates:
    """Gives each variable a learning rate of its own; Keras's optimizers have one for all.

    `rates` maps a variable's path to what its rate is multiplied by, 1 where it is not named.
    The weight decay of a variable follows its rate, as in PyTorch's parameter groups, and
    leaves out `NOT_DECAYED`.
    """

    rates: dict[str, float] = {}
    watches_gradients = False  # whether `gradient_norm` is kept

    def build(self, variables: list) -> None:
        if self.built:
            return
        self._own_rates = [self.rates.get(variable.path, 1.0) for variable in variables]
        self.exclude_from_weight_decay(var_list=[v for v in variables if v.name in NOT_DECAYED])
        super().build(variables)
        if self.watches_gradients:
            self.gradient_norm = self.add_variable(
                (), name="gradient_norm", aggregation="only_first_replica"
            )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient, variable, self._decay(variable, learning_rate))

    def _decay(self, variable: Any, learning_rate: Any) -> Any:
        """Decays a variable by its own rate, which it returns."""
        own_rate = self._own_rates[self._get_variable_index(variable)]
        if own_rate != 1.0:
            learning_rate = learning_rate * own_rate
        if self.weight_decay and self._use_weight_decay(variable):
            rate = ops.cast(learning_rate, variable.dtype)
            self.assign_sub(variable, variable * self.weight_decay * rate)
        return learning_rate

    def _apply_weight_decay(self, variables: list) -> None:
        pass  # Keras's takes one rate for all; `_decay` has each its own

    def _clip_gradients(self, gradients: list) -> list:
        if keras.backend.backend() == "tensorflow":
            return gradients  # a replica's share here; the sum is clipped below
        self._measure(gradients)
        return super()._clip_gradients(gradients)

    def _all_reduce_sum_gradients(self, grads_and_vars: list) -> list:
        """Sums the replicas' shares, then clips, so that the step is that of one device."""
        gradients, variables = zip(*super()._all_reduce_sum_gradients(grads_and_vars), strict=True)
        self._measure(gradients)
        return list(zip(super()._clip_gradients(gradients), variables, strict=True))

    def _measure(self, gradients: Sequence) -> None:
        """Keeps the norm of all gradients together, before they are clipped."""
        if self.watches_gradients:
            squares = [ops.sum(ops.square(ops.cast(g, "float32"))) for g in gradients]
            self.gradient_norm.assign(ops.sqrt(sum(squares)))

    def get_config(self) -> dict[str, Any]:
        own = {"rates": dict(self.rates), "watches_gradients": self.watches_gradients}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        rates, watches = config.pop("rates"), config.pop("watches_gradients", False)
        optimizer = super().from_config(config, custom_objects)
        optimizer.rates, optimizer.watches_gradients = rates, watches
        return optimizer


@keras.saving.register_keras_serializable(package="align_tf")
class Lamb(_OwnRates, keras.optimizers.Lamb):
    """Keras's LAMB (arXiv 1904.00962) with a rate for each variable.

    The weight decay is Keras's, `rate * weight_decay * weight` beside the step; Algorithm 2 of
    the paper has it inside the trust ratio.

    On TensorFlow what is not of a weight's norm is computed in one loop, and small weights, most of
    a thousand, take their step joined: Keras's operations, some forty a weight, read and write it a
    dozen times, and a loop of its own for each shape is compiled for as long as many steps take.
    """

    def _distributed_tf_update_step(
        self, distribution: Any, grads_and_vars: Sequence, learning_rate: Any
    ) -> None:
        joined: dict[Any, list] = {}
        for gradient, variable in grads_and_vars:
            small = math.prod(variable.shape) <= JOINED
            joined.setdefault(variable.dtype if small else id(variable), []).append(
                (gradient, variable)
            )
        for pairs in joined.values():
            gradients, variables = zip(*pairs, strict=True)
            arguments = (variables, gradients, learning_rate)
            distribution.extended.update(
                variables[0], self._step_joined, args=arguments, group=False
            )

    def _step_joined(
        self, _: Any, variables: Sequence, gradients: Sequence, learning_rate: Any
    ) -> None:
        """Takes the steps of variables of one dtype."""
        import tensorflow as tf

        learning_rate = tf.convert_to_tensor(learning_rate)  # may be a Keras variable
        rates = [self._decay(variable, learning_rate) for variable in variables]
        shapes = [variable.shape for variable in variables]
        indices = [self._get_variable_index(variable) for variable in variables]
        slots = [[kept[i] for i in indices] for kept in (self._momentums, self._velocities)]
        values = map(_join, (gradients, *slots))
        iterations = tf.convert_to_tensor(self.iterations)
        *moments, direction = _lamb_loop()(
            *values, iterations, self.beta_1, self.beta_2, self.epsilon
        )
        norms, moved = (  # halves of their squares
            _vector([tf.nn.l2_loss(value) for value in each])
            for each in (variables, _part(direction, shapes))
        )
        ratios = tf.where((norms > 0) & (moved > 0), tf.sqrt(norms / moved), 1.0)
        direction *= _spread(ratios * tf.cast(_vector(rates), direction.dtype), shapes)
        for assign, kept, value in (
            *zip([self.assign] * 2, slots, moments, strict=True),
            (self.assign_sub, variables, direction),
        ):
            for variable, part in zip(kept, _part(value, shapes), strict=True):
                assign(variable, part)


def _join(values: Sequence) -> Any:
    """Returns a vector of all; one alone as it is."""
    import tensorflow as tf

    if len(values) == 1:
        return tf.convert_to_tensor(values[0])
    shape = tf.constant([-1])  # once, and none of a vector: each of thousands of operations counts
    flat = [value if len(value.shape) == 1 else tf.reshape(value, shape) for value in values]
    return tf.concat(flat, axis=0)


def _vector(values: Sequence) -> Any:
    """Returns a vector of numbers; one alone as it is."""
    import tensorflow as tf

    return values[0] if len(values) == 1 else tf.stack(values)


def _part(joined: Any, shapes: Sequence) -> list:
    """Returns what `_join` has joined, each in its shape."""
    import tensorflow as tf

    if len(shapes) == 1:
        return [joined]
    parts = tf.split(joined, [math.prod(shape) for shape in shapes])
    return [
        part if len(shape) == 1 else tf.reshape(part, shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _spread(values: Any, shapes: Sequence) -> Any:
    """Returns what multiplies joined weights: each value as often as its shape has numbers.

    As `tf.repeat`, in a shape that XLA knows, and without a mask of all weights by the largest.
    """
    import tensorflow as tf

    if len(shapes) == 1:
        return values
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    steps = tf.scatter_nd(ends[:-1, None], tf.ones(len(shapes) - 1, "int32"), ends[-1:])
    return tf.gather(values, tf.cumsum(steps))


@functools.cache
def _lamb_loop() -> Callable:
    """Returns what finds LAMB's moments and direction, compiled by XLA."""
    import tensorflow as tf

    @tf.function(jit_compile=True, reduce_retracing=True)
    def direction(
        gradient: Any,
        momentum: Any,
        velocity: Any,
        iterations: Any,
        beta_1: float,
        beta_2: float,
        epsilon: float,
    ) -> tuple[Any, Any, Any]:
        step = tf.cast(iterations + 1, gradient.dtype)
        momentum += (gradient - momentum) * (1 - beta_1)
        velocity += (gradient * gradient - velocity) * (1 - beta_2)
        deviation = tf.sqrt(velocity / (1 - beta_2**step)) + epsilon
        return momentum, velocity, momentum / (1 - beta_1**step) / deviation

    return direction


@keras.saving.register_keras_serializable(package="align_tf")
class AdamW(_OwnRates, keras.optimizers.AdamW):
    """Keras's AdamW (arXiv 1711.05101) with a rate for each variable."""


def make_optimizer(
    model: keras.Model,
    *,
    optimizer: str = "lamb",
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-5,
    warmup_steps: int = 0,
    total_steps: int,
    schedule: str = "linear",
    text_rate: float = 1.0,
    vision_rate: float = 1.0,
    layer_decay: float = 1.0,
    clip_norm: float | None = None,
    ema_momentum: float | None = None,
    watch_gradients: bool = False,
) -> keras.optimizers.Optimizer:
    """Returns the optimizer of the paper's recipe (ALIGN, arXiv 2102.05918, section 5).

    Args:
        model: an AlignModel; its variables' paths carry the rates.
        optimizer: `lamb` or `adamw`.
        learning_rate: the rate after the warmup.
        weight_decay: of kernels and embeddings; BatchNorm, LayerNorm, biases and temperature
            have none.
        warmup_steps: see `WarmupDecay`.
        total_steps: see `WarmupDecay`.
        schedule: `linear`, `cosine` or `constant`, after the warmup.
        text_rate: multiplies the rate of the text tower and its projection.
        vision_rate: multiplies the rate of the image tower and its projection.
        layer_decay: multiplies the rate once more for each block that a layer lies below the
            projection (BEiT, arXiv 2106.08254, appendix); 1 gives all blocks one rate.
        clip_norm: longest norm of all gradients together, those of all replicas summed; None
            does not clip.
        ema_momentum: keep a moving average of the weights, which `fit` puts in their place when
            it ends; None keeps none.
        watch_gradients: keep the norm of each step's gradients, before they are clipped, as
            `gradient_norm`.

    Returns:
        An optimizer for `model.compile`.

    Raises:
        ValueError: an argument is out of range.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    settings = {"text_rate": text_rate, "vision_rate": vision_rate, "layer_decay": layer_decay}
    for key, value in {**settings, "learning_rate": learning_rate}.items():
        if not value > 0:
            raise ValueError(f"{key}={value!r}: expected a positive number")
    optimizer_class = {"lamb": Lamb, "adamw": AdamW}[optimizer]
    made = optimizer_class(
        WarmupDecay(learning_rate, warmup_steps, total_steps, schedule),
        weight_decay=weight_decay,
        global_clipnorm=clip_norm,
        use_ema=ema_momentum is not None,
        ema_momentum=0.99 if ema_momentum is None else ema_momentum,
        name=optimizer,
    )
    made.rates = learning_rates(model, **settings)
    made.watches_gradients = watch_gradients
    return made


def learning_rates(
    model: keras.Model, *, text_rate: float, vision_rate: float, layer_decay: float
) -> dict[str, float]:
    """Finds what the learning rate of each variable of an AlignModel is multiplied by.

    Args:
        model: an AlignModel.
        text_rate: see `make_optimizer`.
        vision_rate: see `make_optimizer`.
        layer_decay: see `make_optimizer`.

    Returns:
        Variable's path -> multiplier, without those of 1.
    """
    # part of the model: its rate, its blocks
    towers = {
        "text_model": (text_rate, len(model.text_model.blocks)),
        "text_projection": (text_rate, 0),
        "vision_model": (vision_rate, len(model.vision_model.blocks)),
        "image_projection": (vision_rate, 0),
    }
    rates = {}
    for variable in model.trainable_variables:
        part, _, rest = variable.path.removeprefix(f"{model.path}/").partition("/")
        if part not in towers:  # the temperature
            continue
        rate, blocks = towers[part]
        block = re.match(r"(?:layer|block)_(\d+)/", rest)
        depth = int(block[1]) + 1 if block else 0  # 0: embeddings, stem
        below = blocks + 1 - depth if blocks else 0
        rates[variable.path] = rate * layer_decay**below
    return {path: rate for path, rate in rates.items() if rate != 1.0}
