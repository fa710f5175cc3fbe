"""The blocks of a tower in training on JAX: those that are alike share one loop, compiled once.

What XLA compiles for a TPU grows with the blocks, of which EfficientNet-B7 has 55; in a loop over
their stacked weights a body is compiled once for each kind. A block keeps for its gradient what is
dear to compute again, by `worth_keeping`. A CPU runs the loop in nearly twice the time of the
blocks.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import layers, ops

from align_tf.models.sharded_state import whole
from align_tf.models.step_state import step_variables

# Operations that take a TPU as long as to write a number of two bytes and to read it again: below
# them it is made again for the gradient, in no more time than it was kept. (v5e: 197e12 operations
# and 819e9 bytes a second, cloud.google.com/tpu/docs/v5e; a v6e has 2,240.)
DEAR = 960
# How many operations of the matrix unit pass in the time of one elsewhere, where depthwise
# convolutions are: four of 1,024 lanes at 1.5 GHz.
WITHOUT_MATRIX_UNIT = 32


def run_blocks(
    blocks: Sequence[layers.Layer], x: Any, *constants: Any, keep_inputs_alone: bool = False
) -> Any:
    """Runs blocks in training, one after the other.

    The numbers are those of the blocks called one by one: dropout draws from each block's own
    seed, and BatchNorm moves each block's own averages.

    Args:
        blocks: built.
        x: what the first one takes.
        constants: what each takes beside it, which no gradient flows to.
        keep_inputs_alone: a block keeps nothing but what it takes, and computes all of the rest
            again.

    Returns:
        What the last one gives.
    """
    for alike in _runs(blocks):
        x = _run_alike(alike, x, constants, keep_inputs_alone)
    return x


def worth_keeping(operation: Any, *arrays: Any, **options: Any) -> bool:
    """Says whether an operation's result is kept for the gradient, for `jax.checkpoint`.

    Args:
        operation: a primitive of JAX.
        arrays: the shapes of what it takes.
        options: its parameters.
    """
    name = operation.name
    if name == "conv_general_dilated":
        cost = 2 * math.prod(arrays[1].shape[:-1])
        return cost * (WITHOUT_MATRIX_UNIT if options["feature_group_count"] > 1 else 1) >= DEAR
    if name == "dot_general":
        (contracted, _), _ = options["dimension_numbers"]
        return 2 * math.prod(arrays[0].shape[axis] for axis in contracted) >= DEAR
    return name.startswith("reduce_")  # BatchNorm's statistics


def _run_alike(blocks: list, x: Any, constants: tuple, keep_inputs_alone: bool) -> Any:
    import jax

    first = blocks[0]
    variables, moving = first.variables, step_variables(first)
    keeps = _keep_rates(blocks)

    def body(x: Any, values: tuple) -> tuple[Any, list]:
        weights, keep = values
        mapping = list(zip(variables, weights, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            options = {} if keep is None else {"keep_rate": keep}
            outputs = whole(first)(x, *constants, training=True, **options)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return outputs, [scope.get_current_value(variable) for variable in moving]

    policy = None if keep_inputs_alone else worth_keeping
    body = jax.checkpoint(body, policy=policy, prevent_cse=len(blocks) == 1)
    values = [[ops.convert_to_tensor(v.value) for v in block.variables] for block in blocks]
    if len(blocks) == 1:
        x, moved = body(x, (values[0], None))
        moved = [moved]
    else:
        stacked = [ops.stack(same) for same in zip(*values, strict=True)]
        x, moved = jax.lax.scan(body, x, (stacked, keeps))
        moved = [[array[index] for array in moved] for index in range(len(blocks))]
    for block, after in zip(blocks, moved, strict=True):
        for variable, value in zip(step_variables(block), after, strict=True):
            variable.assign(value)
    return x


def _keep_rates(blocks: list) -> Any:
    """The chance of each block's branch to stay, float32 (blocks,); None where none is dropped."""
    rates = [_drop_rate(block) for block in blocks]
    return ops.array([1.0 - rate for rate in rates], "float32") if any(rates) else None


def _drop_rate(block: layers.Layer) -> float:
    drop_connect = getattr(block, "drop_connect", None)
    return 0.0 if drop_connect is None else drop_connect.rate


def _runs(blocks: Sequence[layers.Layer]) -> list[list[layers.Layer]]:
    """Cuts blocks into runs of those that one loop can take."""
    runs: list[list[layers.Layer]] = []
    before = None
    for block in blocks:
        kind = _kind(block)
        if kind == before:
            runs[-1].append(block)
        else:
            runs.append([block])
        before = kind
    return runs


def _kind(block: layers.Layer) -> tuple:
    """What two blocks have in common if the one computes as the other, but for its weights."""
    parts = [
        (type(part), _without_name(part, block))
        for part in block._flatten_layers(include_self=False)
    ]
    weights = [(v.shape, v.dtype, v.trainable) for v in block.variables]
    activation = getattr(block, "activation", None)  # which no configuration of a part tells
    return type(block), activation, parts, weights, _drop_rate(block) > 0


def _without_name(part: layers.Layer, block: layers.Layer) -> dict[str, Any]:
    config = {key: value for key, value in part.get_config().items() if key != "name"}
    if part is getattr(block, "drop_connect", None):
        del config["rate"]  # goes through the loop
    return config
