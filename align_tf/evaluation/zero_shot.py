"""Zero-shot classification: classes embedded by their names."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from align_tf.evaluation.arrays import (
    accuracies,
    checked_embeddings,
    checked_labels,
    row_blocks,
    unit_length,
)
from align_tf.evaluation.retrieval import ranks_of_right_answers
from align_tf.progress import track

# Prompts embedded at a time.
PROMPTS = 1024


def check_labels(labels: Sequence[str], contents: Sequence[bytes]) -> None:
    """Refuses two classes of the same label, of whose images none could be told right.

    Args:
        labels: the names of the classes (c).
        contents: what stands for the text of each, see `identity.text_contents`.

    Raises:
        ValueError: two labels are the same to the model.
    """
    seen: dict[bytes, str] = {}
    for label, content in zip(labels, contents, strict=True):
        if content in seen:
            raise ValueError(
                f"labels {seen[content]!r} and {label!r} of two classes are the same to the model: "
                "expected labels that differ"
            )
        seen[content] = label


def class_embeddings(
    labels: Sequence[str],
    templates: Sequence[str],
    embed_text: Callable[[list[str]], ArrayLike],
    progress: bool = False,
) -> np.ndarray:
    """Embeds classes as the mean of what several templates say of them (CLIP, section 3.1.4).

    Args:
        labels: the names of the classes (c).
        templates: such as `a photo of a {}.`, `{}` standing for the label.
        embed_text: takes a list of texts to embeddings (m, d).
        progress: show it on stderr.

    Returns:
        (c, d), of unit length: the mean of the templates' embeddings, each of unit length.

    Raises:
        ValueError: there is no label or no template, a template has no `{}`, or an embedding is
            not finite.
    """
    if not len(labels) or not len(templates):
        raise ValueError(f"{len(labels)} labels, {len(templates)} templates: expected one or more")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r}: expected a {{}} for the label")
    step = max(1, PROMPTS // len(templates))
    parts = [labels[start : start + step] for start in range(0, len(labels), step)]
    classes = []
    for part in track(parts, "Embedding the classes", show=progress and len(parts) > 1):
        # Not str.format: a label or a template may hold other braces.
        prompts = [template.replace("{}", label) for label in part for template in templates]
        embeds = unit_length(checked_embeddings("embed_text's answer", embed_text(prompts)))
        embeds = embeds.reshape(len(part), len(templates), -1)  # (classes, templates, d)
        classes.append(unit_length(embeds.mean(axis=1)))
    return np.concatenate(classes)


def zero_shot_metrics(
    image_embeds: ArrayLike,
    class_embeds: ArrayLike,
    labels: ArrayLike,
    ks: Sequence[int] = (1, 5),
    progress: bool = False,
) -> dict[str, float]:
    """Measures how often an image's own class is among the nearest.

    A class as near as the right one ranks before it.

    Args:
        image_embeds: (n, d), compared by dot product.
        class_embeds: (c, d), as `class_embeddings` gives them.
        labels: (n,), the row of each image's class.
        ks: the k of the shares `top{k}`.
        progress: show it on stderr.

    Returns:
        `top1` and `top5`, shares of the images in 0..1, and `mean_per_class`, top1 as the mean
        over the classes that have images.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or a label is no row.
    """
    images, classes, labels = _checked(image_embeds, class_embeds, labels)
    return accuracies(_ranks(images, classes, labels, progress), labels, ks)


def zero_shot_predictions(
    image_embeds: ArrayLike, class_embeds: ArrayLike, labels: ArrayLike
) -> np.ndarray:
    """Says what class each image is taken for: the nearest.

    A class as near as the right one comes before it, as in `zero_shot_metrics`.

    Args:
        image_embeds: (n, d), compared by dot product.
        class_embeds: (c, d), as `class_embeddings` gives them.
        labels: (n,), the row of each image's class.

    Returns:
        int (n,), rows of class_embeds.

    Raises:
        ValueError: as `zero_shot_metrics`.
    """
    images, classes, labels = _checked(image_embeds, class_embeds, labels)
    predicted = np.array(labels, int)
    wrong = np.flatnonzero(_ranks(images, classes, labels, progress=False) > 1)
    for block in row_blocks(len(wrong)):
        rows = wrong[block]
        scores = images[rows] @ classes.T  # (rows, c)
        scores[np.arange(len(rows)), labels[rows]] = -np.inf
        predicted[rows] = scores.argmax(axis=1)
    return predicted


def _checked(
    image_embeds: ArrayLike, class_embeds: ArrayLike, labels: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images = checked_embeddings("image_embeds", image_embeds)
    classes = checked_embeddings("class_embeds", class_embeds, images.shape[1])
    labels = checked_labels("labels", labels, len(images))
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels of {labels.dtype}: expected rows of class_embeds, whole numbers")
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if outside.size:
        raise ValueError(f"label {outside[0]}: expected rows 0 to {len(classes) - 1}")
    return images, classes, labels


def _ranks(
    images: np.ndarray, classes: np.ndarray, labels: np.ndarray, progress: bool
) -> np.ndarray:
    pairs = np.stack([np.arange(len(labels)), labels], axis=1)
    return ranks_of_right_answers(images, classes, pairs, progress)[0]
