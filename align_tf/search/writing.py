"""Text of any script in a picture: each of its characters in a font that has it."""

import functools
import io
import itertools
from collections.abc import Iterable, Iterator

import PIL.ImageDraw
import PIL.ImageFont

from align_tf import fonts
from align_tf.terminal import literal

SIZE_ASKED = 12  # of the font whose characters are looked at: any
ELLIPSIS = "…"


class Writer:
    """Writes texts, by fonts that have their characters.

    Args:
        texts: all that will be written.
    """

    def __init__(self, texts: Iterable[str]):
        base = PIL.ImageFont.load_default(SIZE_ASKED)
        shown = "".join(map(_shown, texts)) + ELLIPSIS
        self._files = fonts.fallbacks(shown, io.BytesIO(base.font_bytes))
        self._font = functools.cache(_font)

    def length(self, text: str, size: int) -> float:
        """Returns the width of a text in pixels."""
        return sum(self._font(file, size).getlength(run) for file, run in self._runs(text))

    def fitted(self, text: str, size: int, width: float) -> str:
        """Cuts a text to a line of a width in pixels."""
        text = _shown(text)
        if len(text) <= width and self.length(text, size) <= width:
            return text
        text = text[: int(width)]  # nearly all characters are a pixel wide or more
        while text and self.length(text + ELLIPSIS, size) > width:
            text = text[:-1]
        return text.rstrip() + ELLIPSIS

    def write(
        self,
        draw: PIL.ImageDraw.ImageDraw,
        place: tuple[float, float],
        text: str,
        size: int,
        color: str,
    ) -> None:
        """Draws a text from its left upper corner on.

        Args:
            draw: of the picture.
            place: the corner.
            text: one line.
            size: of the font.
            color: of the text.
        """
        left, top = place
        ascent, _ = self._font(None, size).getmetrics()
        for file, run in self._runs(text):
            font = self._font(file, size)
            draw.text((left, top + ascent), run, color, font, anchor="ls")
            left += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[str | None, str]]:
        """Splits a text where the font changes: its file, None for the usual one, and the run."""
        text, files = _shown(text), []
        for character in text:
            if fonts.is_drawn(character):
                files.append(self._files.get(character))
            else:  # it belongs to what is before it
                files.append(files[-1] if files else None)
        for place in reversed(range(len(text) - 1)):
            if text[place] == " " and files[place] != files[place + 1]:
                files[place] = None  # the spaces of emoji are as wide as they are
        for file, run in itertools.groupby(zip(files, text, strict=True), lambda pair: pair[0]):
            characters = (character for _, character in run)
            if file is None:  # which has no glyph for what joins and selects others
                characters = (one for one in characters if one == " " or fonts.is_drawn(one))
            yield file, "".join(characters)


def _font(file: str | None, size: int) -> PIL.ImageFont.FreeTypeFont:
    if file is None:
        return PIL.ImageFont.load_default(size)
    return PIL.ImageFont.truetype(file, size)


def _shown(text: str) -> str:
    """Writes a text in one line."""
    return literal(" ".join(text.split()))
