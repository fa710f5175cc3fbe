"""The recipe of a training: its settings, checked, and written as YAML."""

import dataclasses
import importlib
import math
import os
import reprlib
from typing import Any

from align_tf.addresses import check, place
from align_tf.configuration.checks import is_finite
from align_tf.configuration.presets import PRESETS
from align_tf.data.lengths import LENGTH_BUCKETS, LENGTHS, are_lengths
from align_tf.data.limit import LIMIT, is_limit
from align_tf.extras import extra
from align_tf.training.recipe_sources import (
    SOURCES,
    checked_sources,
    drawn_sources,
    said_sources,
)

POSITIVE = "a number above 0"
NATURAL = "a whole number of 0 or more"
COUNT = "a whole number of 1 or more"
PAIRS = "a whole number of 2 or more, since a pair is told from the others of its batch"
SHARE = "a number of 0 or more, below 1"

CHECKS = {
    POSITIVE: lambda value: is_finite(value) and value > 0,
    NATURAL: lambda value: isinstance(value, int) and value >= 0,
    COUNT: lambda value: isinstance(value, int) and value >= 1,
    PAIRS: lambda value: isinstance(value, int) and value >= 2,
    SHARE: lambda value: 0 <= value < 1,
    "a number of 0 or more": lambda value: is_finite(value) and value >= 0,
    LIMIT: is_limit,
}


# What a set of validation_data is measured by: its task -> the figures.
FIGURES = {
    "retrieval": [
        f"{name}_{way}"
        for name in ("r1", "r5", "r10", "median_rank", "mean_rank")
        for way in ("i2t", "t2i")
    ],
    "zero-shot": ["top1", "top5", "mean_per_class"],
}
VALIDATED = tuple(FIGURES)

# Where figures go beside `metrics.jsonl`: the setting, which is the package and the extra too.
TRACKERS = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow"}

# The groups of settings, in the order of `--help`.
GROUPS = ("model and data", "batch", "optimizer", "what trains", "output")
MODEL, BATCH, OPTIMIZER, TRAINS, OUTPUT = GROUPS

# Where the recipe is silent: a model is fine-tuned, a preset trained as in the paper.
FINE_TUNING_RATE, LORA_RATE, RATE = 1e-5, 1e-4, 1e-3
WARMUP_SHARE = 0.1  # of the steps of a fine-tuning
LINES, CHECKPOINTS = 100, 10  # of a training
MOST_LOG_EVERY, MOST_SAVE_EVERY = 100, 1000  # steps, however long it is


def _setting(group: str, default: Any, text: str, expected: Any = str) -> Any:
    """A field: its group and default, what `--help` says of it, and what a value must be.

    `expected` is a type, a key of `CHECKS`, or a tuple of the words that it may be.
    """
    metadata = {"group": group, "help": text, "expected": expected}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Recipe:
    """The settings of a training, each a key of the YAML file and a flag of `align-tf train`.

    Exactly one of `model` and `preset` is given. The defaults of `preset` are the paper's (ALIGN,
    arXiv 2102.05918, section 5), but for the sizes of batch and training; those of `model` suit a
    fine-tuning. What follows from the number of steps is None until `counted` states it.

    Raises:
        ValueError: a setting is missing, unknown or out of range; the message names it.
    """

    model: str | None = _setting(
        MODEL, None, "the checkpoint to fine-tune: a folder, a Hugging Face id, or align-tiny"
    )
    preset: str | None = _setting(
        MODEL, None, f"the architecture to train from scratch: {', '.join(PRESETS)}"
    )
    processor: str | None = _setting(
        MODEL, None, "the checkpoint whose tokenizer and image settings are used (that of model)"
    )
    data: Any = _setting(  # noqa: RUF009
        MODEL,
        None,
        "pairs to train on: a file, a folder or a glob; files of one kind; or several sources by "
        "their shares of each batch, as in [{source: a, weight: 3}, {source: b, weight: 1}]",
        SOURCES,
    )
    validation_data: Any = _setting(  # noqa: RUF009
        MODEL,
        None,
        "pairs whose loss is watched; or several sets, as in {a: pairs, b: {data: classes, task: "
        "zero-shot}}",
        object,
    )
    max_errors: int | str = _setting(
        MODEL,
        100,
        "pairs that cannot be read and are left out before it is an error, or a percentage of them",
        LIMIT,
    )
    output: str | None = _setting(
        OUTPUT, None, "the folder of the checkpoints and the trained model"
    )
    image_size: int | None = _setting(
        MODEL, None, "pixels of an image's side, in training and after (that of processor)", COUNT
    )

    length_buckets: Any = _setting(  # noqa: RUF009
        MODEL,
        None,
        "lengths, in tokens, that texts are padded to, each compiled by itself "
        f"({list(LENGTH_BUCKETS)}; on a TPU the longest of these alone)",
        object,
    )
    augment: bool = _setting(MODEL, True, "crop and flip the training images at random", bool)

    batch_size: int = _setting(
        BATCH, 64, "pairs in a step; the others are each one's negatives", PAIRS
    )
    accumulation: int = _setting(
        BATCH, 1, "parts that a batch is computed in, to save memory", COUNT
    )
    devices: int | None = _setting(BATCH, None, "GPUs or TPU cores that share a batch (all)", COUNT)
    remat: bool = _setting(
        BATCH, False, "compute activations again for the gradient, to save more", bool
    )
    shard_state: bool = _setting(
        BATCH,
        False,
        "on JAX, keep weights and optimizer in parts, one on each device: for what fits none whole",
        bool,
    )
    loop_blocks: bool = _setting(
        BATCH,
        False,
        "on JAX, run blocks that are alike in one loop: for a TPU, in less memory, compiled sooner",
        bool,
    )
    steps: int | None = _setting(BATCH, None, "steps of the whole training", COUNT)
    epochs: int | None = _setting(BATCH, None, "the same, in passes over the data", COUNT)
    optimizer: str | None = _setting(
        OPTIMIZER, None, "of LAMB and AdamW (adamw with model, lamb with preset)", ("lamb", "adamw")
    )
    learning_rate: float | None = _setting(
        OPTIMIZER,
        None,
        "the rate after the warmup (for adamw with model 1e-5, or 1e-4 with lora_rank; otherwise "
        "1e-3)",
        POSITIVE,
    )
    weight_decay: float = _setting(
        OPTIMIZER, 1e-5, "of kernels and embeddings", "a number of 0 or more"
    )
    warmup_steps: int | None = _setting(
        OPTIMIZER,
        None,
        "steps in which the rate rises from 0 (a tenth of all with model, 0 with preset)",
        NATURAL,
    )
    schedule: str = _setting(
        OPTIMIZER,
        "linear",
        "how the rate falls to 0 after the warmup",
        ("linear", "cosine", "constant"),
    )
    text_rate: float = _setting(OPTIMIZER, 1.0, "multiplies the rate of the text tower", POSITIVE)
    vision_rate: float = _setting(
        OPTIMIZER, 1.0, "multiplies the rate of the image tower", POSITIVE
    )
    layer_decay: float = _setting(
        OPTIMIZER, 1.0, "multiplies the rate once more a block down", POSITIVE
    )
    clip_norm: float | None = _setting(
        OPTIMIZER, None, "longest norm of all gradients together", POSITIVE
    )
    ema_momentum: float | None = _setting(
        OPTIMIZER, None, "of a moving average of the weights", SHARE
    )

    freeze: Any = _setting(  # noqa: RUF009
        TRAINS, None, "text or vision; or blocks of each, as in {text: [0, 1], vision: [0]}", object
    )
    lora_rank: int | None = _setting(
        TRAINS, None, "learn an adapter of this rank (LoRA), and leave the model as it is", COUNT
    )
    lora_alpha: float | None = _setting(
        TRAINS, None, "the adapter counts lora_alpha / lora_rank times (lora_rank)", POSITIVE
    )
    batch_norm: str | None = _setting(
        TRAINS,
        None,
        "frozen or trained (frozen with model, trained with preset)",
        ("frozen", "trained"),
    )
    virtual_batch_size: int | None = _setting(
        TRAINS,
        None,
        "images whose statistics a BatchNorm that trains takes at a time, 16 in the original "
        "(all of a device)",
        COUNT,
    )
    loss: str = _setting(
        TRAINS, "softmax", "softmax, or sigmoid with a learned bias", ("softmax", "sigmoid")
    )
    loss_reduction: str = _setting(
        TRAINS, "mean", "of the two directions: mean, or sum as the original", ("mean", "sum")
    )
    label_smoothing: float = _setting(TRAINS, 0.1, "of the softmax loss", SHARE)
    dtype: str = _setting(
        BATCH, "float32", "of the computation", ("float32", "mixed_bfloat16", "mixed_float16")
    )
    seed: int = _setting(MODEL, 0, "of new weights, dropout, and the order of the data", NATURAL)

    save_every: int | None = _setting(
        OUTPUT,
        None,
        "steps between two checkpoints and validations (a tenth of all, at most 1000)",
        COUNT,
    )
    keep: int = _setting(OUTPUT, 2, "checkpoints that stay", COUNT)
    keep_best: str | None = _setting(
        OUTPUT,
        None,
        "the figure, such as val_r1_t2i, by whose best validation the trained model is chosen",
    )
    early_stop: int | None = _setting(
        OUTPUT,
        None,
        "validations without a better figure after which it ends (of keep_best, or val_loss)",
        COUNT,
    )
    log_every: int | None = _setting(
        OUTPUT, None, "steps between two lines of progress (a hundredth of all, at most 100)", COUNT
    )
    tensorboard: bool = _setting(OUTPUT, False, "write TensorBoard's logs too", bool)
    wandb: bool = _setting(
        OUTPUT, False, "log to Weights & Biases too, as its variables say (WANDB_PROJECT ...)", bool
    )
    mlflow: bool = _setting(
        OUTPUT, False, "log to MLflow too, as its variables say (MLFLOW_TRACKING_URI ...)", bool
    )

    def __post_init__(self) -> None:
        for key in ("data", "output"):
            if getattr(self, key) is None:
                raise ValueError(f"{key}: missing; the recipe has to state it, or --{key}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "expected steps or epochs (--steps, --epochs), and one of them; "
                f"found {'neither' if self.steps is None else 'both'}"
            )
        if (self.model is None) == (self.preset is None):
            raise ValueError(
                "expected model, a checkpoint to fine-tune, or preset, an architecture to train "
                "from scratch (--model, --preset), and one of them; "
                f"found {'neither' if self.model is None else 'both'}"
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}")
        if self.preset is not None and self.processor is None:
            raise ValueError(
                f"processor: missing; beside preset {self.preset!r} it names the checkpoint whose "
                "tokenizer and image settings are used (--processor)"
            )
        fine_tuning = self.model is not None
        if self.optimizer is None:
            self.optimizer = "adamw" if fine_tuning else "lamb"
        if self.learning_rate is None:
            gentle = fine_tuning and self.optimizer == "adamw"
            of_model = FINE_TUNING_RATE if self.lora_rank is None else LORA_RATE
            self.learning_rate = of_model if gentle else RATE
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                setattr(self, field.name, _checked(field, value))
        if type(self.length_buckets) is int:
            self.length_buckets = [self.length_buckets]
        if self.length_buckets is not None and not are_lengths(self.length_buckets):
            raise ValueError(f"length_buckets={self.length_buckets!r}: expected {LENGTHS}")
        for tower, blocks in self.frozen().items():
            numbers = isinstance(blocks, list) and all(type(block) is int for block in blocks)
            if tower not in ("text", "vision") or not (blocks is None or numbers):
                raise ValueError(
                    f"freeze={self.freeze!r}: expected text, vision, or {{tower: [block, ...]}}"
                )
        trained = self.batch_norm == "trained" or (self.batch_norm is None and self.model is None)
        if self.virtual_batch_size is not None and not trained:
            raise ValueError(
                f"virtual_batch_size={self.virtual_batch_size!r}: expected batch_norm='trained' "
                "beside it; BatchNorm that is frozen takes no statistics"
            )
        self.data = checked_sources(self.data)
        self._check_lora()
        self._check_validation()
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation}: expected a divisor of "
                f"batch_size={self.batch_size}"
            )

    def _check_lora(self) -> None:
        if self.lora_rank is None:
            if self.lora_alpha is not None:
                raise ValueError(f"lora_alpha={self.lora_alpha!r}: expected lora_rank beside it")
            return
        # What no adapter holds.
        for key, value in (("batch_norm", "trained"), ("loss", "sigmoid")):
            if getattr(self, key) == value:
                raise ValueError(
                    f"{key}={value!r}: not with lora_rank, which trains an adapter alone"
                )
        if self.model is None:
            raise ValueError(f"lora_rank={self.lora_rank!r}: expected model, which it adapts")
        if not self.adapted():
            raise ValueError(f"freeze={self.freeze!r}: expected a tower for lora_rank to adapt")

    def drawn(self) -> tuple[list[Any], list[float]]:
        """Returns the sources of `data` and their weights, as `make_dataset` takes them."""
        return drawn_sources(self.data)

    def said_data(self) -> list[str]:
        """Returns the sources in words, several with their shares."""
        return said_sources(self.data)

    def adapted(self) -> list[str]:
        """Returns the towers that LoRA adapts: those that are not frozen as a whole."""
        frozen = self.frozen()
        return [tower for tower in ("text", "vision") if frozen.get(tower, []) is not None]

    def validations(self) -> dict[str, dict[str, Any]]:
        """Returns the sets of `validation_data` by name, an only one by "".

        Each has its `data` and its `task`, and of zero-shot its `labels` and `templates`.
        """
        given = self.validation_data
        sets = given if isinstance(given, dict) else {} if given is None else {"": given}
        return {
            name: {"task": VALIDATED[0], **(of if isinstance(of, dict) else {"data": of})}
            for name, of in sets.items()
        }

    def _check_validation(self) -> None:
        for name, options in self.validations().items():
            known = {"task": tuple(FIGURES), "data": None}
            known |= {"labels": None, "templates": None} if options["task"] == VALIDATED[1] else {}
            texts = all(isinstance(value, str) for value in options.values())
            named = isinstance(name, str) and (name.isidentifier() or name == "")
            right = (
                "data" in options
                and options["task"] in VALIDATED
                and options.keys() <= known.keys()
            )
            if not (texts and named and right):
                raise ValueError(
                    f"validation_data={self.validation_data!r}: expected a source of pairs, or "
                    "sets of these by name, or {data: ..., task: zero-shot} in their place"
                )
        figures = self.figures()
        if self.keep_best is not None and self.keep_best not in figures:
            raise ValueError(
                f"keep_best={self.keep_best!r}: expected a figure of validation_data: "
                f"{', '.join(figures) or 'there is none'}"
            )
        if self.early_stop is not None and self.watched() not in figures:
            raise ValueError(
                f"early_stop={self.early_stop!r}: expected keep_best, a figure of validation_data: "
                f"{', '.join(figures) or 'there is none'}"
            )

    def figures(self) -> list[str]:
        """Returns the names of what a validation finds."""
        sets = {name: options["task"] for name, options in self.validations().items()}
        loss = ["val_loss"] if VALIDATED[0] in sets.values() else []
        return loss + [
            f"val_{name}_{figure}" if name else f"val_{figure}"
            for name, task in sets.items()
            for figure in FIGURES[task]
        ]

    def watched(self) -> str | None:
        """Returns the figure that `keep_best` and `early_stop` go by; None without them."""
        return self.keep_best or (None if self.early_stop is None else "val_loss")

    def counted(self, steps: int) -> "Recipe":
        """Returns the recipe with its steps stated, and with what follows from their number.

        These are `warmup_steps`, `save_every` and `log_every`, where they are not given: the same
        of a training that goes on, whose steps are the same.
        """
        derived = {
            "warmup_steps": round(WARMUP_SHARE * steps) if self.model is not None else 0,
            "save_every": min(math.ceil(steps / CHECKPOINTS), MOST_SAVE_EVERY),
            "log_every": min(math.ceil(steps / LINES), MOST_LOG_EVERY),
        }
        silent = {key: value for key, value in derived.items() if getattr(self, key) is None}
        return dataclasses.replace(self, steps=steps, epochs=None, **silent)

    def lengths(self, on_tpu: bool) -> list[int]:
        """Returns the lengths that texts are padded to: one on a TPU, where each is compiled anew.

        Args:
            on_tpu: whether the training is on one.
        """
        if self.length_buckets is not None:
            return sorted(self.length_buckets)
        return list(LENGTH_BUCKETS[-1:] if on_tpu else LENGTH_BUCKETS)

    def frozen(self) -> dict[str, list[int] | None]:
        """Returns the towers that do not train, each with its frozen blocks, or None for all."""
        if isinstance(self.freeze, dict):
            return self.freeze
        if isinstance(self.freeze, list):  # of towers
            return dict.fromkeys(map(str, self.freeze))
        return {} if self.freeze is None else {self.freeze: None}

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings that differ from their defaults."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {key: value for key, value in values.items() if value != defaults[key]}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the settings as YAML that `read_recipe` reads."""
        import yaml

        from align_tf import files  # here, for it loads numpy

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        files.write_text(place(path), text)


def lower_is_better(figure: str) -> bool:
    """Says of a figure whether the lowest is the best: of a loss or a rank."""
    return "loss" in figure or "rank" in figure


def check_extras(recipe: Recipe) -> None:
    """Sees that what a recipe asks for is installed, before anything is loaded or written.

    Raises:
        ValueError: a place is an address of a kind that is not read.
        ModuleNotFoundError: `tensorboard` without TensorBoard, an address without its package and
            so on; the message names the pip command.
    """
    sets = [options["data"] for options in recipe.validations().values()]
    sources, _ = recipe.drawn()
    names = [name for of in sources for name in ([of] if isinstance(of, str) else of)]
    for name in (*names, *sets, recipe.output, recipe.model, recipe.processor):
        check(name or "")
    for key, name in TRACKERS.items():
        if getattr(recipe, key):
            with extra(key, f"{key}: true needs {name}"):
                importlib.import_module(key)


def _checked(field: dataclasses.Field, value: Any) -> Any:
    expected = field.metadata["expected"]
    if expected in (object, SOURCES):
        return value
    if isinstance(expected, type):
        valid, wanted = isinstance(value, expected), {str: "text", bool: "true or false"}[expected]
    elif isinstance(expected, tuple):
        valid, wanted = value in expected, f"one of {', '.join(expected)}"
    else:
        wanted = expected
        if isinstance(value, str):
            value = _number(value)  # YAML takes 1e-3, which has no point, for text
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        valid = (number or expected == LIMIT) and CHECKS[expected](value)
    if not valid:
        raise ValueError(f"{field.name}={reprlib.repr(value)}: expected {wanted}")
    return value


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
