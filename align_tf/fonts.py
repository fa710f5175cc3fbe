"""Fonts for the characters that a font lacks: the system's, or those of the extra `fonts`."""

import functools
import importlib.util
import logging
import os
import pathlib
import unicodedata
from typing import Any

# Packages of the extra `fonts`: folders of font files.
PACKAGES = ("manimgx_fonts", "noto_cjk_sans_otc")
SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
REGULAR = 400  # the weight

# Of the categories of Unicode: what controls, joins and separates, and what is no character.
UNDRAWN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")
TOLD = 8  # characters that a message names

logger = logging.getLogger(__name__)


def fallbacks(text: str, base: Any) -> dict[str, str]:
    """Finds fonts for the characters of a text that its font lacks.

    What no font has is told once, in a line that names what to install.

    Args:
        text: all that will be drawn.
        base: the font that draws what it can: its file, or a file object.

    Returns:
        Character -> the font file to draw it with; empty where the font has all of them.
    """
    drawn = sorted({character for character in text if is_drawn(character)})
    if all(character.isascii() for character in drawn):
        return {}
    try:
        from matplotlib.ft2font import FT2Font
    except ModuleNotFoundError:  # whether a font has a character cannot be told
        _tell_missing("".join(filter(lambda character: character > "\u017f", drawn)))
        return {}
    missing = [one for one in drawn if not FT2Font(base).get_char_index(ord(one))]
    found: dict[str, str] = {}
    for path in _font_files() if missing else ():
        font = FT2Font(path)
        found |= {one: path for one in missing if font.get_char_index(ord(one))}
        missing = [one for one in missing if one not in found]
        if not missing:
            break
    _tell_missing("".join(missing))
    return found


def is_drawn(character: str) -> bool:
    """Says whether a character leaves ink, as one that joins or selects others does not."""
    selects = "VARIATION SELECTOR" in unicodedata.name(character, "")
    return unicodedata.category(character) not in UNDRAWN and not selects


@functools.cache
def _font_files() -> list[str]:
    """Lists the fonts whose outlines can be drawn, those that are plain first."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    own = font_manager.findfont("DejaVu Sans")  # which matplotlib has with it
    ranked = []
    for path in [own, *sorted(font_manager.findSystemFonts()), *_packaged()]:
        try:
            about = font_manager.ttfFontProperty(FT2Font(path))
        except Exception:  # no font, a broken one, or pictures of one size: each raises its own
            continue
        name = about.name.lower()
        slanted, serif = about.style != "normal", "serif" in name and "sans" not in name
        heavy = about.weight if isinstance(about.weight, int) else REGULAR
        ranked.append((slanted, serif, "mono" in name, abs(heavy - REGULAR), path))
    return [path for *_, path in sorted(ranked)]


def _packaged() -> list[str]:
    specs = filter(None, map(importlib.util.find_spec, PACKAGES))
    folders = [folder for spec in specs for folder in spec.submodule_search_locations or ()]
    files = (path for folder in folders for path in pathlib.Path(folder).iterdir())
    return sorted(os.fspath(path) for path in files if path.suffix.lower() in SUFFIXES)


@functools.cache  # once for the same characters
def _tell_missing(characters: str) -> None:
    if not characters:
        return
    shown = " ".join(characters[:TOLD]) + (" ..." if len(characters) > TOLD else "")
    if all(map(importlib.util.find_spec, (*PACKAGES, "matplotlib"))):
        logger.warning("no font for %s: expected one of them among the system's fonts", shown)
    else:
        logger.warning('no font for %s: pip install "align-tf[fonts]"', shown)
