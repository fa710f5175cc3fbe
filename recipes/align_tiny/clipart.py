"""The noisy corpus: Debian's openclipart, drawings with the words that people gave them."""

import collections
import dataclasses
import hashlib
import pathlib
import re
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
from emoji import CACHE
from PIL import Image

VERSION = "1:0.18+dfsg-19"
# Debian package, SHA-256 of its file
PACKAGES = (
    (
        "openclipart-png",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    ),
    (
        "openclipart-svg",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    ),
)
LICENSES = ("http://web.resource.org/cc/PublicDomain", "Public Domain")
# A title or keyword of more drawings than these names a collection, not what is drawn; of a
# series of drawings that share a name, as many are kept.
MAX_TITLE_USES = 12
MAX_KEYWORD_USES = 600
TEMPLATES = ("{}", "{}", "{}", "a drawing of {}", "a picture of {}", "clip art of a {}")
KEYWORDS_ADDED = 0.4  # share of captions with keywords behind the title
HELD_OUT_SHARE = 0.05  # of the drawings


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One drawing: its file, title and keywords."""

    picture: pathlib.Path
    title: str
    keywords: tuple[str, ...]


def fetch() -> dict[str, pathlib.Path]:
    """Downloads and unpacks Debian's packages once, checked against their digests.

    Returns:
        Package name -> its folder of drawings.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    folders = {}
    for name, digest in PACKAGES:
        file = CACHE / f"{name}_{VERSION.replace(':', '%3a')}_all.deb"
        if not file.exists():
            command = ["apt-get", "download", "-qq", f"{name}={VERSION}"]
            subprocess.run(command, cwd=CACHE, check=True)
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != digest:
            raise ValueError(f"{file}: SHA-256 {found}, expected {digest}")
        if not (CACHE / name).exists():
            subprocess.run(["dpkg-deb", "-x", file, CACHE / name], check=True)
        folders[name] = CACHE / name / "usr" / "share" / "openclipart" / name.rpartition("-")[2]
    return folders


def read_drawings() -> list[Drawing]:
    """Reads every drawing that its author gave to the public domain, in the order of the names."""
    folders = fetch()
    read = []
    for file in sorted(folders["openclipart-svg"].rglob("*.svg")):
        picture = folders["openclipart-png"] / file.relative_to(folders["openclipart-svg"])
        picture = picture.with_suffix(".png")
        license_, title, keywords = _metadata(file)
        if license_ in LICENSES and _is_drawable(picture):
            read.append((picture, title, keywords))
    titles = collections.Counter(title for _, title, _ in read)
    uses = collections.Counter(word for _, _, keywords in read for word in keywords)
    drawings = []
    for picture, title, keywords in read:
        if titles[title] > MAX_TITLE_USES or not title:
            title = _words(picture.stem)
        keywords = tuple(w for w in dict.fromkeys(keywords) if w and uses[w] <= MAX_KEYWORD_USES)
        drawings.append(Drawing(picture, title, keywords))
    seen: collections.Counter = collections.Counter()
    kept = []
    for drawing in drawings:
        seen[drawing.title] += 1
        if drawing.title and seen[drawing.title] <= MAX_TITLE_USES:
            kept.append(drawing)
    return kept


def _is_drawable(picture: pathlib.Path) -> bool:
    try:
        with Image.open(picture):
            return True
    except (OSError, Image.DecompressionBombError):
        return False


def _metadata(file: pathlib.Path) -> tuple[str, str, list[str]]:
    """Reads the license, the title and the keywords of an SVG file's RDF."""
    license_, title, keywords = "", "", []
    for element in ElementTree.parse(file).iter():
        name = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
        if name == "license":
            license_ = next(iter(element.attrib.values()), "")
        elif name == "title" and not title:
            title = _words(element.text or "")
        elif name == "subject":
            items = [item.text for item in element.iter() if str(item.tag).endswith("}li")]
            keywords = [
                word
                for word in map(_words, filter(None, items))
                if word and not word.startswith("hash")
            ]
    return license_, title, keywords


def _words(name: str) -> str:
    """Makes `red_apple-01` into `red apple`."""
    return " ".join(re.sub(r"[_\W\d]+", " ", name).lower().split())


def split(drawings: list[Drawing], seed: int = 0) -> tuple[list[Drawing], list[Drawing]]:
    """Draws what is trained on and what is held out; no title is in both."""
    titles = sorted({drawing.title for drawing in drawings})
    order = np.random.default_rng(seed).permutation(len(titles))
    held_out = {titles[i] for i in order[: round(HELD_OUT_SHARE * len(titles))]}
    trained = [drawing for drawing in drawings if drawing.title not in held_out]
    return trained, [drawing for drawing in drawings if drawing.title in held_out]


def draw_caption(drawing: Drawing, rng: np.random.Generator) -> str:
    """Draws one of the ways to describe a drawing."""
    caption = TEMPLATES[rng.integers(len(TEMPLATES))].format(drawing.title)
    if drawing.keywords and rng.random() < KEYWORDS_ADDED:
        caption = ", ".join((caption, *rng.permutation(drawing.keywords)[:3]))
    return caption


def read_picture(path: pathlib.Path, size: int) -> np.ndarray:
    """Reads a drawing as RGBA in the middle of a transparent square, uint8 (size, size, 4)."""
    with Image.open(path) as image:
        image = image.convert("RGBA")
    image.thumbnail((size, size), Image.BILINEAR)
    page = Image.new("RGBA", (size, size))
    page.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(page)
