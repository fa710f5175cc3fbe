"""What the commands share: loading a model, lines to stderr, tables to stdout, arguments."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from align_tf import interrupts
from align_tf.terminal import literal_lines, say

# Nothing heavy is imported here: `align-tf --help` answers at once.

EXIT_USER_ERROR = 2

# What TensorFlow and Keras import wherever it is installed, for functions that no command calls: a
# third of the time that their import takes. Who needs one of them imports it afterwards.
OPTIONAL = {"jax", "matplotlib", "scipy", "sklearn"}


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="align-tiny",
        metavar="DIR_OR_ID",
        help="a checkpoint folder, a Hugging Face id such as kakaobrain/align-base, or align-tiny",
    )


def hint(command: str, *arguments: str) -> None:
    """Says on stderr, which people read, a command that may come next."""
    say(f"Next: {' '.join([command, *map(shlex.quote, arguments)])}")


def import_tensorflow() -> None:
    """Imports TensorFlow without the lines that its libraries write to stderr as they start."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with interrupts.delayed(), _unseen(OPTIONAL if _on_tensorflow() else ()):
            import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextlib.contextmanager
def _unseen(packages: Iterable[str]) -> Iterator[None]:
    """Has packages be none that are installed until the end of the block."""
    unseen = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(unseen))
    try:
        yield
    finally:
        for name in unseen:
            del sys.modules[name]


def _on_tensorflow() -> bool:
    """Says whether Keras will run on TensorFlow, as it finds that out itself."""
    named = os.environ.get("KERAS_BACKEND")
    if named is None:
        home = pathlib.Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            named = json.loads((home / "keras.json").read_text(encoding="utf-8")).get("backend")
    return named in (None, "tensorflow")


def load(name: str) -> tuple[Any, Any]:
    say(f"Loading {name} ...")
    import_tensorflow()
    from align_tf.models.align import AlignModel
    from align_tf.preprocessing.processor import AlignProcessor

    return AlignModel.from_pretrained(name), AlignProcessor.from_pretrained(name)


def probabilities(model: Any, processor: Any, images: list, labels: list[str]) -> Any:
    """Returns (images, labels), the softmax of each image's logits, as a server gives it.

    Raises:
        CheckpointError: the logits are not finite, as those of weights that hold NaN.
    """
    import keras
    import numpy as np

    from align_tf.client.batches import classification
    from align_tf.files import CheckpointError

    output = model(processor(images=images, text=labels, padding="longest"))
    logits = keras.ops.convert_to_numpy(output.logits_per_image)
    if not np.isfinite(logits).all():
        raise CheckpointError("the model gives NaN or infinity: expected weights that are finite")
    return classification(labels, labels, logits).probs


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table to stdout; what is in it is text, not rich's markup."""
    import rich.console
    import rich.table
    from rich.text import Text

    heading = Text(literal_lines(title), style="bold")
    table = rich.table.Table(title=heading, title_justify="left")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(literal_lines(cell)) for cell in row))
    rich.console.Console().print(table)


def check_files(paths: list[str]) -> None:
    missing = [path for path in paths if not pathlib.Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file")


def count(text: str) -> int:
    """A whole number of 1 or more, as the type of an argument."""
    return _whole(text, 1, math.inf, "1 or more")


def port(text: str) -> int:
    """The number of a port, as the type of an argument; 0 takes one that is free."""
    return _whole(text, 0, 65535, "0 to 65535")


def _whole(text: str, least: int, most: float, expected: str) -> int:
    number = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
    return number


def setting_help(field: dataclasses.Field) -> str:
    """What `--help` says of a setting: its text and, as a user would write it, its default."""
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return field.metadata["help"] + ("" if default is None else f" ({default})")
