"""Trains the same batches on several devices; test_distribution.py starts it in processes.

    distribution_cases.py tensorflow COUNT    1 and COUNT virtual CPU devices
    distribution_cases.py jax COUNT
    distribution_cases.py workers COUNT       one of COUNT processes, which TF_CONFIG names

Prints one line for each case: its name, and how far its weights after 5 steps are from those of
one device.
"""

import sys
from collections.abc import Callable

import keras
import numpy as np

from align_tf import AlignConfig, AlignModel
from align_tf.training import make_optimizer

rng = np.random.default_rng(0)
BATCH = {
    "pixel_values": rng.random((16, 16, 16, 3), "float32"),
    "input_ids": rng.integers(1, 40, (16, 6), "int32"),
    "image_ids": np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 12, 13, 3, 15], "int32"),
    "sample_weight": np.array([1, 1, 2, 1, 0, 1, 1, 3, 1, 1, 1, 1, 0, 0, 1, 1], "float32"),
}


def make_config(dropout: float) -> AlignConfig:
    return AlignConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
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
            "num_block_repeats": [1],
            "expand_ratios": [1],
            "hidden_dim": 8,
            "initializer_range": 0.5,
        },
        projection_dim=8,
        temperature_init_value=0.5,
    )


def train(
    *,
    sigmoid: bool = False,
    batch_norm: str = "frozen",
    accumulation: int = 1,
    dropout: float = 0.0,
    validate: bool = False,
    clip_norm: float | None = None,
) -> tuple[list[np.ndarray], dict]:
    """Five steps on 16 pairs; returns the weights and the last logs."""
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    model = AlignModel(make_config(dropout))
    if sigmoid:
        model.use_sigmoid_loss(16)
    if batch_norm == "frozen":
        model.freeze_batch_norm()
    else:
        model.unfreeze_batch_norm(synchronized=batch_norm == "synchronized")
    optimizer = keras.optimizers.SGD(0.1)
    if clip_norm is not None:
        optimizer = make_optimizer(
            model, learning_rate=0.1, schedule="constant", total_steps=5, clip_norm=clip_norm
        )
        optimizer.epsilon = 0.1  # so that rounding is not blown up where a gradient is zero
    model.compile(optimizer=optimizer, accumulation=accumulation)
    before = model.get_weights()
    dataset = tf.data.Dataset.from_tensor_slices(BATCH).batch(16)
    validation = {"validation_data": dataset} if validate else {}
    history = model.fit(dataset, epochs=5, shuffle=False, verbose=0, **validation).history
    assert apart(before, model.get_weights()) > 0.02
    return model.get_weights(), {key: values[-1] for key, values in history.items()}


def apart(one: list, other: list) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def compare(within: Callable, count: int, mode: str) -> None:
    """Prints the cases; within(n) is the scope of n devices."""

    def run(count: int, **options):
        with within(count):
            return train(**options)

    def show(name: str, value: float) -> None:
        print(name, value, flush=True)

    alone, logs = run(1, validate=True)
    weights, found = run(count, validate=True)
    show("weights", apart(alone, weights))
    show("logs", max(abs(found[key] - logs[key]) for key in logs))
    if count > 2:
        return
    show("accumulation", apart(alone, run(count, accumulation=4)[0]))
    if mode == "workers":
        return
    alone, _ = run(1, sigmoid=True, batch_norm="own")
    for batch_norm in ("synchronized", "own"):
        show(batch_norm, apart(alone, run(count, sigmoid=True, batch_norm=batch_norm)[0]))
    alone, _ = run(1, clip_norm=0.1)
    show("clipped", apart(alone, run(count, clip_norm=0.1)[0]))
    weights, _ = run(count, accumulation=2, dropout=0.1)
    show("dropout", 0.0 if all(np.isfinite(w).all() for w in weights) else 1.0)


def main(mode: str, argument: str) -> None:
    if mode == "jax":
        import jax

        def within(count: int):
            return keras.distribution.DataParallel(devices=jax.devices("cpu")[:count]).scope()

        compare(within, int(argument), mode)
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

    compare(within, int(argument), mode)


if __name__ == "__main__":
    main(*sys.argv[1:])
