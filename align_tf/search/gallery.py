"""What a search found, as a page and as a picture."""

import base64
import html
import os
import pathlib
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from align_tf import files
from align_tf.search.index import Hit
from align_tf.search.thumbnail import thumbnail, to_jpeg

# The montage: sizes in pixels.
SIDE, GAP, COLUMNS = 224, 16, 5
TITLE_SIZE, TEXT_SIZE = 22, 15
LINE = 20  # of text
BACKGROUND, EMPTY, DARK, LIGHT = "#ffffff", "#eceff3", "#1c2430", "#5b6675"

PAGE_SIDE = 320  # of a picture of the page, at most

STYLE = """
:root { color-scheme: light dark; --edge: #8884; --dim: #6b7480; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 24px; }
h1 { font-size: 1.4rem; font-weight: 600; overflow-wrap: anywhere; }
ol { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(200px, 100%), \
1fr)); list-style: none; margin: 0; padding: 0; }
li { border: 1px solid var(--edge); border-radius: 10px; overflow: hidden; }
.picture { align-items: center; aspect-ratio: 1; background: #8881; display: flex; \
justify-content: center; }
.picture img { height: 100%; object-fit: contain; width: 100%; }
.text { overflow-wrap: anywhere; padding: 10px 12px; }
.dim { color: var(--dim); font-size: .85rem; }
"""


def describe(
    text: str | None = None,
    image: str | os.PathLike | None = None,
    add: Sequence[str] = (),
    subtract: Sequence[str] = (),
) -> str:
    """Says a query in one line, such as `panda.jpg + in the snow - forest`."""
    parts = [os.path.basename(image)] if image else []
    plus = [*parts, *([text] if text else []), *add]
    return " + ".join(plus) + "".join(f" − {part}" for part in subtract)  # noqa: RUF001


def write_html(path: str | os.PathLike, query: str, hits: Sequence[Hit]) -> None:
    """Writes a page that holds all its pictures itself.

    Args:
        path: of the file.
        query: its title.
        hits: what was found.
    """
    cards = "\n".join(_card(place, hit) for place, hit in enumerate(hits, 1))
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(query)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(query)}</h1>\n<ol>\n{cards}\n</ol>\n</body>\n</html>\n"
    )
    files.write_text(pathlib.Path(path), page)


def _card(place: int, hit: Hit) -> str:
    picture = thumbnail(hit.picture, PAGE_SIDE)
    name = html.escape(hit.caption or hit.id)
    shown = '<span class="dim">no picture file</span>'
    if picture is not None:
        data = base64.b64encode(to_jpeg(picture)).decode()
        shown = f'<img src="data:image/jpeg;base64,{data}" alt="{name}">'
    return (
        f'<li><div class="picture">{shown}</div><div class="text"><div>{name}</div>'
        f'<div class="dim">{place} · {hit.score:.3f} · {html.escape(hit.id)}</div></div></li>'
    )


def montage(query: str, hits: Sequence[Hit], columns: int = COLUMNS) -> PIL.Image.Image:
    """Draws the pictures found in a grid, with the query above.

    Args:
        query: the title.
        hits: what was found, one or more.
        columns: pictures in a row, at most.

    Returns:
        An RGB image.
    """
    columns = min(columns, len(hits))
    rows = -(-len(hits) // columns)
    head, cell = GAP + 2 * LINE, SIDE + 2 * LINE + GAP
    size = (GAP + columns * (SIDE + GAP), head + rows * cell)
    image = PIL.Image.new("RGB", size, BACKGROUND)
    draw = PIL.ImageDraw.Draw(image)
    title, font = (PIL.ImageFont.load_default(points) for points in (TITLE_SIZE, TEXT_SIZE))
    draw.text((GAP, GAP), _fitted(query, title, size[0] - 2 * GAP), DARK, title)
    for place, hit in enumerate(hits):
        left, top = GAP + place % columns * (SIDE + GAP), head + place // columns * cell
        _draw_hit(image, draw, font, hit, left, top)
    return image


def write_montage(path: str | os.PathLike, query: str, hits: Sequence[Hit]) -> None:
    """Writes a montage as a PNG file."""
    with files.replacing(pathlib.Path(path)) as temporary:
        montage(query, hits).save(temporary, "PNG")


def _draw_hit(
    image: PIL.Image.Image,
    draw: PIL.ImageDraw.ImageDraw,
    font: PIL.ImageFont.FreeTypeFont,
    hit: Hit,
    left: int,
    top: int,
) -> None:
    picture = thumbnail(hit.picture, SIDE)
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), EMPTY)
    if picture is not None:
        offset = [(SIDE - length) // 2 for length in picture.size]
        image.paste(picture, (left + offset[0], top + offset[1]))
    score = f"{hit.score:.3f}"
    width = SIDE - font.getlength(score) - GAP // 2
    draw.text((left, top + SIDE + 4), _fitted(hit.caption or hit.id, font, width), DARK, font)
    draw.text((left + SIDE, top + SIDE + 4), score, LIGHT, font, anchor="ra")


def _fitted(text: str, font: PIL.ImageFont.FreeTypeFont, width: float) -> str:
    """Cuts a text to a width in pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
