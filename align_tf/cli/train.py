"""`align-tf train`: training by a recipe, or going on with one."""

import argparse
import dataclasses
from typing import Any

from align_tf.cli.common import hint, import_tensorflow, say, setting_help
from align_tf.training.recipe import (
    COUNT,
    GROUPS,
    NATURAL,
    PAIRS,
    Recipe,
    check_extras,
    read_recipe,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file of the settings")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field in dataclasses.fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        # `--tensorboard` alone is as good as `--tensorboard true`.
        alone = {"nargs": "?", "const": "true"} if field.metadata["expected"] is bool else {}
        groups[field.metadata["group"]].add_argument(
            flag, metavar=_placeholder(field), help=setting_help(field), **alone
        )


def run(arguments: Any) -> int:
    flags = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)}
    given = {key: value for key, value in flags.items() if value is not None}
    recipe = read_recipe(arguments.recipe, given)
    check_extras(recipe)
    say(f"Training {recipe.model or recipe.preset} on {recipe.data}: loading TensorFlow ...")
    import_tensorflow()
    from align_tf.training.run import train

    output = train(recipe)
    print(output)
    labels = ("--labels", "a cat", "a dog")
    hint("align-tf classify", "photo.jpg", *labels, "--model", str(output))
    hint("align-tf export", "--model", str(output), "--output", "models/align")
    return 0


def _placeholder(field: dataclasses.Field) -> str:
    """What stands for the value in `--help`: its choices, N for a count, otherwise VALUE."""
    expected = field.metadata["expected"]
    if isinstance(expected, tuple):
        return f"{{{','.join(expected)}}}"
    if expected is bool:
        return "{true,false}"
    return "N" if expected in (COUNT, NATURAL, PAIRS) else "VALUE"
