"""The settings of a training as flags, for the commands that take a recipe."""

import argparse
import dataclasses

from align_tf.cli.common import setting_help
from align_tf.training.recipe import COUNT, GROUPS, NATURAL, PAIRS, Recipe


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
        added[field.metadata["group"]].add_argument(
            flag, metavar=_placeholder(field), help=setting_help(field), **alone
        )


def given_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the settings that flags state, as text."""
    flags = {
        field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(Recipe)
    }
    return {key: value for key, value in flags.items() if value is not None}


def _placeholder(field: dataclasses.Field) -> str:
    """What stands for the value in `--help`: its choices, N for a count, otherwise VALUE."""
    expected = field.metadata["expected"]
    if isinstance(expected, tuple):
        return f"{{{','.join(expected)}}}"
    if expected is bool:
        return "{true,false}"
    return "N" if expected in (COUNT, NATURAL, PAIRS) else "VALUE"
