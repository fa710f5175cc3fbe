"""A training small enough for tests: its words, its settings, and what two of them share."""

import re

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


def apart(one, other, left_out: str = "seed") -> float:
    """How far the weights and states of two trainings are from each other; NaN where one is."""
    found = [0.0]
    for name in ("model.safetensors", f"checkpoint-{STEPS}/training_state.safetensors"):
        ours, theirs = (safetensors.numpy.load_file(folder / name) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        names = [name for name in ours if not re.search(left_out, name)]
        found += [np.abs(ours[name] - theirs[name]).max() for name in names]
    return max(found, key=lambda value: (np.isnan(value), value))
