"""Evaluates align-tiny on the emoji pictures that were kept from training."""

import io
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np
from captions import canonical_caption
from emoji import RENDERINGS, Concept, Split
from PIL import Image

from align_tf import AlignModel, AlignProcessor
from align_tf.evaluation import retrieval_metrics

BATCH = 64


def on_background(path: pathlib.Path, color: str = "white") -> bytes:
    """Puts a transparent picture on a plain background, as an opaque PNG file."""
    with Image.open(path) as image:
        image = image.convert("RGBA")
    page = Image.new("RGBA", image.size, color)
    page.alpha_composite(image)
    file = io.BytesIO()
    page.convert("RGB").save(file, "PNG")
    return file.getvalue()


def evaluation_pairs(concepts: list[Concept], parts: Split) -> dict[str, list[tuple]]:
    """Lists what is measured: name of the set -> (picture's path, caption) pairs."""
    held_out = [
        [(path, canonical_caption(concepts[index], tone)) for path, tone in pictures]
        for index, rendering in parts.held_out.items()
        for pictures in [concepts[index].pictures[rendering]]
    ]
    pairs = {
        "held-out renderings": list(itertools.chain.from_iterable(held_out)),
        "held-out renderings, no skin tones": [pictures[0] for pictures in held_out],
    }
    for rendering in RENDERINGS:
        pairs[f"unseen concepts, {rendering}"] = [
            (concepts[index].pictures[rendering][0][0], canonical_caption(concepts[index]))
            for index in parts.unseen
        ]
    return pairs


def embed(
    model: AlignModel, processor: AlignProcessor, pairs: Sequence[tuple], background: str = "white"
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds pictures and captions: image_embeds and text_embeds, (n, d) each."""
    images, texts = [], []
    for start in range(0, len(pairs), BATCH):
        paths, captions = zip(*pairs[start : start + BATCH], strict=True)
        files = [on_background(path, background) for path in paths]
        output = model(processor(images=files, text=list(captions)))
        images.append(np.asarray(output.image_embeds))
        texts.append(np.asarray(output.text_embeds))
    return np.concatenate(images), np.concatenate(texts)


def evaluate(
    model: AlignModel, processor: AlignProcessor, concepts: list[Concept], parts: Split
) -> dict[str, dict]:
    """Measures retrieval within each set.

    Returns:
        Set -> `images`, their number, and what `retrieval_metrics` returns.
    """
    figures = {}
    for name, pairs in evaluation_pairs(concepts, parts).items():
        metrics = retrieval_metrics(*embed(model, processor, pairs))
        figures[name] = {"images": len(pairs), **metrics}
    return figures
