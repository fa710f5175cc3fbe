"""The emoji pictures and captions that align-tiny learns from: fetching, splits, arrays."""

import dataclasses
import hashlib
import json
import pathlib
import re
import subprocess
import tarfile

import numpy as np
from PIL import Image

CACHE = pathlib.Path(__file__).parents[2] / "data" / "align_tiny"

# npm package, version, SHA-256 of its tarball
PACKAGES = (
    (
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    (
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    (
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    ("emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303"),
)
RENDERINGS = ("google", "twitter")
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
# Subcategories and words of drawings whose mirror image means something else.
DIRECTIONAL = re.compile(
    r"arrow|alphanum|av-symbol|button|chart|clock|currency|facing|flag|keycap|left|math|moon"
    r"|music|punctuation|right|sign|time|zodiac"
)
HELD_OUT_SHARE = 0.10  # of the concepts: one rendering is kept from training
UNSEEN_SHARE = 0.03  # of the concepts: both renderings are kept from training


@dataclasses.dataclass(frozen=True)
class Concept:
    """One emoji: its words, and its pictures by rendering, the plain one first."""

    label: str
    names: tuple[str, ...]
    keywords: tuple[str, ...]
    mirrored: bool  # whether its mirror image means the same
    pictures: dict[str, tuple[tuple[pathlib.Path, str], ...]]  # (file, skin tone or "")


def fetch() -> dict[str, pathlib.Path]:
    """Downloads and unpacks the packages once, checked against their digests.

    Returns:
        Package name -> its folder.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    folders = {}
    for name, version, digest in PACKAGES:
        tarball = CACHE / f"{name}-{version}.tgz"
        if not tarball.exists():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=CACHE, check=True)
        found = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if found != digest:
            raise ValueError(f"{tarball}: SHA-256 {found}, expected {digest}")
        folders[name] = CACHE / name / "package"
        if not folders[name].exists():
            with tarfile.open(tarball) as archive:
                archive.extractall(CACHE / name, filter="data")
    return folders


def read_concepts() -> list[Concept]:
    """Reads every emoji that both sets have drawn, in the order of emoji-datasource."""
    folders = fetch()
    emojibase = json.loads((folders["emojibase-data"] / "en" / "data.json").read_text())
    labels = {_key(entry["hexcode"]): entry for entry in emojibase}
    emojilib = json.loads((folders["emojilib"] / "dist" / "emoji-en-US.json").read_text())
    keywords = {_key("-".join(f"{ord(c):04X}" for c in k)): words for k, words in emojilib.items()}
    entries = json.loads((folders["emoji-datasource-google"] / "emoji.json").read_text())
    concepts = []
    for entry in entries:
        key = _key(entry["unified"])
        if key not in labels or not all(entry[f"has_img_{set_}"] for set_ in RENDERINGS):
            continue
        words = [*labels[key].get("tags", ()), *keywords.get(key, ())[1:]]
        label = labels[key]["label"].lower()
        concepts.append(
            Concept(
                label=label,
                names=tuple(_plain(n) for n in (entry["name"] or "", *entry["short_names"]) if n),
                keywords=tuple(dict.fromkeys(_plain(word) for word in words)),
                mirrored=not DIRECTIONAL.search(f"{entry['subcategory']} {label}"),
                pictures={set_: _pictures(folders, entry, set_) for set_ in RENDERINGS},
            )
        )
    return concepts


def _key(hexcode: str) -> str:
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _plain(words: str) -> str:
    return words.replace("_", " ").replace("-", " ").lower().strip()


def _pictures(folders: dict, entry: dict, set_: str) -> tuple[tuple[pathlib.Path, str], ...]:
    folder = folders[f"emoji-datasource-{set_}"] / "img" / set_ / "64"
    pictures = [(folder / entry["image"], "")]
    for tone, variation in entry.get("skin_variations", {}).items():
        if tone in TONES and variation[f"has_img_{set_}"]:
            pictures.append((folder / variation["image"], TONES[tone]))
    return tuple(pictures)


@dataclasses.dataclass(frozen=True)
class Split:
    """Which renderings of which concepts are kept from training."""

    held_out: dict[int, str]  # concept -> the rendering that is never trained on
    unseen: tuple[int, ...]  # concepts that are never trained on


def split(concepts: list[Concept], seed: int = 0) -> Split:
    """Draws the held-out renderings and the unseen concepts."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(concepts))
    held = round(HELD_OUT_SHARE * len(concepts))
    unseen = round(UNSEEN_SHARE * len(concepts))
    return Split(
        held_out={int(i): RENDERINGS[rng.integers(2)] for i in order[:held]},
        unseen=tuple(int(i) for i in order[held : held + unseen]),
    )


def read_picture(path: pathlib.Path, size: int) -> np.ndarray:
    """Reads a picture as RGBA, uint8 (size, size, 4)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA").resize((size, size), Image.BILINEAR))
