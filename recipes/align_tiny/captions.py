"""Captions of the emoji in several phrasings, and the WordPiece vocabulary made from them."""

import string
from collections.abc import Iterable

import numpy as np
import tokenizers
from emoji import Concept

TEMPLATES = (
    "{}",
    "{}",
    "{} emoji",
    "an emoji of {}",
    "a picture of {}",
    "a picture of a {}",
    "a photo of a {}",
    "a drawing of {}",
    "an icon of {}",
    "clip art of a {}",
)
EVALUATION_TEMPLATE = "a picture of {}"
KEYWORDS_ALONE = 0.12  # share of captions without a name
KEYWORDS_ADDED = 0.2  # share of captions with a name and keywords

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def canonical_caption(concept: Concept, tone: str = "") -> str:
    """Returns the caption that a picture is evaluated with."""
    return EVALUATION_TEMPLATE.format(_with_tone(concept.label, tone, ": "))


def draw_caption(concept: Concept, tone: str, rng: np.random.Generator) -> str:
    """Draws one of the ways to describe a picture."""
    keywords = list(rng.permutation(concept.keywords)[: rng.integers(2, 5)])
    kind = rng.random()
    if kind < KEYWORDS_ALONE and len(keywords) > 1:
        return _with_tone(", ".join(keywords), tone, ", ")
    name = concept.label if rng.random() < 0.5 else str(rng.choice(concept.names))
    name = _with_tone(name, tone, str(rng.choice((": ", " with ", ", "))))
    caption = TEMPLATES[rng.integers(len(TEMPLATES))].format(name)
    if kind > 1.0 - KEYWORDS_ADDED:
        caption = ", ".join((caption, *keywords))
    return caption


def _with_tone(words: str, tone: str, joint: str) -> str:
    return f"{words}{joint}{tone}" if tone else words


def train_vocabulary(texts: Iterable[str], size: int) -> list[str]:
    """Learns an uncased WordPiece vocabulary that can spell any ASCII text.

    Args:
        texts: what to learn from.
        size: tokens at most.

    Returns:
        The tokens in the order of their ids.
    """
    letters = [c for c in string.printable.lower() if not c.isspace()]
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(
        # Each letter alone and within a word, so that both forms of it get an id.
        [*texts, *letters, *(f"a{c}" for c in letters)],
        vocab_size=size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=letters,
    )
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.get)
