"""Contrastive losses of ALIGN, and the gathering of embeddings across replicas."""

from typing import Any

import keras
from keras import ops


def gather_across_replicas(embeds: Any) -> Any:
    """Concatenates the embeddings of all replicas, with gradient.

    Under the JAX backend, and outside a distribution strategy, the batch is already whole.

    Args:
        embeds: (n, d), the embeddings of this replica.

    Returns:
        (n * replicas, d), in the order of the replicas.
    """
    if keras.backend.backend() != "tensorflow":
        return embeds
    import tensorflow as tf

    if tf.distribute.in_cross_replica_context():
        return embeds
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return embeds
    return context.all_gather(embeds, axis=0)


def num_replicas() -> int:
    """Returns how many replicas take this step together."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def contrastive_loss(logits: Any, label_smoothing: float = 0.1) -> Any:
    """Softmax cross-entropy of each row against its own column.

    Args:
        logits: (n, n), similarities divided by the temperature; the pairs on the diagonal.
        label_smoothing: share of the target that is spread evenly over all columns.

    Returns:
        Scalar, the mean over rows (ALIGN, arXiv 2102.05918, section 4.2).
    """
    # The target is (1 - s) on the diagonal plus s / n everywhere, so the cross-entropy is a
    # weighted sum of the two means below; no (n, n) target is made.
    log_probs = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    matched = ops.mean(ops.diagonal(log_probs))
    return -(1.0 - label_smoothing) * matched - label_smoothing * ops.mean(log_probs)


def align_loss(logits_per_text: Any, label_smoothing: float = 0.1) -> Any:
    """Mean of the text-to-image and the image-to-text loss.

    Args:
        logits_per_text: (n, n), text by image.
        label_smoothing: see `contrastive_loss`.

    Returns:
        Scalar, as `align_loss` of Hugging Face's modeling_align.py.
    """
    text_to_image = contrastive_loss(logits_per_text, label_smoothing)
    image_to_text = contrastive_loss(ops.transpose(logits_per_text), label_smoothing)
    return (text_to_image + image_to_text) / 2.0
