"""Trains the same batches on several devices; test_distribution.py starts it in processes.

    distribution_cases.py tensorflow     1, 2 and 4 virtual CPU devices
    distribution_cases.py jax            1, 2, 4 and 8
    distribution_cases.py worker PATH    one of the processes that TF_CONFIG names

Prints one line for each case: its name, and how far its weights after 5 steps are from those of
one device. A worker writes its weights to PATH.
"""

import sys

import keras
import numpy as np

from align_tf import AlignConfig, AlignModel

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
    model.compile(optimizer=keras.optimizers.SGD(0.5), accumulation=accumulation)
    before = model.get_weights()
    dataset = tf.data.Dataset.from_tensor_slices(BATCH).batch(16)
    history = model.fit(dataset, epochs=5, shuffle=False, verbose=0).history
    assert apart(before, model.get_weights()) > 0.05
    return model.get_weights(), {key: values[-1] for key, values in history.items()}


def apart(one: list, other: list) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def compare(within, counts: list[int]) -> None:
    """Prints the cases; within(n) is the scope of n devices."""

    def run(count: int, **options):
        with within(count):
            return train(**options)

    alone, logs = run(1)
    for count in counts:
        weights, found = run(count)
        print(f"{count}-devices", apart(alone, weights), flush=True)
        off = max(abs(found[key] - logs[key]) for key in logs)
        print(f"{count}-devices-logs", off, flush=True)
    print("accumulation", apart(alone, run(2, accumulation=4)[0]), flush=True)
    alone, _ = run(1, sigmoid=True, batch_norm="own")
    options = {"sigmoid": True, "batch_norm": "synchronized"}
    print("synchronized", apart(alone, run(2, **options)[0]), flush=True)
    print("own-statistics", apart(alone, run(2, sigmoid=True, batch_norm="own")[0]), flush=True)
    weights, _ = run(2, accumulation=2, dropout=0.1)
    print("dropout", 0.0 if all(np.isfinite(w).all() for w in weights) else 1.0, flush=True)


def main(mode: str, path: str | None = None) -> None:
    if mode == "jax":
        import jax

        def within(count: int):
            return keras.distribution.DataParallel(devices=jax.devices("cpu")[:count]).scope()

        compare(within, [2, 4, 8])
        return
    import tensorflow as tf

    if mode == "worker":
        with tf.distribute.MultiWorkerMirroredStrategy().scope():
            np.savez(path, *train()[0])
        return
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )

    def within(count: int):
        devices = [f"CPU:{index}" for index in range(count)]
        return (
            tf.distribute.MirroredStrategy(devices) if count > 1 else tf.distribute.get_strategy()
        ).scope()

    if mode == "alone":
        np.savez(path, *train()[0])
    else:
        compare(within, [2, 4])


if __name__ == "__main__":
    main(*sys.argv[1:])
