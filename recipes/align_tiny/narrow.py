"""Writes pairs of a narrow kind, grey emoji, and of what align-tiny knows, colored ones.

    python recipes/align_tiny/narrow.py data/narrow

In the folder: `train`, grey emoji as align-tiny saw them in color; `grey` and `colored`, the
renderings that were kept from its training.
"""

import pathlib
import sys

from captions import canonical_caption
from emoji import RENDERINGS, read_concepts, split
from evaluate import on_background
from PIL import Image


def write(folder: pathlib.Path, name: str, path: pathlib.Path, caption: str, grey: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{name}.png"
    picture.write_bytes(on_background(path))
    if grey:
        with Image.open(picture) as image:
            image.convert("L").convert("RGB").save(picture)
    picture.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")


def main(output: pathlib.Path) -> None:
    concepts = read_concepts()
    parts = split(concepts)
    for index, concept in enumerate(concepts):
        for rendering in RENDERINGS:
            path = concept.pictures[rendering][0][0]
            row = f"{index:04}_{rendering}", path, canonical_caption(concept)
            if parts.held_out.get(index) == rendering:
                write(output / "grey", *row, grey=True)
                write(output / "colored", *row, grey=False)
            elif index not in parts.unseen and index not in parts.held_out:
                write(output / "train", *row, grey=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
