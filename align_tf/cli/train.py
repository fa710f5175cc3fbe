"""`align-tf train`: training by a recipe, or going on with one."""

import argparse
from typing import Any

from align_tf.cli.common import hint, import_tensorflow, say
from align_tf.cli.settings import add_settings, read_settings
from align_tf.training.recipe import check_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_settings(parser)


def run(arguments: Any) -> int:
    recipe = read_settings(arguments)
    check_extras(recipe)
    on = ", ".join(recipe.said_data())
    say(f"Training {recipe.model or recipe.preset} on {on}: loading TensorFlow ...")
    import_tensorflow()
    from align_tf.training.run import train

    output = train(recipe)
    print(output)
    labels = ("--labels", "a cat", "a dog")
    hint("align-tf classify", "photo.jpg", *labels, "--model", str(output))
    hint("align-tf export", "--model", str(output), "--output", "models/align")
    return 0
