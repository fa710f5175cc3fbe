"""The linear probe: a logistic regression over embeddings."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from align_tf.evaluation.arrays import accuracies
from align_tf.evaluation.examples import checked_examples, holdout, rank_classes, require_sklearn
from align_tf.progress import track

# The linear probe, as in CLIP (arXiv 2103.00020, appendix A.3): L-BFGS, and a search for the
# regularisation that ends at 8 steps a decade.
MAX_ITERATIONS = 1000
COARSE_C = tuple(10.0**power for power in range(-6, 7, 2))
FINEST_STEP = 1 / 8  # decades
VALIDATION_SHARE = 0.2


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
    sets = (train_embeds, train_labels, test_embeds, test_labels)
    return linear_probe_with_predictions(*sets, ks, seed, progress)[0]


def linear_probe_with_predictions(
    train_embeds: ArrayLike,
    train_labels: ArrayLike,
    test_embeds: ArrayLike,
    test_labels: ArrayLike,
    ks: Sequence[int] = (1, 5),
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], np.ndarray]:
    """Measures as `linear_probe_metrics` does, and says what each test embedding is taken for.

    Args:
        train_embeds, train_labels, test_embeds, test_labels, ks, seed, progress: as there.

    Returns:
        The figures; and (m,) labels, of classes that are as likely another than the right one.

    Raises:
        ValueError, ModuleNotFoundError: as there.
    """
    require_sklearn()
    train, test = checked_examples(train_embeds, train_labels, test_embeds, test_labels)
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

    ranks, predicted = rank_classes(scores, *test, "Classifying", progress)
    return {**accuracies(ranks, test[1], ks), "C": c}, np.unique(train_labels)[predicted]


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
