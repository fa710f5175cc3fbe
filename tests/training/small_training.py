"""A training small enough for tests: its words, its settings, and what two of them share."""

import numpy as np
import safetensors.numpy

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["a", "dark", "bright", "red", "green", "blue"]
COLORS = ("red", "green", "blue")
STEPS = 20


def settings_of(place, output):
    """Dropout, drop-connect, BatchNorm's statistics and a moving average are at work."""
    return {
        "model": str(place / "tiny"),
        "data": str(place / "pairs"),
        "output": str(output),
        "batch_size": 8,
        "steps": STEPS,
        "optimizer": "lamb",
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "ema_momentum": 0.5,
        "batch_norm": "trained",
        "save_every": 6,
        "log_every": 5,
    }


def flags(settings):
    return [
        part
        for key, value in settings.items()
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]


def assert_same_end(output, unbroken):
    """Weights, and the whole state of the last step, are equal bit for bit."""
    last = f"checkpoint-{STEPS}"
    for name in (
        "model.safetensors",
        f"{last}/model.safetensors",
        f"{last}/training_state.safetensors",
    ):
        found = safetensors.numpy.load_file(output / name)
        expected = safetensors.numpy.load_file(unbroken / name)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            np.testing.assert_array_equal(value, expected[key], err_msg=f"{name}: {key}")
