"""The recipe of a training: its settings, read from YAML or flags, and written back."""

import dataclasses
import difflib
import math
import os
import reprlib
from typing import Any

from align_tf.addresses import Place, place
from align_tf.configuration.presets import PRESETS
from align_tf.data.limit import LIMIT, is_limit
from align_tf.extras import extra

RECIPE_NAME = "recipe.yaml"

# Of each two, a recipe states one.
ALTERNATIVES = (("model", "preset"), ("steps", "epochs"))

POSITIVE = "a number above 0"
NATURAL = "a whole number of 0 or more"
COUNT = "a whole number of 1 or more"
PAIRS = "a whole number of 2 or more, since a pair is told from the others of its batch"
SHARE = "a number of 0 or more, below 1"

CHECKS = {
    POSITIVE: lambda value: value > 0,
    NATURAL: lambda value: isinstance(value, int) and value >= 0,
    COUNT: lambda value: isinstance(value, int) and value >= 1,
    PAIRS: lambda value: isinstance(value, int) and value >= 2,
    SHARE: lambda value: 0 <= value < 1,
    "a number of 0 or more": lambda value: value >= 0,
    LIMIT: is_limit,
}


# The groups of settings, in the order of `--help`.
GROUPS = ("model and data", "batch", "optimizer", "what trains", "output")
MODEL, BATCH, OPTIMIZER, TRAINS, OUTPUT = GROUPS

# Where the recipe is silent: a model is fine-tuned, a preset trained as in the paper.
FINE_TUNING_RATE, RATE = 1e-5, 1e-3
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
    data: str | None = _setting(MODEL, None, "pairs to train on: a file, a folder or a glob")
    validation_data: str | None = _setting(MODEL, None, "pairs whose loss is watched")
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
    steps: int | None = _setting(BATCH, None, "steps of the whole training", COUNT)
    epochs: int | None = _setting(BATCH, None, "the same, in passes over the data", COUNT)
    optimizer: str | None = _setting(
        OPTIMIZER, None, "of LAMB and AdamW (adamw with model, lamb with preset)", ("lamb", "adamw")
    )
    learning_rate: float | None = _setting(
        OPTIMIZER,
        None,
        "the rate after the warmup (1e-5 for adamw with model, otherwise 1e-3)",
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
    log_every: int | None = _setting(
        OUTPUT, None, "steps between two lines of progress (a hundredth of all, at most 100)", COUNT
    )
    tensorboard: bool = _setting(OUTPUT, False, "write TensorBoard's logs too", bool)

    def __post_init__(self) -> None:
        for key in ("data", "output"):
            if getattr(self, key) is None:
                raise ValueError(f"{key}: missing; the recipe has to state it")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "expected steps or epochs, and one of them; "
                f"found steps={self.steps!r}, epochs={self.epochs!r}"
            )
        if (self.model is None) == (self.preset is None):
            raise ValueError(
                "expected model, a checkpoint to fine-tune, or preset, an architecture to train "
                f"from scratch, and one of them; found model={self.model!r}, preset={self.preset!r}"
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}")
        if self.preset is not None and self.processor is None:
            raise ValueError(
                f"processor: missing; with preset={self.preset!r} it names the checkpoint whose "
                "tokenizer and image settings are used"
            )
        fine_tuning = self.model is not None
        if self.optimizer is None:
            self.optimizer = "adamw" if fine_tuning else "lamb"
        if self.learning_rate is None:
            gentle = fine_tuning and self.optimizer == "adamw"
            self.learning_rate = FINE_TUNING_RATE if gentle else RATE
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                setattr(self, field.name, _checked(field, value))
        for tower, blocks in self.frozen().items():
            numbers = isinstance(blocks, list) and all(isinstance(block, int) for block in blocks)
            if tower not in ("text", "vision") or not (blocks is None or numbers):
                raise ValueError(
                    f"freeze={self.freeze!r}: expected text, vision, or {{tower: [block, ...]}}"
                )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation}: expected a divisor of "
                f"batch_size={self.batch_size}"
            )

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

    def frozen(self) -> dict[str, list[int] | None]:
        """Returns the towers that do not train, each with its frozen blocks, or None for all."""
        if isinstance(self.freeze, dict):
            return self.freeze
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


def check_extras(recipe: Recipe) -> None:
    """Sees that what a recipe asks for is installed, before anything is loaded or written.

    Raises:
        ModuleNotFoundError: `tensorboard` without TensorBoard; the message names the pip command.
    """
    if recipe.tensorboard:
        with extra("tensorboard", "tensorboard: true needs TensorBoard"):
            import tensorboard  # noqa: F401  which tf.summary is made of


def read_recipe(
    path: str | os.PathLike | None = None, flags: dict[str, Any] | None = None
) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file of `Recipe`'s keys; relative paths in it are relative to the working
            directory. None reads the flags alone.
        flags: settings that override those of the file; a string is read as YAML reads it.

    Returns:
        The recipe.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid YAML, or a key is unknown, missing or out of range.
    """
    values = {} if path is None else _read_yaml(place(path))
    flags = flags or {}
    for one, other in (*ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)):
        if one in flags and other not in flags:
            values.pop(other, None)
    values.update({key: _parsed(key, value) for key, value in flags.items()})
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            where = "flags" if path is None else path
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {nearest!r}?")
    try:
        return Recipe(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path is not None else str(error)) from None


def _read_yaml(path: Place) -> dict[str, Any]:
    if not path.is_file():
        folder = ", but a folder; one of pairs goes to data" if path.is_dir() else ""
        raise FileNotFoundError(f"{path}: no such recipe file{folder}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    values = _parsed_yaml(str(path), text)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of 'key: value', found {reprlib.repr(values)}")
    return values


def _parsed(key: str, value: Any) -> Any:
    field = Recipe.__dataclass_fields__.get(key)
    if not isinstance(value, str) or field is None or field.metadata["expected"] is str:
        return value
    return _parsed_yaml(f"{key}={reprlib.repr(value)}", value)


def _parsed_yaml(name: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark and f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{name}{line or ''}: not valid YAML: {error.problem}") from error
    # Of values that look like a date or a number of thousands of digits, and of nesting.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{name}: not valid YAML: {said}") from error


def _checked(field: dataclasses.Field, value: Any) -> Any:
    expected = field.metadata["expected"]
    if expected is object:
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
