"""What a search found, as a page and as a picture."""

import base64
import html
import os
import pathlib
import urllib.parse
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw

from align_tf import files
from align_tf.search.index import Hit
from align_tf.search.thumbnail import thumbnail, to_jpeg
from align_tf.search.writing import Writer
from align_tf.terminal import literal_lines

# The montage: sizes in pixels.
SIDE, GAP, COLUMNS = 224, 16, 5
TITLE_SIZE, TEXT_SIZE = 22, 15
LINE = 20  # of text
BACKGROUND, EMPTY, DARK, LIGHT = "#ffffff", "#eceff3", "#1c2430", "#5b6675"

PAGE_SIDE = 320  # of a picture of the page, at most

STYLE = """
:root { color-scheme: light dark; --edge: #8884; --dim: #6b7480; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; \
padding: clamp(12px, 4vw, 24px); }
header { align-items: center; display: flex; gap: 16px; margin-bottom: 16px; }
header img { border: 1px solid var(--edge); border-radius: 10px; display: block; height: 96px; \
object-fit: contain; width: 96px; }
h1 { font-size: 1.4rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
ol { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, \
minmax(min(200px, calc(50% - 8px)), 1fr)); list-style: none; margin: 0; padding: 0; }
li { border: 1px solid var(--edge); border-radius: 10px; overflow: hidden; }
.picture { align-items: center; aspect-ratio: 1; background: #8881; display: flex; \
justify-content: center; }
.picture a, .picture img { display: block; height: 100%; object-fit: contain; width: 100%; }
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


def write_html(
    path: str | os.PathLike,
    query: str,
    hits: Sequence[Hit],
    picture: str | os.PathLike | None = None,
) -> None:
    """Writes a page that holds all its pictures itself, each a link to its file.

    Args:
        path: of the file.
        query: its title.
        hits: what was found.
        picture: the image file of the query.
    """
    path = pathlib.Path(path)
    cards = "\n".join(_card(place, hit, path) for place, hit in enumerate(hits, 1))
    title, asked = _escaped(query), ""
    if picture is not None:
        asked = _linked(_image(thumbnail(picture, PAGE_SIDE), "the query"), picture, path)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header>{asked}<h1 dir="auto">{title}</h1></header>\n'
        f"<ol>\n{cards}\n</ol>\n</body>\n</html>\n"
    )
    files.write_text(path, page)


def _card(place: int, hit: Hit, page: pathlib.Path) -> str:
    name = hit.caption or hit.id
    shown = '<span class="dim">not shown</span>'
    if not hit.outside:
        shown = _image(thumbnail(hit.picture, PAGE_SIDE), name)
        if hit.path is not None:
            shown = _linked(shown, hit.path, page)
    about = [str(place), f"{hit.score:.3f}", *([hit.id] if hit.caption else [])]
    return (
        f'<li><div class="picture">{shown}</div><div class="text"><div dir="auto">'
        f'{_escaped(name)}</div><div class="dim">{_escaped(" · ".join(about))}</div></div></li>'
    )


def _image(picture: PIL.Image.Image | None, name: str) -> str:
    if picture is None:
        return '<span class="dim">no picture file</span>'
    data = base64.b64encode(to_jpeg(picture)).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{_escaped(name)}">'


def _linked(shown: str, picture: str | os.PathLike, page: pathlib.Path) -> str:
    """Makes what is shown a link to a file that is there, as it is seen from the page."""
    if not os.path.isfile(picture):
        return shown
    try:
        seen = pathlib.Path(os.path.relpath(picture, page.absolute().parent)).as_posix()
        link = urllib.parse.quote(os.fsencode(seen))
    except ValueError:  # on another drive
        link = pathlib.Path(picture).absolute().as_uri()
    return f'<a href="{html.escape(link)}">{shown}</a>'


def _escaped(text: str) -> str:
    """Escapes what is HTML, and what a page may not hold."""
    return html.escape(literal_lines(text))


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
    writer = Writer([query, *(hit.caption or hit.id for hit in hits)])
    title = writer.fitted(query, TITLE_SIZE, size[0] - 2 * GAP)
    writer.write(draw, (GAP, GAP), title, TITLE_SIZE, DARK)
    for place, hit in enumerate(hits):
        left, top = GAP + place % columns * (SIDE + GAP), head + place // columns * cell
        _draw_hit(image, draw, writer, hit, left, top)
    return image


def write_montage(path: str | os.PathLike, query: str, hits: Sequence[Hit]) -> None:
    """Writes a montage as a PNG file."""
    with files.replacing(pathlib.Path(path)) as temporary:
        montage(query, hits).save(temporary, "PNG")


def _draw_hit(
    image: PIL.Image.Image,
    draw: PIL.ImageDraw.ImageDraw,
    writer: Writer,
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
    own = writer.length(score, TEXT_SIZE)
    name = writer.fitted(hit.caption or hit.id, TEXT_SIZE, SIDE - own - GAP // 2)
    writer.write(draw, (left, top + SIDE + 4), name, TEXT_SIZE, DARK)
    writer.write(draw, (left + SIDE - own, top + SIDE + 4), score, TEXT_SIZE, LIGHT)
