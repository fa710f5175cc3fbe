"""Evaluation of embeddings: arrays in, numbers out."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from align_tf.extras import extra
from align_tf.progress import track

# Side of a block of similarities: 64 MiB of float32.
BLOCK = 4096
# Similarities are tied where they differ by this many roundings of their size: a matrix product
# may give two equal columns numbers that differ in the last bits.
TIE = 16

# Prompts embedded at a time.
PROMPTS = 1024

# Weighted nearest neighbors, as DINO's eval_knn.py (arXiv 2104.14294).
NEIGHBORS, KNN_TEMPERATURE = 20, 0.07

# The linear probe, as in CLIP (arXiv 2103.00020, appendix A.3): L-BFGS, and a search for the
# regularisation that ends at 8 steps a decade.
MAX_ITERATIONS = 1000
COARSE_C = tuple(10.0**power for power in range(-6, 7, 2))
FINEST_STEP = 1 / 8  # decades
VALIDATION_SHARE = 0.2


# --- retrieval -----------------------------------------------------------------------------


def retrieval_metrics(
    image_embeds: ArrayLike,
    text_embeds: ArrayLike,
    pairs: ArrayLike | None = None,
    ks: Sequence[int] = (1, 5, 10),
    progress: bool = False,
) -> dict[str, float]:
    """Measures how near an image's own texts are to it, and a text's own images to it.

    The rank of a query is that of its best right answer, the others being left out (the
    Karpathy protocol of image-caption retrieval, arXiv 1412.2306). A wrong answer that is as
    near as the right one ranks before it, so embeddings that are all alike score 0, not 1.

    Args:
        image_embeds: (n, d), compared by dot product, so of unit length for cosines.
        text_embeds: (m, d).
        pairs: (p, 2), the row of an image and the row of a text that belongs to it; any number
            of texts an image and of images a text. None pairs row i with row i.
        ks: the k of the shares `r{k}`.
        progress: show it on stderr.

    Returns:
        For both directions, `i2t` (an image is the query) and `t2i`: `r1_i2t`, `r5_i2t`,
        `r10_i2t`, the share in 0..1 of the queries with a right answer among the k nearest, and
        `median_rank_i2t` and `mean_rank_i2t`, 1 being the best.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or an image or a text has no
            partner.
    """
    images = _embeddings("image_embeds", image_embeds)
    texts = _embeddings("text_embeds", text_embeds, images.shape[1])
    pairs = _pairs(pairs, len(images), len(texts))
    metrics = {}
    for way, ranks in zip(("i2t", "t2i"), _ranks(images, texts, pairs, progress), strict=True):
        metrics.update({f"r{k}_{way}": float(np.mean(ranks <= k)) for k in ks})
        metrics[f"median_rank_{way}"] = float(np.median(ranks))
        metrics[f"mean_rank_{way}"] = float(np.mean(ranks))
    return metrics


def distinct_pairs(
    image_ids: ArrayLike, text_ids: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Takes rows that pair an image with a text to each image and each text once.

    Args:
        image_ids: (p,), rows of one id hold the same image.
        text_ids: (p,), rows of one id hold the same text.

    Returns:
        The first row of each image (n,), the first row of each text (m,), and the `pairs` that
        `retrieval_metrics` takes for the embeddings of those rows.

    Raises:
        ValueError: the shapes differ.
    """
    image_ids, text_ids = np.asarray(image_ids), np.asarray(text_ids)
    if image_ids.shape != text_ids.shape or image_ids.ndim != 1:
        raise ValueError(
            f"image_ids of shape {image_ids.shape} and text_ids of shape {text_ids.shape}: "
            "expected (p,) both"
        )
    _, image_rows, images = np.unique(image_ids, return_index=True, return_inverse=True)
    _, text_rows, texts = np.unique(text_ids, return_index=True, return_inverse=True)
    return image_rows, text_rows, np.unique(np.stack([images, texts], axis=1), axis=0)


def _embeddings(name: str, embeds: ArrayLike, width: int | None = None) -> np.ndarray:
    """Checks embeddings, and takes them to float32, or float64 where they are."""
    embeds = np.asarray(embeds)
    if embeds.ndim != 2 or not embeds.size or width not in (None, embeds.shape[1]):
        raise ValueError(
            f"{name} of shape {embeds.shape}: expected (rows, {width or 'width'}), one row or more"
        )
    if embeds.dtype != np.float64:
        embeds = embeds.astype(np.float32, copy=False)
    for rows in _blocks(len(embeds)):
        finite = np.isfinite(embeds[rows]).all(axis=1)
        if not finite.all():
            row = rows.start + int(np.argmin(finite))
            raise ValueError(f"{name}: row {row} holds a NaN or an infinity")
    return embeds


def _pairs(pairs: ArrayLike | None, images: int, texts: int) -> np.ndarray:
    """Checks pairs (p, 2)."""
    if pairs is None:
        if images != texts:
            raise ValueError(
                f"{images} image_embeds and {texts} text_embeds: expected as many, or pairs"
            )
        return np.repeat(np.arange(images)[:, None], 2, axis=1)
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"pairs of {pairs.dtype} {pairs.shape}: expected whole numbers, (p, 2)")
    for name, rows, count in (("image", pairs[:, 0], images), ("text", pairs[:, 1], texts)):
        outside = rows[(rows < 0) | (rows >= count)]
        if outside.size:
            raise ValueError(f"pairs name {name} {outside[0]}: expected rows 0 to {count - 1}")
        alone = np.bincount(rows, minlength=count) == 0
        if alone.any():
            raise ValueError(f"{name} {np.argmax(alone)} is in no pair: expected a partner of each")
    return pairs


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))


def _ranks(
    left: np.ndarray, right: np.ndarray, pairs: np.ndarray, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks the best right answer of each row, by one pass over blocks of similarities.

    Returns:
        1 + the number of wrong answers that are at least as near, for each row of left (n,) and
        of right (m,).
    """
    left_best, right_best = _best(left, right, pairs)
    left_ranks, right_ranks = np.ones(len(left), int), np.ones(len(right), int)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    blocks = list(itertools.product(_blocks(len(left)), _blocks(len(right))))
    for rows, columns in track(blocks, "Comparing", show=progress and len(blocks) > 1):
        scores = left[rows] @ right[columns].T  # (rows, columns)
        first, last = np.searchsorted(pairs[:, 0], (rows.start, rows.stop))
        own = pairs[first:last]
        own = own[(own[:, 1] >= columns.start) & (own[:, 1] < columns.stop)]
        scores[own[:, 0] - rows.start, own[:, 1] - columns.start] = -np.inf
        # Bytes, counted in 16 bits, which hold BLOCK, are ten times as fast as count_nonzero.
        nearer = (scores >= left_best[rows, None]).view(np.uint8)
        left_ranks[rows] += nearer.sum(axis=1, dtype=np.uint16)
        nearer = (scores >= right_best[columns]).view(np.uint8)
        right_ranks[columns] += nearer.sum(axis=0, dtype=np.uint16)
    return left_ranks, right_ranks


def _best(left: np.ndarray, right: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds from which similarity on a wrong answer ranks before the best right one, (n,), (m,)."""
    dtype = np.result_type(left, right)
    bests = np.full(len(left), -np.inf, dtype), np.full(len(right), -np.inf, dtype)
    for some in _blocks(len(pairs)):
        rows, columns = pairs[some].T
        scores = np.einsum("pd,pd->p", left[rows], right[columns])
        np.maximum.at(bests[0], rows, scores)
        np.maximum.at(bests[1], columns, scores)
    lengths = [np.sqrt(np.einsum("nd,nd->n", embeds, embeds)) for embeds in (left, right)]
    rounding = dtype.type(TIE * np.finfo(dtype).eps)
    return (
        bests[0] - rounding * lengths[0] * lengths[1].max(),
        bests[1] - rounding * lengths[1] * lengths[0].max(),
    )


# --- zero-shot classification --------------------------------------------------------------


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
        embeds = _unit(_embeddings("embed_text's answer", embed_text(prompts)))
        embeds = embeds.reshape(len(part), len(templates), -1)  # (classes, templates, d)
        classes.append(_unit(embeds.mean(axis=1)))
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
    images = _embeddings("image_embeds", image_embeds)
    classes = _embeddings("class_embeds", class_embeds, images.shape[1])
    labels = _labels("labels", labels, len(images))
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels of {labels.dtype}: expected rows of class_embeds, whole numbers")
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if outside.size:
        raise ValueError(f"label {outside[0]}: expected rows 0 to {len(classes) - 1}")
    pairs = np.stack([np.arange(len(labels)), labels], axis=1)
    ranks, _ = _ranks(images, classes, pairs, progress)
    return _accuracies(ranks, labels, ks)


def _labels(name: str, labels: ArrayLike, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"{name} of shape {labels.shape}: expected ({count},)")
    return labels


def _accuracies(ranks: np.ndarray, labels: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    metrics = {f"top{k}": float(np.mean(ranks <= k)) for k in ks}
    _, classes = np.unique(labels, return_inverse=True)
    right = np.bincount(classes, weights=ranks == 1) / np.bincount(classes)
    return {**metrics, "mean_per_class": float(right.mean())}


def _unit(embeds: np.ndarray) -> np.ndarray:
    """Scales vectors to unit length; zero stays zero."""
    lengths = np.linalg.norm(embeds, axis=-1, keepdims=True)
    return embeds / np.where(lengths > 0, lengths, 1)


# --- nearest neighbors and the linear probe -------------------------------------------------


def knn_metrics(
    train_embeds: ArrayLike,
    train_labels: ArrayLike,
    test_embeds: ArrayLike,
    test_labels: ArrayLike,
    k: int = NEIGHBORS,
    temperature: float | None = KNN_TEMPERATURE,
    ks: Sequence[int] = (1, 5),
    progress: bool = False,
) -> dict[str, float]:
    """Measures classification by the nearest training embeddings, compared by cosine.

    Each of the k nearest votes for its class with weight exp(cosine / temperature), as in DINO
    (arXiv 2104.14294). A class with as many votes as the right one ranks before it.

    Args:
        train_embeds: (n, d).
        train_labels: (n,), numbers or strings.
        test_embeds: (m, d).
        test_labels: (m,).
        k: how many neighbors vote.
        temperature: None gives every neighbor one vote.
        ks: the k of the shares `top{k}`.
        progress: show it on stderr.

    Returns:
        What `zero_shot_metrics` returns.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, k is more than there are, or a
            test label is no training label.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    require_sklearn()
    from sklearn.neighbors import KNeighborsClassifier

    train, test = _labelled(train_embeds, train_labels, test_embeds, test_labels)
    if not 1 <= k <= len(train[0]):
        raise ValueError(f"k={k}: expected 1 to the {len(train[0])} training embeddings")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0, or None")

    def weights(distances: np.ndarray) -> np.ndarray:  # (rows, k), Euclidean
        # Of unit vectors cosine = 1 - distance^2 / 2; the nearest one's weight is scaled to 1.
        squares = np.square(distances)
        return np.exp((squares.min(axis=1, keepdims=True) - squares) / (2 * temperature))

    classifier = KNeighborsClassifier(
        k, weights="uniform" if temperature is None else weights, algorithm="brute"
    )
    classifier.fit(_unit(train[0]), train[1])
    ranks = _score_ranks(
        lambda embeds: classifier.predict_proba(_unit(embeds)), *test, "Voting", progress
    )
    return _accuracies(ranks, test[1], ks)


def linear_probe_metrics(
    train_embeds: ArrayLike,
    train_labels: ArrayLike,
    test_embeds: ArrayLike,
    test_labels: ArrayLike,
    ks: Sequence[int] = (1, 5),
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """Measures classification by logistic regression on the training embeddings.

    The inverse regularisation C is searched on a fifth of each training class, from 1e-6 to 1e6
    by two decades and then around the best down to an eighth of a decade, and the whole is fitted
    again with it, by at most 1,000 iterations of L-BFGS (CLIP, arXiv 2103.00020, appendix A.3).

    Args:
        train_embeds: (n, d), two or more of each class.
        train_labels: (n,), numbers or strings.
        test_embeds: (m, d).
        test_labels: (m,).
        ks: the k of the shares `top{k}`.
        seed: of the choice of the fifth.
        progress: show it on stderr.

    Returns:
        What `zero_shot_metrics` returns, and the `C` that was found.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, there is one class alone or
            one embedding of a class, or a test label is no training label.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    require_sklearn()
    train, test = _labelled(train_embeds, train_labels, test_embeds, test_labels)
    embeds, classes = train
    if not classes.any():
        raise ValueError("train_labels hold one class alone: expected two or more")
    held_out = holdout(np.asarray(train_labels), VALIDATION_SHARE, seed)

    def score(c: float) -> float:
        classifier = _fit_logistic(embeds[~held_out], classes[~held_out], c)
        return classifier.score(embeds[held_out], classes[held_out])

    c = _search(score, progress)
    classifier = _fit_logistic(embeds, classes, c)

    def scores(embeds: np.ndarray) -> np.ndarray:
        values = classifier.decision_function(embeds)
        return values if values.ndim == 2 else np.stack([-values, values], axis=1)

    ranks = _score_ranks(scores, *test, "Classifying", progress)
    return {**_accuracies(ranks, test[1], ks), "C": c}


def holdout(labels: ArrayLike, share: float, seed: int = 0) -> np.ndarray:
    """Draws a share of each class, at least one and not all.

    Args:
        labels: (n,), numbers or strings.
        share: in 0..1.
        seed: of the draw.

    Returns:
        bool (n,), True for those drawn.

    Raises:
        ValueError: there is one alone of a class.
    """
    labels = np.asarray(labels)
    drawn = np.zeros(len(labels), bool)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) == 1:
            raise ValueError(
                f"class {label!s} has one example: expected two or more, to hold one out"
            )
        count = min(max(1, int(share * len(rows))), len(rows) - 1)
        drawn[rng.choice(rows, count, replace=False)] = True
    return drawn


def require_sklearn() -> None:
    """Asks for the extra that `knn_metrics` and `linear_probe_metrics` need.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    with extra("eval", "kNN and the linear probe need scikit-learn"):
        import sklearn  # noqa: F401


def _labelled(
    train_embeds: ArrayLike, train_labels: ArrayLike, test_embeds: ArrayLike, test_labels: ArrayLike
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Checks both sets, and numbers their classes."""
    train = _embeddings("train_embeds", train_embeds)
    test = _embeddings("test_embeds", test_embeds, train.shape[1])
    names, classes = np.unique(
        _labels("train_labels", train_labels, len(train)), return_inverse=True
    )
    test_labels = _labels("test_labels", test_labels, len(test))
    unknown = np.setdiff1d(test_labels, names)
    if unknown.size:
        raise ValueError(f"test label {unknown[0]!s}: expected one of the training labels")
    return (train, classes), (test, np.searchsorted(names, test_labels))


def _score_ranks(
    score: Callable[[np.ndarray], np.ndarray],
    embeds: np.ndarray,
    classes: np.ndarray,
    description: str,
    progress: bool,
) -> np.ndarray:
    """Ranks the right class of each row among its scores (rows, c), ties before it."""
    ranks = np.empty(len(embeds), int)
    blocks = list(_blocks(len(embeds)))
    for rows in track(blocks, description, show=progress and len(blocks) > 1):
        scores = score(embeds[rows])
        right = np.take_along_axis(scores, classes[rows, None], axis=1)
        ranks[rows] = np.count_nonzero(scores >= right, axis=1)  # the right one is counted too
    return ranks


def _fit_logistic(embeds: np.ndarray, classes: np.ndarray, c: float):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():  # the number of iterations is part of the protocol
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(embeds, classes)


def _search(score: Callable[[float], float], progress: bool) -> float:
    """Finds the C of the highest score, of equals the middle; each halving tries two more."""

    def best() -> float:
        highest = max(scores.values())
        equals = sorted(c for c, value in scores.items() if value == highest)
        return equals[(len(equals) - 1) // 2]

    scores = {c: score(c) for c in track(COARSE_C, "Searching C", show=progress)}
    step = np.log10(COARSE_C[1] / COARSE_C[0])
    halvings = round(np.log2(step / FINEST_STEP))
    for _ in track(range(halvings), "Refining C", show=progress):
        step /= 2
        center = best()
        for c in (center / 10**step, center * 10**step):
            if COARSE_C[0] <= c <= COARSE_C[-1]:
                scores[c] = score(c)
    return float(best())
