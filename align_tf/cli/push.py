"""`align-tf push`: a model, an adapter or an export to the Hugging Face hub, with a card."""

import argparse
import pathlib
from typing import Any

from align_tf.cli.common import hint, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="a checkpoint with its processor, such as the output of train; an adapter; an export",
    )
    parser.add_argument("repo_id", metavar="ID", help="where it goes, such as me/my-align")
    parser.add_argument("--private", action="store_true", help="of a new one, for its owner alone")
    parser.add_argument("--revision", metavar="NAME", help="the branch (main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="propose it instead")
    card = parser.add_argument_group("the card, where DIR has no README.md")
    card.add_argument("--license", metavar="NAME", help="as the hub names it, such as apache-2.0")
    card.add_argument("--trained-on", metavar="TEXT", help="the data, in words")
    card.add_argument(
        "--figures", nargs="+", metavar="FILE", default=[], help="what evaluate --output wrote"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the card, upload nothing")


def run(arguments: Any) -> int:
    from align_tf import files, hub
    from align_tf.cards import CARD_NAME, make_card

    hub.check_id(arguments.repo_id)
    folder = pathlib.Path(arguments.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / CARD_NAME
    given = [name for name in ("license", "trained_on", "figures") if getattr(arguments, name)]
    if path.is_file() and given:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option}: of no use, as {path} is the card; expected one or the other")
    if not path.is_file():
        card = make_card(
            folder,
            arguments.repo_id,
            licence=arguments.license,
            data=arguments.trained_on,
            figures=[pathlib.Path(name) for name in arguments.figures],
        )
    else:
        card = files.decode_text(path.read_bytes())[0]
    if arguments.dry_run:
        print(card, end="")
        return 0
    own = not path.is_file()
    if own:
        files.write_text(path, card)
    say(f"Uploading {folder} to {arguments.repo_id} ...")
    try:
        url = hub.push(
            folder,
            arguments.repo_id,
            private=arguments.private or None,
            revision=arguments.revision,
            commit_message=arguments.message,
            create_pr=arguments.create_pr,
        )
    except BaseException:  # the next attempt may be to give another license
        if own:
            path.unlink()
        raise
    print(url)
    hint("align-tf classify", "photo.jpg", "--labels", "a cat", "--model", arguments.repo_id)
    return 0
