"""A model's state in parts, spread over the devices that share its batch (ZeRO), on JAX.

Each device keeps a part of a large weight and of the optimizer's slots for it (arXiv 1910.02054,
stage 3). What computes gathers its weights whole, a block at a time; their gradient comes back
summed, a part on each device.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
from keras import layers, ops

from align_tf.models.step_state import step_variables

LEAST = 2**16  # elements of a variable; smaller ones are whole everywhere

# The ids of variables that are gathered for the first of several processes to save them. To compute
# with them takes what the others have, so one process would wait for another.
GATHERED: set[int] = set()
AFTER = "after `with align_tf.training.gathered(model):`, in all processes"

# Of JAX's error: the parts of a batch, and its rows.
UNEVEN = re.compile(r"axis 0 is partitioned (\d+) times, but the dimension size is (\d+)")


class ShardedState(keras.distribution.DataParallel):
    """Keras's `DataParallel`, with each large variable in parts on the devices of the batch.

    A dimension need not be a multiple of all devices, as few of EfficientNet's are of 256: the
    devices form a mesh of their number's prime factors, and each dimension takes those that
    divide it.

    Args:
        devices: as `DataParallel` takes them, several; Keras runs on JAX.
    """

    def __init__(self, devices: Sequence[Any]) -> None:
        super().__init__(devices=devices, auto_shard_dataset=False)
        import jax

        there = self.device_mesh.backend_mesh.devices
        factors = _prime_factors(there.size)
        names = [f"batch_{index}" for index in range(len(factors))]
        self.mesh = jax.sharding.Mesh(there.reshape(factors), names)

    def get_data_layout(self, data_shape: Sequence) -> keras.distribution.TensorLayout:
        axes = (self.mesh.axis_names, *[()] * (len(data_shape) - 1))
        return _Layout(self, axes)

    def get_variable_layout(self, variable: keras.Variable) -> keras.distribution.TensorLayout:
        return _Layout(self, self._axes(variable))

    def is_spread(self, variable: keras.Variable) -> bool:
        """Says whether a variable lies in parts."""
        return any(self._axes(variable))

    def _axes(self, variable: keras.Variable) -> list[tuple[str, ...]]:
        return spread_axes(tuple(variable.shape), dict(self.mesh.shape))


class _Layout(keras.distribution.TensorLayout):
    """A layout whose dimensions may each be spread over several axes of a mesh."""

    def __init__(self, distribution: ShardedState, axes: Sequence[tuple[str, ...]]) -> None:
        super().__init__([None] * len(axes), distribution.device_mesh)
        self._spread = distribution.mesh, axes

    @property
    def backend_layout(self) -> Any:
        import jax

        mesh, axes = self._spread
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def whole(layer: layers.Layer) -> Callable:
    """Wraps a layer so that it computes with its weights whole where its state is in parts.

    Within what is computed again for the gradient they are gathered again too.

    Args:
        layer: built, and of one dtype policy with the layer that calls it.

    Returns:
        What is called as the layer is; the layer itself where its weights are whole.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, ShardedState):
        return layer
    if not any(map(distribution.is_spread, layer.variables)):
        return layer

    def call(*args: Any, **options: Any) -> Any:
        moving = step_variables(layer)
        mapping = [
            (variable, _gathered(distribution, variable, ops.convert_to_tensor(variable.value)))
            for variable in layer.variables
        ]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            outputs = layer(*args, **options)
        for variable in moving:
            variable.assign(scope.get_current_value(variable))
        return outputs

    return call


def whole_beside(model: keras.Model, mapping: Iterable[tuple]) -> list[tuple]:
    """Gathers what an AlignModel has beside its towers, which gather their own weights.

    Args:
        model: an `AlignModel`.
        mapping: its variables, each with its value.

    Returns:
        The variables and values, those beside the towers whole.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, ShardedState):
        return list(mapping)
    towers = (model.text_model, model.vision_model)
    theirs = {id(variable) for tower in towers for variable in tower.variables}
    return [
        (variable, value if id(variable) in theirs else _gathered(distribution, variable, value))
        for variable, value in mapping
    ]


def spread(array: Any, *, rows: bool) -> Any:
    """Says on JAX how an array within a step lies on the devices that share its batch.

    Args:
        array: (n, ...); a scalar stays as it is.
        rows: whether each device has some of the rows; or all have all.

    Returns:
        The array.
    """
    distribution = _of_jax()
    if distribution is None or not array.shape:
        return array
    layout = distribution.get_data_layout(array.shape)
    if rows:
        return keras.distribution.distribute_tensor(array, layout)
    return _gathering(layout.backend_layout)(array)


def _gathered(distribution: ShardedState, variable: keras.Variable, value: Any) -> Any:
    if not distribution.is_spread(variable):
        return value
    return _gathering(distribution.get_variable_layout(variable).backend_layout)(value)


@functools.cache
def _gathering(parts: Any) -> Callable:
    """Returns what gathers an array from its parts, and leaves its gradient in parts."""
    import jax

    everywhere = jax.sharding.NamedSharding(parts.mesh, jax.sharding.PartitionSpec())

    @jax.custom_vjp
    def gather(value: Any) -> Any:
        return jax.lax.with_sharding_constraint(value, everywhere)

    gather.defvjp(
        lambda value: (gather(value), None),
        lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, parts),),
    )
    return gather


@contextlib.contextmanager
def on_devices(model: keras.Model) -> Iterator[None]:
    """Has a model or a batch that the devices of the scope cannot share be one line, on JAX.

    Args:
        model: what computes within.

    Raises:
        ValueError: the model was built outside of the scope, lies in parts outside of it or is
            gathered to be saved, or a batch leaves a remainder.
    """
    check_not_gathered(model)
    if keras.backend.backend() != "jax":
        yield
        return
    distribution = _of_jax()
    if distribution is None:
        _check_whole(model.variables, "the scope of `data_parallel`, in all processes")
        yield
        return
    devices = set(distribution.device_mesh.backend_mesh.devices.flat)
    for variable in state_of(model):
        there = getattr(variable.value, "devices", set)()  # of what is gathered, none
        if there != devices:
            raise ValueError(
                f"{variable.path}: not on the {len(devices)} devices of this scope; expected a "
                "model that is built and compiled within it"
            )
    try:
        yield
    except ValueError as error:
        uneven = UNEVEN.search(str(error))
        if uneven is None:
            raise
        parts, rows = uneven.groups()
        raise ValueError(
            f"a batch of {rows}: expected a multiple of the {parts} devices that share it; "
            "drop_remainder=True leaves out a last one that is smaller"
        ) from None


def check_own_rows() -> None:
    """Checks that this process has all rows that the scope's devices compute, for Keras to join.

    Raises:
        ValueError: other processes have some.
    """
    distribution = _of_jax()
    if distribution is not None and distribution.device_mesh.backend_mesh.is_multi_process:
        raise ValueError(
            "predict: other processes have some of the rows; expected `model(...)` of the same "
            "rows in all of them"
        )


def _of_jax() -> keras.distribution.DataParallel | None:
    """Returns the distribution of the scope, on JAX."""
    return keras.distribution.distribution() if keras.backend.backend() == "jax" else None


def state_of(model: keras.Model) -> list[keras.Variable]:
    """Lists the variables of a model, and its optimizer's where it has one."""
    optimizer = getattr(model, "optimizer", None)
    return [*model.variables, *(() if optimizer is None else optimizer.variables)]


def is_apart(value: Any) -> bool:
    """Says whether no process holds all of a variable's value."""
    return not (getattr(value, "is_fully_addressable", True) or value.is_fully_replicated)


def check_gathered(weights: Iterable[Any]) -> None:
    """Checks that weights which are read are whole in this process.

    Args:
        weights: variables; anything else is whole.

    Raises:
        ValueError: one lies in parts in several processes.
    """
    _check_whole(
        weights,
        "`with align_tf.training.gathered(model):` in all processes, and in it the first to save",
    )


def check_not_gathered(model: keras.Model) -> None:
    """Checks that all processes that share a model's state have it, to compute or to assign.

    Raises:
        ValueError: it is gathered for the first of them to save it.
    """
    for variable in model.variables if GATHERED else ():
        if id(variable) in GATHERED:
            raise ValueError(
                f"{variable.path}: gathered for the first process to save; expected to compute and "
                f"to assign {AFTER}"
            )


def _check_whole(weights: Iterable[Any], expected: str) -> None:
    for weight in weights:
        if is_apart(getattr(weight, "value", None)):
            raise ValueError(
                f"{weight.path}: this process has a part of it alone; expected {expected}"
            )


@contextlib.contextmanager
def undistributed() -> Iterator[None]:
    """Has Keras make no variable on other processes' devices, as it does when it saves."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


def spread_axes(shape: tuple[int, ...], mesh: dict[str, int]) -> list[tuple[str, ...]]:
    """Chooses how an array is cut, in as few dimensions as it can be.

    Args:
        shape: of the array.
        mesh: the axes of the mesh of devices, and how many each has.

    Returns:
        For each dimension the axes that it is spread over; none for a small array.
    """
    axes: list[tuple[str, ...]] = [()] * len(shape)
    if math.prod(shape) < LEAST:
        return axes
    left, count = dict(mesh), math.prod(mesh.values())

    def most(dimension: int) -> tuple[int, int]:
        return math.gcd(shape[dimension], count), shape[dimension]

    for dimension in sorted(range(len(shape)), key=most, reverse=True):
        size = shape[dimension]
        for name, parts in list(left.items()):
            if size % parts == 0:
                size //= parts
                axes[dimension] += (name,)
                del left[name]
    return axes


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        if number % divisor:
            divisor += 1
        else:
            factors.append(divisor)
            number //= divisor
    return factors
