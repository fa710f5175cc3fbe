"""The settings of a training as flags, for the commands that take a recipe."""

import argparse
import dataclasses
from typing import Any

from align_tf.cli.common import setting_help
from align_tf.training.recipe import COUNT, GROUPS, MODEL, NATURAL, PAIRS, Recipe
from align_tf.training.recipe_file import read_recipe
from align_tf.training.recipe_sources import SOURCES


def add_settings(parser: argparse.ArgumentParser, groups: tuple[str, ...] = GROUPS) -> None:
    """Adds a recipe's file, and a flag for each setting of some groups."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file of the settings")
    added = {name: parser.add_argument_group(name) for name in groups}
    for field in dataclasses.fields(Recipe):
        if field.metadata["group"] not in added:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        # `--tensorboard` alone is as good as `--tensorboard true`.
        alone = {"nargs": "?", "const": "true"} if field.metadata["expected"] is bool else {}
        if field.metadata["expected"] is SOURCES:
            alone = {"nargs": "+", "action": "extend"}
        added[field.metadata["group"]].add_argument(
            flag, metavar=_placeholder(field), help=setting_help(field), **alone
        )
    added[MODEL].add_argument(
        "--data-weights",
        nargs="+",
        metavar="WEIGHT",
        help="of the sources of --data, in their order: each one's share of every batch",
    )


def read_settings(arguments: argparse.Namespace, silent: dict[str, Any] | None = None) -> Recipe:
    """Reads the recipe of a command: its file, and what flags state.

    Args:
        arguments: of a command to which `add_settings` has added.
        silent: as `read_recipe` takes it.

    Raises:
        FileNotFoundError, ValueError: as `read_recipe`.
    """
    flags = {
        field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(Recipe)
    }
    flags = {key: value for key, value in flags.items() if value is not None}
    data, weights = flags.pop("data", []), arguments.data_weights
    path = arguments.recipe
    if path is None and data[1:] and data[-1].endswith((".yaml", ".yml")):  # stands behind --data
        path = data.pop()
    if weights is not None and len(weights) != len(data):
        raise ValueError(
            f"data_weights={' '.join(weights)}: expected one for each --data, {len(data)}"
        )
    if weights is not None:
        pairs = zip(data, weights, strict=True)
        flags["data"] = [{"source": source, "weight": weight} for source, weight in pairs]
    elif data:
        flags["data"] = data if data[1:] else data[0]
    return read_recipe(path, flags, silent)


def _placeholder(field: dataclasses.Field) -> str:
    """What stands for the value in `--help`: its choices, N for a count, otherwise VALUE."""
    expected = field.metadata["expected"]
    if isinstance(expected, tuple):
        return f"{{{','.join(expected)}}}"
    if expected is bool:
        return "{true,false}"
    return "N" if expected in (COUNT, NATURAL, PAIRS) else "VALUE"
