"""Hugging Face's BERT text normalization as a table over code points, applied in the graph."""

import functools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import flatbuffers
import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

# Probed from Hugging Face's own normalizer; tests/goldens/preprocessing/make_bert_normalizer.py
# writes it. Python's unicodedata is another table: Hugging Face keeps code points that its own,
# older one leaves unassigned, the younger combining marks among them.
TABLE = pathlib.Path(__file__).with_name("bert_normalizer.npz")

# Private-use code points, all of which the normalizer deletes from a text, so that inside the graph
# they can stand for a token that is taken out of it, and enclose one that is found.
FIRST_PLACEHOLDER = 0x10FF00
MAX_TOKENS = 250
OPEN, CLOSE = "\U0010fffc", "\U0010fffd"

# How a FastBertNormalize model stores what a code point becomes: a flag, the offset in the pool of
# strings, the length (tensorflow_text/core/kernels/fast_bert_normalizer.h).
CHANGED = 1 << 30
LENGTH_BITS = 6


def placeholder(index: int) -> str:
    """Returns the character that stands for a token in normalized text."""
    return chr(FIRST_PLACEHOLDER + index)


PLACEHOLDERS = [placeholder(index) for index in range(MAX_TOKENS)]


class BertNormalizer:
    """Normalizes text and sets its words apart, as Hugging Face's BertNormalizer and
    BertPreTokenizer do together.

    Args:
        lowercase: lower-cases, character by character.
        strip_accents: decomposes (NFD) and deletes the nonspacing marks.
        handle_chinese_chars: makes each CJK ideograph a word.
        special_tokens: strings that are taken out of the text before it is normalized; each comes
            out as a word of its own, `placeholder(index)`.
        normalized_tokens: strings that are taken out of the normalized text, before its words are
            set apart, as their own normalized forms; their placeholders come after the others.
    """

    def __init__(
        self,
        *,
        lowercase: bool,
        strip_accents: bool,
        handle_chinese_chars: bool,
        special_tokens: Sequence[str],
        normalized_tokens: Sequence[str] = (),
    ):
        count = len(special_tokens) + len(normalized_tokens)
        if count > MAX_TOKENS:
            raise ValueError(f"{count} special and added tokens: expected {MAX_TOKENS} at most")
        self.strip_accents = strip_accents
        self._special_tokens = list(special_tokens)
        # ASCII text in which no special token begins needs the table alone.
        begins = "".join(sorted({token[0] for token in special_tokens}))
        ascii_rest = [chr(c) for c in range(1, 128) if chr(c) not in begins]
        self._plain = f"[{re.escape(''.join(ascii_rest))}]*"
        if strip_accents:
            self._mark_starts, self._mark_ranks = _mark_ranges()
            self._marks = f"(?s).*[{_character_class(_marks())}].*"
        settings = (lowercase, strip_accents, handle_chinese_chars)
        self._normalized_tokens: list[str] = []
        if normalized_tokens:  # the table in two steps
            self._unsplit_model = _unsplit_model(*settings)
            forms = _apply(self._unsplit_model, self._prepare(tf.constant(normalized_tokens), ()))
            self._normalized_tokens = [form.decode("utf-8") for form in forms.numpy()]
        self._model = _split_model() if normalized_tokens else _whole_model(*settings)

    def normalize(self, texts: tf.Tensor) -> tf.Tensor:
        """Takes UTF-8 strings (n,) to normalized ones, in which blanks separate the words."""
        plain = tf.reduce_all(tf.strings.regex_full_match(texts, self._plain))
        texts = tf.cond(plain, lambda: texts, lambda: self._prepare(texts, self._special_tokens))
        if self._normalized_tokens:
            texts = _apply(self._unsplit_model, texts)
            texts = _take_out(texts, self._normalized_tokens, len(self._special_tokens))
        return _apply(self._model, texts)

    def _prepare(self, texts: tf.Tensor, special_tokens: Sequence[str]) -> tf.Tensor:
        # Invalid bytes become U+FFFD, which the table deletes.
        texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
        texts = tf.strings.regex_replace(texts, f"[{placeholder(0)}-{CLOSE}]", "\ufffd")
        texts = _take_out(texts, special_tokens, 0)
        if not self.strip_accents:
            return texts
        marked = tf.reduce_any(tf.strings.regex_full_match(texts, self._marks))
        return tf.cond(marked, lambda: self._reorder(texts), lambda: texts)

    def _reorder(self, texts: tf.Tensor) -> tf.Tensor:
        """Puts the combining marks that stay in the text in NFD's order.

        A run of marks is sorted by combining class; the sort is stable.
        """
        points = tf.strings.unicode_decode(_apply(_reorder_model(), texts), "UTF-8")
        flat = points.flat_values
        place = tf.searchsorted(tf.constant(self._mark_starts), flat, side="right") - 1
        rank = tf.cast(tf.gather(tf.constant(self._mark_ranks), place), tf.int64)
        # A run begins with each character that is no mark, and with each text.
        row = points.value_rowids()
        new_row = tf.concat([row[:1] >= 0, row[1:] != row[:-1]], 0)
        run = tf.cumsum(tf.cast((rank == 0) | new_row, tf.int64))
        order = tf.argsort(run * 256 + rank, stable=True)
        return tf.strings.unicode_encode(points.with_flat_values(tf.gather(flat, order)), "UTF-8")


def _take_out(texts: tf.Tensor, tokens: Sequence[str], first: int) -> tf.Tensor:
    """Puts `placeholder(first + i)` for tokens[i]: the leftmost first, and there the longest.

    Two steps, as one regex replaces by one string: all are enclosed, then each is replaced.
    """
    by_length = sorted(filter(None, tokens), key=len, reverse=True)
    if not by_length:
        return texts
    found = "|".join(map(re.escape, by_length))
    texts = tf.strings.regex_replace(texts, f"({found})", rf"{OPEN}\1{CLOSE}")
    for index, token in enumerate(tokens, first):
        enclosed = f"{OPEN}{re.escape(token)}{CLOSE}"
        texts = tf.strings.regex_replace(texts, enclosed, placeholder(index))
    return texts


def _apply(model: np.ndarray, texts: tf.Tensor) -> tf.Tensor:
    return tf_text.FastBertNormalizer(model_buffer=tf.constant(model)).normalize(texts)


# --- the probed table ----------------------------------------------------------------------


@functools.cache
def _table() -> dict[str, np.ndarray]:
    with np.load(TABLE) as file:
        arrays = dict(file)
    return {k: np.cumsum(v) if v.dtype == np.int32 else v for k, v in arrays.items()}


def _characters(name: str) -> list[str]:
    return [chr(c) for c in _table()[name].tolist()]


@functools.cache
def _mapping(name: str) -> dict[str, str]:
    values = _table()[f"{name}_to"].tobytes().decode("utf-8").split(" ")
    return dict(zip(_characters(name), values, strict=True))


@functools.cache
def _marks() -> dict[str, int]:
    """Returns the marks that stripping accents leaves, with the rank of their combining class."""
    return dict(zip(_characters("marks"), _table()["marks_rank"].tolist(), strict=True))


def _changes(lowercase: bool, strip_accents: bool, handle_chinese_chars: bool) -> dict[str, str]:
    """Returns what normalizing makes of each code point that is neither kept, deleted nor, whole,
    a word of its own."""
    stripped = _mapping("decomposed") if strip_accents else {}
    lowered = _mapping("lower") if lowercase else {}
    changes = {}
    for character in {*stripped, *lowered}:
        out = stripped.get(character, character)
        changes[character] = "".join(lowered.get(c, c) for c in out)
    changes = {k: v for k, v in changes.items() if k != v}
    for character in changes.keys() & _ideographs(handle_chinese_chars):
        changes[character] = f" {changes[character]} "
    return {**changes, **dict.fromkeys(_characters("blank"), " ")}


def _ideographs(handle_chinese_chars: bool) -> list[str]:
    return _characters("chinese") if handle_chinese_chars else []


def _reorder_changes() -> dict[str, str]:
    """Returns what has to happen to a text before its marks are sorted, deletion aside.

    What is deleted in the end goes at once, except for what marks do not move across; characters
    whose decomposition holds a mark that stays are decomposed.
    """
    barriers, marks = set(_characters("barriers")), _marks()
    return {
        character: out
        for character, out in _mapping("decomposed").items()
        if (not out and character not in barriers) or any(c in marks for c in out)
    }


def _mark_ranges() -> tuple[np.ndarray, np.ndarray]:
    """Returns the code points at which the rank of the combining class changes, and the ranks."""
    ranks = np.zeros(0x110001, np.int32)
    ranks[[ord(c) for c in _marks()]] = list(_marks().values())
    starts = np.flatnonzero(np.diff(ranks, prepend=-1))
    return starts.astype(np.int32), ranks[starts]


def _character_class(characters: Iterable[str]) -> str:
    return "".join(sorted(characters))


# --- the FastBertNormalize model -----------------------------------------------------------


@functools.cache
def _whole_model(lowercase: bool, strip_accents: bool, handle_chinese_chars: bool) -> np.ndarray:
    changes = _changes(lowercase, strip_accents, handle_chinese_chars)
    isolated = {c: f" {c} " for c in _characters("isolated")}
    changes = {c: "".join(isolated.get(o, o) for o in out) for c, out in changes.items()}
    words = [*_ideographs(handle_chinese_chars), *isolated, *PLACEHOLDERS]
    return _model(changes, words, delete=True)


@functools.cache
def _unsplit_model(lowercase: bool, strip_accents: bool, handle_chinese_chars: bool) -> np.ndarray:
    changes = _changes(lowercase, strip_accents, handle_chinese_chars)
    return _model(changes, _ideographs(handle_chinese_chars), delete=True)


@functools.cache
def _split_model() -> np.ndarray:
    return _model({}, [*_characters("isolated"), *PLACEHOLDERS], delete=False)


@functools.cache
def _reorder_model() -> np.ndarray:
    return _model(_reorder_changes(), [], delete=True)


def _model(changes: Mapping[str, str], words: Sequence[str], *, delete: bool) -> np.ndarray:
    """Builds a model of tf-text's FastBertNormalize.

    Its layout: tensorflow_text/core/kernels/fast_bert_normalizer_model.fbs.

    Args:
        changes: what a character becomes.
        words: characters that get a blank on either side, unless `changes` has them.
        delete: deletes what normalizing deletes, but for placeholders.
    """
    data = np.zeros(0x110000, np.int64)
    # In the pool two words share the blank between them.
    pool = bytearray(f" {' '.join(words)} ".encode())
    points = np.array([ord(word) for word in words], np.int64)
    sizes = 3 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)  # bytes, blanks included
    data[points] = CHANGED | np.cumsum(sizes - 1) - (sizes - 1) << LENGTH_BITS | sizes
    offsets = {}
    for character, out in changes.items():
        if out not in offsets:
            encoded = out.encode("utf-8")
            offsets[out] = CHANGED | len(pool) << LENGTH_BITS | len(encoded)
            pool += encoded
        data[ord(character)] = offsets[out]
    if delete:  # what cleaning deletes is left alone by the rest
        placeholders = [ord(character) for character in PLACEHOLDERS]
        data[np.setdiff1d(_table()["deleted"], placeholders)] = CHANGED

    builder = flatbuffers.Builder(1 << 20)
    pool_at = builder.CreateByteVector(bytes(pool))
    trie_at = builder.CreateNumpyVector(_trie(data))
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(1, trie_at, 0)
    builder.PrependInt32Slot(2, int(data[0]), 0)
    builder.PrependUOffsetTRelativeSlot(3, pool_at, 0)
    builder.Finish(builder.EndObject())
    return np.frombuffer(bytes(builder.Output()), np.uint8)


def _trie(data: np.ndarray) -> np.ndarray:
    """Builds a Darts-clone trie from the UTF-8 of each code point to its entry in data.

    A node at cell i holds its own byte (bits 0-7), whether it ends a key (bit 8) and an offset
    (bits 10-31): its child by byte b is at i ^ offset ^ b, its value at i ^ offset
    (tensorflow_text/core/kernels/darts_clone_trie_wrapper.h). Equal subtrees and equal values are
    stored once.

    Args:
        data: int64 (0x110000,), 0 where there is no key; the key of code point 0 is left out.
    """
    # The root is cell 0 and its children lie from 256 on; the rest comes in regions of 64 cells,
    # one for each continuation byte 0x80-0xBF.
    cells = [np.zeros(256, np.uint32), np.zeros(256, np.uint32)]
    cells[0][0] = 256 << 10
    size = 512
    values = np.unique(data[data != 0])
    value_cells = size + np.arange(len(values))
    cells.append((values | 1 << 31).astype(np.uint32))
    cells.append(np.zeros(-len(values) % 64, np.uint32))
    size += len(values) + -len(values) % 64
    byte = 0x80 | np.arange(64)

    def key_ends(at: np.ndarray, label: np.ndarray, value: np.ndarray) -> np.ndarray:
        value_at = value_cells[np.searchsorted(values, value).clip(max=len(values) - 1)]
        return np.where(value, label | 0x100 | (at ^ value_at) << 10, 0)

    def links(at: np.ndarray, label: np.ndarray, region: np.ndarray) -> np.ndarray:
        return np.where(region, label | (at ^ region ^ 0x80) << 10, 0)

    def add_regions(rows: np.ndarray, unit) -> np.ndarray:
        """Adds one region for each distinct row (n, 64) and returns where each row's is."""
        nonlocal size
        numbers: dict[bytes, int] = {}
        inverse = [numbers.setdefault(row.tobytes(), len(numbers)) for row in rows]
        unique = np.frombuffer(b"".join(numbers), rows.dtype).reshape(-1, 64)
        at = size + np.arange(unique.size).reshape(unique.shape)
        cells.append(unit(at, byte, unique).astype(np.uint32).reshape(-1))
        size += unique.size
        return np.where(rows.any(axis=1), at[inverse, 0], 0)

    root = 256 ^ np.arange(256)
    last = add_regions(data.reshape(-1, 64), key_ends)  # by code point >> 6
    third = add_regions(last.reshape(-1, 64), links)  # by code point >> 12
    fourth = add_regions(np.pad(third, (0, -len(third) % 64)).reshape(-1, 64), links)  # >> 18
    first = cells[1]
    first[1:0x80] = key_ends(root[1:0x80], np.arange(1, 0x80), data[1:0x80])
    for lead, regions in ((0xC0, last[:32]), (0xE0, third[:16]), (0xF0, fourth)):
        label = lead + np.arange(len(regions))
        first[label] = links(root[label], label, regions)
    first[0xC0:0xC2] = 0  # overlong forms of ASCII
    cells.append(np.zeros(-size % 256, np.uint32))
    return np.concatenate(cells)
