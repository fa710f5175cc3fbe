"""`align-tf train`: training by a recipe, or going on with one."""

import argparse
import dataclasses
from typing import Any

from align_tf.cli.common import import_tensorflow, setting_help
from align_tf.training.recipe import Recipe, read_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file of the settings")
    for field in dataclasses.fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, metavar="VALUE", help=setting_help(field))


def run(arguments: Any) -> int:
    flags = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)}
    given = {key: value for key, value in flags.items() if value is not None}
    recipe = read_recipe(arguments.recipe, given)
    import_tensorflow()
    from align_tf.training.run import train

    print(train(recipe))
    return 0
