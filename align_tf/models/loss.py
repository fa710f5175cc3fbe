"""Contrastive losses of ALIGN, and the gathering of embeddings across replicas."""

import math
from typing import Any

import keras
from keras import ops

REDUCTIONS = ("mean", "sum")
MASKED_LOGIT = -1e30  # a logit that no softmax sees, and finite, so that its weight of 0 makes it 0


def gather_across_replicas(rows: Any) -> Any:
    """Concatenates the rows of all replicas, with gradient.

    Under the JAX backend, and outside a distribution strategy, the batch is already whole.

    Args:
        rows: (n, ...), the embeddings, ids or weights of this replica, or None.

    Returns:
        (n * replicas, ...), in the order of the replicas; None for None.
    """
    if rows is None or keras.backend.backend() != "tensorflow":
        return rows
    import tensorflow as tf

    if tf.distribute.in_cross_replica_context():
        return rows
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return rows
    # Between workers TensorFlow asks a tensor for its device, which one of the batch has not.
    return context.all_gather(tf.identity(rows), axis=0)


def num_replicas() -> int:
    """Returns how many replicas take this step together."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def has_workers() -> bool:
    """Returns whether the replicas are in several processes, by MultiWorkerMirroredStrategy."""
    if num_replicas() == 1:
        return False
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    return strategy.num_replicas_in_sync > len(strategy.extended.worker_devices)


def positive_pairs(image_ids: Any = None, text_ids: Any = None, rows: Any = None) -> Any:
    """Says which image belongs to which text, beside its own.

    Args:
        image_ids: (n,), equal where two pairs have the same image.
        text_ids: (n,), equal where two pairs have the same text.
        rows: int (r,), the pairs to say it of; None for all n.

    Returns:
        bool (r, n), true where two pairs share the image or the text, and where they are one;
        None where neither is given, for a pair's own alone.
    """
    given = [ids for ids in (image_ids, text_ids) if ids is not None]
    some = [ids if rows is None else ops.take(ids, rows) for ids in given]
    same = [a[:, None] == b[None, :] for a, b in zip(some, given, strict=True)]
    if len(same) == 2:
        return ops.logical_or(*same)
    return same[0] if same else None


def own_pairs(logits: Any, rows: Any = None) -> Any:
    """Says which column of (r, n) logits is a row's own: the diagonal, or the number in `rows`."""
    columns = ops.arange(ops.shape(logits)[1])
    return (columns if rows is None else rows)[:, None] == columns[None, :]


# Of some rows, before their mean: r of the n pairs against all n columns.


def contrastive_rows(
    logits: Any, positives: Any, column_weight: Any, label_smoothing: float
) -> Any:
    """Softmax cross-entropy of each row against its own column (ALIGN, arXiv 2102.05918, 4.2).

    The target of a row is spread evenly over its positives, and `label_smoothing` of it evenly
    over all columns. A pair of weight 0 is no column.

    Args:
        logits: (r, n), similarities divided by the temperature.
        positives: bool (r, n), see `positive_pairs`; None for the diagonal of (n, n).
        column_weight: (n,), weight of each pair; None for 1.
        label_smoothing: share of the target that is spread evenly over all columns.

    Returns:
        (r,), float32.
    """
    logits, present = _present(logits, column_weight)
    positives = own_pairs(logits) if positives is None else positives
    if present is not None:
        positives = ops.logical_and(positives, present)
    # The target is (1 - s) on the positives plus s / n everywhere, so the cross-entropy is a
    # weighted sum of the two means below; no target is made.
    # One kernel: sums of exponentials of our own differed in the last bit from run to run.
    log_probs = ops.log_softmax(logits, axis=-1)
    matched = _mean_where(positives, log_probs)
    even = ops.mean(log_probs, axis=-1) if present is None else _mean_where(present, log_probs)
    return -(1.0 - label_smoothing) * matched - label_smoothing * even


def sigmoid_rows(logits: Any, positives: Any, column_weight: Any) -> Any:
    """Sum over columns of the binary cross-entropy of each row (SigLIP, arXiv 2303.15343, 3.2).

    Args:
        logits: (r, n), similarities divided by the temperature, plus the learned bias.
        positives: bool (r, n), the pairs to tell from the others; None for the diagonal of (n, n).
        column_weight: (n,), weight of each pair, of which one of 0 is no column; None for 1.

    Returns:
        (r,), float32.
    """
    logits = ops.cast(logits, "float32")
    positives = own_pairs(logits) if positives is None else positives
    # -log sigmoid(x) is softplus(-x), and of a negative softplus(x).
    losses = ops.softplus(ops.where(positives, -logits, logits))
    if column_weight is not None:
        losses = ops.where(column_weight > 0, losses, 0.0)
    return ops.sum(losses, axis=-1)


def right_rows(logits: Any, positives: Any, column_weight: Any) -> Any:
    """1 for each row whose largest column is a positive, 0 for the others; as `sigmoid_rows`."""
    logits, _ = _present(logits, column_weight)
    positives = own_pairs(logits) if positives is None else positives
    best = ops.argmax(logits, axis=-1)
    right = ops.take_along_axis(positives, best[:, None], axis=-1)[:, 0]
    return ops.cast(right, "float32")


def reduce_directions(text_to_image: Any, image_to_text: Any, reduction: str) -> Any:
    """Returns the losses' `mean`, as Hugging Face, or their `sum`, as the original."""
    both = text_to_image + image_to_text
    return both / 2.0 if reduction == "mean" else both


def weighted_mean(rows: Any, sample_weight: Any) -> Any:
    """Mean of (n,) rows by their weights, None for 1; 0 where all weights are 0."""
    if sample_weight is None:
        return ops.mean(rows)
    total = ops.sum(sample_weight)
    return ops.sum(rows * sample_weight) / ops.where(total > 0, total, 1.0)


def initial_logit_bias(batch_size: int) -> float:
    """Returns log(p / (1 - p)), p = 1 / batch_size: the bias at which no pair is a surprise.

    Args:
        batch_size: pairs in a batch, over all replicas.

    Raises:
        ValueError: there is no negative in such a batch.
    """
    if not isinstance(batch_size, int) or batch_size < 2:
        raise ValueError(f"batch_size={batch_size!r}: expected an integer of 2 or more")
    return -math.log(batch_size - 1)


def _present(logits: Any, sample_weight: Any) -> tuple[Any, Any]:
    """Takes the columns of weight 0 out of float32 logits; and says which stay, bool (1, n)."""
    logits = ops.cast(logits, "float32")
    if sample_weight is None:
        return logits, None
    present = sample_weight[None, :] > 0
    return ops.where(present, logits, MASKED_LOGIT), present


def _mean_where(chosen: Any, values: Any) -> Any:
    """Mean of each row over its chosen columns; 0 where none is."""
    count = ops.sum(ops.cast(chosen, "float32"), axis=-1)
    return ops.sum(ops.where(chosen, values, 0.0), axis=-1) / ops.maximum(count, 1.0)
