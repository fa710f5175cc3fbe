"""The model card of align-tiny, and the pictures that come with it."""

import pathlib

from clipart import VERSION as CLIPART_VERSION
from emoji import PACKAGES, Concept, Split
from evaluate import on_background

from align_tf import AlignModel

# Held-out renderings for the quickstart, by CLDR label.
EXAMPLES = ("cupcake", "panda", "pineapple", "police car", "rose", "star")

CARD = """\
---
license: apache-2.0
library_name: align-tf
pipeline_tag: zero-shot-image-classification
---

# align-tiny

A small ALIGN: an EfficientNet of {vision:.2f} million and a BERT of {text:.2f} million parameters,
{side} pixels, {dim} dimensions, float16. It knows emoji: drawings with their names and keywords,
and English words alone. It is there to try the library with, and for tests; it is no model of
photographs.

## Data

| package | version | what | licence |
|---|---|---|---|
| `emoji-datasource-google` | {google} | Noto Emoji renderings, names | Apache-2.0 |
| `emoji-datasource-twitter` | {twitter} | Twemoji renderings | CC-BY 4.0 |
| `emojibase-data` | {emojibase} | Unicode CLDR labels and tags | MIT; Unicode License |
| `emojilib` | {emojilib} | keywords | MIT |
| `openclipart-svg`, `-png` | {openclipart} | drawings, titles, keywords | public domain |

The first four are npm's, the last is Debian's. Twemoji: © Twitter, Inc and other contributors.
The first names, and the packaging of the pictures, are those of emoji-data by Cal Henderson (MIT).
The pictures in `examples/` are held-out renderings of both sets, put on white, chosen among those
that the model names rightly; the figures say how often it does.

## Figures

Kept from training: one rendering, Noto's or Twemoji's, of a tenth of the concepts with all its
skin tones ("held-out renderings"), both renderings of some more concepts ("unseen"), and the
drawings of a twentieth of openclipart's titles. Each picture, on white, meets one caption,
`a picture of {{CLDR label or title}}`. Recall among all pictures of the set in percent,
R@1 / R@5 / R@10:

| set | images | chance | text to image | image to text |
|---|---|---|---|---|
{rows}

## Reproduce

    python recipes/align_tiny/train.py

"""


def write_card(folder: pathlib.Path, model: AlignModel, figures: dict[str, dict]) -> str:
    """Writes README.md and returns the table of figures in it."""
    rows = "\n".join(_row(name, values) for name, values in figures.items())
    versions = {name: version for name, version, _ in PACKAGES}
    card = CARD.format(
        vision=model.vision_model.count_params() / 1e6,
        text=model.text_model.count_params() / 1e6,
        side=model.config.vision_config.image_size,
        dim=model.config.projection_dim,
        google=versions["emoji-datasource-google"],
        twitter=versions["emoji-datasource-twitter"],
        emojibase=versions["emojibase-data"],
        emojilib=versions["emojilib"],
        openclipart=CLIPART_VERSION,
        rows=rows,
    )
    (folder / "README.md").write_text(card.rstrip() + "\n")
    return rows


def _row(name: str, values: dict) -> str:
    count = values["images"]
    columns = [name, str(count), " / ".join(f"{100 * k / count:.1f}" for k in (1, 5, 10))]
    for way in ("t2i", "i2t"):
        columns.append(" / ".join(f"{100 * values[f'r{k}_{way}']:.1f}" for k in (1, 5, 10)))
    return f"| {' | '.join(columns)} |"


def write_examples(folder: pathlib.Path, concepts: list[Concept], parts: Split) -> None:
    """Writes the example pictures, all of them renderings that were not trained on."""
    held_out = {concepts[index].label: index for index in parts.held_out}
    folder.mkdir(parents=True, exist_ok=True)
    for label in EXAMPLES:
        if label not in held_out:  # another seed keeps others from training
            continue
        index = held_out[label]
        path, _ = concepts[index].pictures[parts.held_out[index]][0]
        (folder / f"{label.replace(' ', '_')}.png").write_bytes(on_background(path))
