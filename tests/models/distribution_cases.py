"""Trains the same batches on several devices; test_distribution.py starts it in processes.

    distribution_cases.py tensorflow COUNT    1 and COUNT virtual CPU devices
    distribution_cases.py jax COUNT
    distribution_cases.py workers COUNT       one of COUNT processes, which TF_CONFIG names

Prints one line for each case: its name, and a number. For most that is how far its weights after 5
steps are from those of one device.
"""

import contextlib
import functools
import sys
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from align_tf import AlignConfig, AlignModel
from align_tf.models import sharded_state
from align_tf.training import data_parallel, make_optimizer

rng = np.random.default_rng(0)
BATCH = {
    "pixel_values": rng.random((16, 16, 16, 3), "float32"),
    "input_ids": rng.integers(1, 40, (16, 6), "int32"),
    "image_ids": np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 12, 13, 3, 15], "int32"),
    "sample_weight": np.array([1, 1, 2, 1, 0, 1, 1, 3, 1, 1, 1, 1, 0, 0, 1, 1], "float32"),
}


def make_config(dropout: float, depth: int = 1) -> AlignConfig:
    return AlignConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "intermediate_size": 20,
            "max_position_embeddings": 16,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        },
        vision_config={
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3],
            "in_channels": [32],
            "out_channels": [16],
            "strides": [2],
            "num_block_repeats": [depth],
            "expand_ratios": [1],
            "hidden_dim": 8,
            "initializer_range": 0.5,
        },
        projection_dim=8,
        temperature_init_value=0.5,
    )


def make_model(
    *,
    sigmoid: bool = False,
    batch_norm: str = "frozen",
    dropout: float = 0.0,
    depth: int = 1,
    lora_rank: int | None = None,
):
    keras.utils.set_random_seed(0)
    model = AlignModel(make_config(dropout, depth))
    if sigmoid:
        model.use_sigmoid_loss(16)
    if batch_norm == "frozen":
        model.freeze_batch_norm()
    else:
        model.unfreeze_batch_norm(synchronized=batch_norm == "synchronized")
    if lora_rank is not None:
        model.enable_lora(lora_rank)
        for index, weight in enumerate(model.trainable_weights):
            weight.assign(np.random.default_rng(index).normal(0, 0.5, weight.shape))
    return model


def fit(model: AlignModel, *, epochs: int, validate: bool = False, batch_size: int = 16) -> dict:
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(BATCH).batch(batch_size)
    validation = {"validation_data": dataset} if validate else {}
    return model.fit(dataset, epochs=epochs, shuffle=False, verbose=0, **validation).history


def train(
    *,
    accumulation: int = 1,
    validate: bool = False,
    batch_size: int = 16,
    clip_norm: float | None = None,
    remat: bool = False,
    loop_blocks: bool = False,
    **options,
) -> tuple[list[np.ndarray], dict]:
    """Five epochs on 16 pairs; returns the weights, and the logs of each epoch."""
    model = make_model(**options)
    optimizer = keras.optimizers.SGD(0.1)
    if clip_norm is not None:
        optimizer = make_optimizer(
            model, learning_rate=0.1, schedule="constant", total_steps=5, clip_norm=clip_norm
        )
        optimizer.epsilon = 0.1  # so that rounding is not blown up where a gradient is zero
    how = {"remat": remat, "loop_blocks": loop_blocks}
    model.compile(optimizer=optimizer, accumulation=accumulation, **how)
    before = model.get_weights()
    logs = fit(model, epochs=5, validate=validate, batch_size=batch_size)
    check_parts(model)
    assert apart(before, model.get_weights()) > 0.02
    return model.get_weights(), logs


def check_parts(model: AlignModel) -> None:
    """Checks that after training each device has its part of the state, and no more."""
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, sharded_state.ShardedState):
        return
    count, spread = distribution.mesh.size, 0
    for variable in (*model.variables, *model.optimizer.variables):
        values = variable.value
        parts = [shard.data.size for shard in values.addressable_shards]
        even = any(size % count == 0 for size in values.shape)  # count is prime
        assert parts == [values.size // (count if even else 1)] * count, variable.path
        spread += even
    assert spread > 30


def apart(one: list, other: list) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def logs_apart(one: dict, other: dict) -> float:
    assert set(one) == set(other)
    return max(float(np.abs(np.subtract(one[key], other[key])).max()) for key in one)


def variances_of_own_rows(model: AlignModel, replicas: int) -> list[np.ndarray]:
    """What a step in two parts makes of the first BatchNorm's variance, in each replica."""
    tower = model.vision_model
    states = tower.stem_conv(tower.stem_pad(BATCH["pixel_values"]))
    states = ops.convert_to_numpy(states).astype("float64")
    averages = []
    for rows in np.split(states, replicas):
        average = np.ones(states.shape[-1])
        for part in (rows[::2], rows[1::2]):
            average = 0.99 * average + 0.01 * part.var((0, 1, 2))
        averages.append(average)
    return averages


def dropout_and_statistics(show: Callable, each: Callable) -> None:
    """Dropout is at work, and follows its seeds; BatchNorm has averages of its replica's rows.

    Args:
        show: prints a name and a number.
        each: calls a function in each replica, and returns what they return.
    """
    model = make_model(batch_norm="own", dropout=0.1)
    model.compile(optimizer=keras.optimizers.SGD(0.1), accumulation=2)
    start = [(variable, ops.convert_to_numpy(variable)) for variable in model.variables]
    seeds = [variable for variable in model.variables if variable.name == "seed_generator_state"]
    assert len(seeds) == 3

    def step(added: int) -> list[np.ndarray]:
        for variable, value in start:
            variable.assign(value)
        for seed in seeds:
            seed.assign(ops.convert_to_numpy(seed) + added)
        fit(model, epochs=1)
        return model.get_weights()

    def call(function: Callable) -> list[np.ndarray]:
        return [ops.convert_to_numpy(value) for value in each(function)]

    moving = model.vision_model.stem_bn.moving_variance
    replicas = len(call(lambda: moving + 0.0))
    expected = variances_of_own_rows(model, replicas)
    one, other, again = step(0), step(1), step(0)
    show("own", apart(expected, call(lambda: moving + 0.0)))
    show("again", apart(one, again))
    show("other", apart(one, other))
    dropout = model.text_model.embeddings.dropout
    kept = call(lambda: dropout(np.ones((16 // replicas, 6, 16), "float32"), training=True))
    kept = np.concatenate(kept)
    show("equal", sum(np.array_equal(kept[row], kept[row + 8]) for row in range(8)))


def compare(within: Callable, count: int, mode: str, each: Callable) -> None:
    """Prints the cases; within(n) is the scope of n devices, and `each` is as above."""

    def train_on(count: int, shard_state: bool = False, **options):
        with data_parallel(count, True).scope() if shard_state else within(count):
            return train(**options)

    def show(name: str, value: float) -> None:
        print(name, value, flush=True)

    plain, logs = train_on(1, validate=True)
    weights, found = train_on(count, validate=True)
    show("weights", apart(plain, weights))
    show("logs", logs_apart(found, logs))
    show("accumulation", apart(plain, train_on(count, accumulation=4)[0]))
    if mode == "workers":
        return
    options = {"sigmoid": True, "clip_norm": 0.1}
    alone, logs = train_on(1, batch_norm="own", **options)
    weights, found = train_on(count, batch_norm="synchronized", **options)
    show("synchronized", apart(alone, weights))
    show("synchronized_logs", logs_apart(found, logs))
    options = {"lora_rank": 2}
    adapted = train_on(1, **options)[0]
    show("lora", apart(adapted, train_on(count, **options)[0]))
    if mode == "jax":
        show("a_row_at_a_time", apart(plain, train_on(count, accumulation=16)[0]))
        in_parts(train_on, count, show, plain, adapted)
        not_shared(within(count), show)
    with within(count):
        dropout_and_statistics(show, each)
    if mode == "tensorflow":
        without_an_image(train_on, count, show)
        batch_by_itself(show, within(count))


def in_parts(train_on: Callable, count: int, show: Callable, plain: list, adapted: list) -> None:
    """Takes the steps of one device with the state in parts on several.

    Args:
        train_on: trains on so many devices, and returns weights and logs.
        count: the devices.
        show: prints a name and a number.
        plain: the weights of one device.
        adapted: those with an adapter.
    """
    sharded_state.LEAST = 1
    state = {"shard_state": True}
    show("parts_lora", apart(adapted, train_on(count, lora_rank=2, **state)[0]))
    show("parts_accumulation", apart(plain, train_on(count, accumulation=4, **state)[0]))
    options = {"depth": 2, "clip_norm": 0.1}
    alone, logs = train_on(1, batch_norm="own", validate=True, **options)
    options |= {"batch_norm": "synchronized", **state}
    for name, how in (("", {}), ("_remat", {"remat": True}), ("_loop", {"loop_blocks": True})):
        weights, found = train_on(count, validate=True, **how, **options)
        show(f"parts{name}", apart(alone, weights))
        show(f"parts{name}_logs", logs_apart(found, logs))


def not_shared(scope: contextlib.AbstractContextManager, show: Callable) -> None:
    """A model of one device and a batch with a remainder are refused in a line."""
    outside = make_model()
    with scope:
        inside = make_model()
        refusals = {
            "outside": (outside, 16, "devices of this scope; expected a model that is built"),
            "uneven": (inside, 5, "a batch of 5: expected a multiple of the 2 devices"),
        }
        for name, (model, rows, expected) in refusals.items():
            model.compile(optimizer=keras.optimizers.SGD(0.1))
            batch = {key: values[:rows] for key, values in BATCH.items()}
            calls = {
                "fit": functools.partial(fit, model, epochs=1, batch_size=rows),
                "train": functools.partial(model.train_on_batch, batch),
                "test": functools.partial(model.test_on_batch, batch),
            }
            if name == "outside":  # each device computes all rows, of whatever number
                calls["predict"] = functools.partial(model.predict_on_batch, batch)
            for how, call in calls.items():
                show(f"{name}_{how}", refusal(call, expected))


def refusal(call: Callable, expected: str) -> float:
    """Returns 0 where a call is refused as expected."""
    try:
        call()
    except ValueError as error:
        return float(expected not in str(error))
    return 1.0


def batch_by_itself(show: Callable, scope: contextlib.AbstractContextManager) -> None:
    """Of a single batch each replica would take all, so it is refused."""
    with scope:
        model = make_model()
        model.compile(optimizer=keras.optimizers.SGD(0.1))
    expected = "a batch by itself: each of 2 replicas would take all of it; expected fit"
    for name in ("train", "test", "predict"):
        call = functools.partial(getattr(model, f"{name}_on_batch"), BATCH)
        show(f"itself_{name}", refusal(call, expected))


def without_an_image(train_on: Callable, count: int, show: Callable) -> None:
    """Of a last batch of one pair, a replica gets none: by the pairs of the others, or refused."""
    options = {"batch_size": 5, "validate": True}
    alone, logs = train_on(1, **options)
    weights, found = train_on(count, **options)
    show("short", apart(alone, weights))
    show("short_logs", logs_apart(found, logs))
    try:
        train_on(count, batch_norm="own", **options)
    except Exception as error:
        show("refused", float("a replica without an image would move" not in str(error)))


def main(mode: str, argument: str) -> None:
    if mode == "jax":
        import jax

        def within(count: int):
            return keras.distribution.DataParallel(devices=jax.devices("cpu")[:count]).scope()

        compare(within, int(argument), mode, lambda function: [function()])
        return
    import tensorflow as tf

    # One strategy for all cases: a second one would count its collectives from 1 again.
    if mode == "workers":
        several = tf.distribute.MultiWorkerMirroredStrategy()
        assert several.num_replicas_in_sync == int(argument)
    else:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * int(argument),
        )
        several = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(int(argument))])

    def within(count: int):
        return (several if count > 1 else tf.distribute.get_strategy()).scope()

    def each(function: Callable):
        return several.experimental_local_results(several.run(function))

    compare(within, int(argument), mode, each)


if __name__ == "__main__":
    main(*sys.argv[1:])
