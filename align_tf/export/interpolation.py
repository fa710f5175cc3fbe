"""Models between one and those fine-tuned from it: WiSE-FT (arXiv 2109.01903) and soups."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from align_tf.models.align import AlignModel
from align_tf.models.effective_weights import effective_weights
from align_tf.preprocessing.processor import AlignProcessor

# Keys of config.json that say nothing of what a model computes.
OF_FILES = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
OF_TRAINING = (
    *("freeze_batch_norm", "initializer_range", "temperature_init_value", "drop_connect_rate"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "image_size"),
)

# The ends of weights that are no less than zero between any two models, and may be beyond them.
NOT_NEGATIVE = ("moving_variance", "temperature")


class Interpolation:
    """The line from a base to the mean of what was fine-tuned from it.

    Args:
        base: a checkpoint, as `AlignModel.from_pretrained` takes it.
        tuned: others; their mean is a soup (arXiv 2203.05482). An adapter counts as the model
            that it makes.

    Attributes:
        model: the model that `move` sets.
        processor: that of the first of `tuned`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: two of them differ in more than their weights, or one holds a NaN.
    """

    def __init__(self, base: str, tuned: Sequence[str]) -> None:
        if not tuned:
            raise ValueError("tuned: expected one checkpoint or more")
        self.model = AlignModel.from_pretrained(tuned[0])
        if self.model.active_adapter is not None:
            self.model.merge_adapter()
        self.processor = AlignProcessor.from_pretrained(tuned[0])
        self._weights = self.model._relative_weights()
        self._base = self._read(base, tuned[0])
        self._change = {path: -value for path, value in self._base.items()}
        for name in tuned:
            for path, value in self._read(name, tuned[0]).items():
                self._change[path] += value / len(tuned)

    def move(self, alpha: float) -> None:
        """Sets the weights of `model`: of the base at 0, of the fine-tuned at 1.

        Args:
            alpha: below 0 and above 1 the line goes on.

        Raises:
            ValueError: so far out that a weight is no longer finite, nor its square, or that what
                is a variance or divides is below zero.
        """
        values = {}
        for path in self._weights:
            with np.errstate(over="ignore"):
                value = (self._base[path] + alpha * self._change[path]).astype("float32")
                finite = np.isfinite(np.square(value)).all()  # which a norm is made of
            if not finite:
                raise ValueError(f"alpha={alpha!r}: {path} is no longer finite; expected less")
            if path.endswith(NOT_NEGATIVE) and value.min() < 0:
                raise ValueError(
                    f"alpha={alpha!r}: {path} falls below 0; expected nearer to 0 and 1"
                )
            values[path] = value
        for path, weight in self._weights.items():
            weight.assign(values[path])

    def save(self, output: str | pathlib.Path) -> None:
        """Writes the model as it is, and its processor, for `from_pretrained`."""
        self.model.save_pretrained(output)
        self.processor.save_pretrained(output)

    def _read(self, name: str, first: str) -> dict[str, np.ndarray]:
        model = self.model if name == first else AlignModel.from_pretrained(name)
        _check_same(_settings(model), _settings(self.model), name, first)
        vocab = AlignProcessor.from_pretrained(name).tokenizer.vocab
        if vocab != self.processor.tokenizer.vocab:
            raise ValueError(f"{name}: another vocabulary than that of {first}: expected the same")
        weights = {}
        for path, value in effective_weights(model).items():
            weights[path] = ops.convert_to_numpy(value).astype("float64")
            if not np.isfinite(weights[path]).all():
                raise ValueError(f"{name}: {path} holds a NaN or an infinity: expected numbers")
        return weights


def sweep(
    interpolation: Interpolation, alphas: Sequence[float], measures: Sequence[Callable[[], float]]
) -> tuple[list[dict[str, Any]], float]:
    """Measures the models along the line.

    Args:
        interpolation: the line; its model stays at the best.
        alphas: where to measure.
        measures: each says how good the model is, on data of its own.

    Returns:
        A row for each alpha, with `alpha` and `figures`; and the alpha of the highest mean.
    """
    rows = []
    for alpha in alphas:
        interpolation.move(alpha)
        rows.append({"alpha": alpha, "figures": [measure() for measure in measures]})
    best = max(rows, key=lambda row: sum(row["figures"]))["alpha"]
    interpolation.move(best)
    return rows, best


def _settings(model: AlignModel) -> dict[str, Any]:
    values = model.config.to_dict()
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    for part in ("text_config", "vision_config"):
        flat |= {f"{part}.{key}": value for key, value in values[part].items()}
    ignored = (*OF_FILES, *OF_TRAINING)
    return {key: value for key, value in flat.items() if key.split(".")[-1] not in ignored}


def _check_same(found: dict, expected: dict, name: str, first: str) -> None:
    for key in {**expected, **found}:
        if found.get(key) != expected.get(key):
            raise ValueError(
                f"{name}: {key}={found.get(key)!r}, of {first} {expected.get(key)!r}: "
                "expected models that differ in their weights alone"
            )
