"""Training batches of align-tiny: one picture and one caption of each thing, drawn anew."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import clipart
import numpy as np
import tensorflow as tf
from augment import augment
from captions import draw_caption, train_vocabulary
from emoji import RENDERINGS, Concept, Split, read_picture

from align_tf import AlignTokenizer
from align_tf.files import write_text

SOURCE_SIDE = 64  # pixels of the pictures in the packages
CAPTIONS_PER_PICTURE = 16
MAX_TOKENS = 14  # of a caption in training; longer ones are cut
TONES_SHARE = 0.25  # of the concepts with skin tones bring all of them to an epoch


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """All training pictures, their captions, and which pictures show the same thing."""

    pictures: np.ndarray  # uint8 (p, SOURCE_SIDE, SOURCE_SIDE, 4)
    mirrored: np.ndarray  # bool (p,), whether the picture may be flipped
    input_ids: np.ndarray  # int32 (p, CAPTIONS_PER_PICTURE, MAX_TOKENS)
    concepts: list[list[list[int]]]  # concept -> plain and each tone -> its renderings' rows
    drawings: list[list[int]]  # title -> its drawings' rows


def make_training_set(
    concepts: list[Concept],
    parts: Split,
    drawings: list[clipart.Drawing],
    vocab_size: int,
    seed: int,
    vocabulary: pathlib.Path,
) -> tuple[TrainingSet, AlignTokenizer]:
    """Reads the pictures, draws their captions, and learns the vocabulary from the emoji's.

    It is learned once and kept in the file `vocabulary`: ties in it fall differently each time,
    which a training that goes on must not see.
    """
    rng = np.random.default_rng(seed)
    pictures, mirrored, captions = [], [], []

    def add(picture: np.ndarray, may_flip: bool, draw: Callable[[], str]) -> int:
        pictures.append(picture)
        mirrored.append(may_flip)
        captions.extend(draw() for _ in range(CAPTIONS_PER_PICTURE))
        return len(pictures) - 1

    concept_rows = []
    for concept, tones in _training_pictures(concepts, parts):
        concept_rows.append(
            [
                [
                    add(
                        read_picture(path, SOURCE_SIDE),
                        concept.mirrored,
                        lambda concept=concept, tone=tone: draw_caption(concept, tone, rng),
                    )
                    for path in paths
                ]
                for tone, paths in tones.items()
            ]
        )
    if not vocabulary.exists():
        write_text(vocabulary, "\n".join(train_vocabulary(captions, vocab_size)))
    tokenizer = AlignTokenizer(vocabulary.read_text().split("\n"))

    titles: dict[str, list[int]] = {}
    for drawing in drawings:
        row = add(
            clipart.read_picture(drawing.picture, SOURCE_SIDE),
            False,  # signs and letters are among them
            lambda drawing=drawing: clipart.draw_caption(drawing, rng),
        )
        titles.setdefault(drawing.title, []).append(row)

    input_ids = tokenizer(captions, max_length=MAX_TOKENS)["input_ids"].numpy()
    data = TrainingSet(
        pictures=np.stack(pictures),
        mirrored=np.array(mirrored),
        input_ids=input_ids.reshape(len(pictures), CAPTIONS_PER_PICTURE, MAX_TOKENS),
        concepts=concept_rows,
        drawings=list(titles.values()),
    )
    return data, tokenizer


def _training_pictures(concepts: list[Concept], parts: Split) -> Iterator[tuple[Concept, dict]]:
    """Yields each concept and its pictures by skin tone, without what is kept from training."""
    for index, concept in enumerate(concepts):
        if index in parts.unseen:
            continue
        tones: dict[str, list] = {}
        for rendering in RENDERINGS:
            if parts.held_out.get(index) != rendering:
                for path, tone in concept.pictures[rendering]:
                    tones.setdefault(tone, []).append(path)
        yield concept, tones


def make_dataset(
    data: TrainingSet,
    side: int,
    batch_size: int,
    drawings_share: float,
    seed: int,
) -> tf.data.Dataset:
    """Returns endless batches of what AlignModel takes.

    Args:
        data: pictures and captions.
        side: of the pictures in pixels.
        batch_size: pairs in a batch.
        drawings_share: of a batch's pairs that are drawings with noisy captions.
        seed: of the order; the draws within a batch follow TensorFlow's own seed.
    """
    pictures, mirrored = tf.constant(data.pictures), tf.constant(data.mirrored)
    input_ids = tf.constant(data.input_ids)

    def load(rows: tf.Tensor) -> dict[str, tf.Tensor]:
        choice = tf.random.uniform(tf.shape(rows), maxval=CAPTIONS_PER_PICTURE, dtype=tf.int32)
        ids = tf.gather_nd(input_ids, tf.stack([rows, choice], axis=1))
        image = augment(tf.gather(pictures, rows), tf.gather(mirrored, rows), side)
        return {
            "pixel_values": image / 127.5 - 1.0,
            "input_ids": ids,
            "attention_mask": tf.cast(ids != 0, tf.int32),  # [PAD] has id 0
            "token_type_ids": tf.zeros_like(ids),
        }

    rows = tf.data.Dataset.from_generator(
        lambda: _rows(data, batch_size, round(drawings_share * batch_size), seed),
        output_signature=tf.TensorSpec([batch_size], tf.int32),
    )
    # One batch at a time, so that the random draws come in one order.
    return rows.map(load).prefetch(2)


def _rows(
    data: TrainingSet, batch_size: int, drawings_count: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields the rows of each batch; no thing comes twice in one, for it would be its own negative.

    The skin tones of a concept come together, so that they are each other's negatives.
    """
    rng = np.random.default_rng(seed)
    emoji_count = batch_size - drawings_count
    drawings = _drawings(data.drawings, drawings_count, rng)
    while True:
        rows: list[int] = []
        for index in rng.permutation(len(data.concepts)):
            tones = data.concepts[index]
            if rng.random() > TONES_SHARE:
                tones = tones[:1]
            rows += [int(rng.choice(same)) for same in tones]
        starts = range(0, len(rows) - emoji_count + 1, emoji_count)
        for start in rng.permutation(starts):
            batch = rows[start : start + emoji_count]
            yield np.array([*batch, *next(drawings)], np.int32)


def _drawings(titles: list[list[int]], count: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yields the rows of `count` drawings of different titles, endlessly."""
    while True:
        order = rng.permutation(len(titles)) if count else [0]
        for start in range(0, len(order) - count + 1, count or 1):
            yield [int(rng.choice(titles[i])) for i in order[start : start + count]]
