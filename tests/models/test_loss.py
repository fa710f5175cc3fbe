"""The contrastive losses, against figures worked out by hand."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from align_tf import AlignConfig, AlignModel
from align_tf.models.loss import (
    contrastive_rows,
    gather_across_replicas,
    initial_logit_bias,
    num_replicas,
    positive_pairs,
    reduce_directions,
    right_rows,
    sigmoid_rows,
    weighted_mean,
)

# log_softmax of (2, 0): -log(1 + e^-2) = -0.126928 and -log(1 + e^2) = -2.126928
EYE = np.array([[2.0, 0.0], [0.0, 2.0]], "float32")
LOPSIDED = np.array([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, -1.0]], "float32")
FIRST_TWO = np.array([[True, True, False], [True, True, False], [False, False, True]])
WEIGHTS = np.array([1.0, 0.0, 2.0], "float32")


def contrastive_loss(logits, label_smoothing=0.1, positives=None, weights=None):
    """The loss of one direction, as the model puts it together."""
    return weighted_mean(contrastive_rows(logits, positives, weights, label_smoothing), weights)


def sigmoid_loss(logits, positives=None, weights=None):
    return weighted_mean(sigmoid_rows(logits, positives, weights), weights)


def gradient(function, x: np.ndarray) -> np.ndarray:
    """Gradient of a scalar function at x, on either backend."""
    if keras.backend.backend() == "jax":
        import jax

        return np.asarray(jax.grad(function)(x))
    import tensorflow as tf

    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x).numpy()


@pytest.mark.parametrize(
    ("logits", "label_smoothing", "expected"),
    [
        (EYE, 0.0, 0.126928),
        (EYE, 0.1, 0.95 * 0.126928 + 0.05 * 2.126928),
        (EYE, 1.0, (0.126928 + 2.126928) / 2),
        # Rows: log(1 + e^-2 + e^-3), log 3 and log(e^2 + e^3 + 1).
        (LOPSIDED, 0.0, (0.169846 + 1.098612 + 3.349012) / 3),
        (np.zeros((1, 1), "float32"), 0.1, 0.0),
        (np.full((4, 4), 7.0, "float32"), 0.1, 1.386294),  # log 4
    ],
)
def test_contrastive_loss(logits, label_smoothing, expected):
    assert float(contrastive_loss(logits, label_smoothing)) == pytest.approx(expected, abs=2e-6)


def test_a_tenth_of_the_target_is_spread_evenly():
    logits = np.random.default_rng(0).normal(size=(5, 5)).astype("float32")
    target = 0.9 * np.eye(5) + 0.1 / 5
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(target * log_probs).sum(-1).mean()
    assert float(contrastive_loss(logits, 0.1)) == pytest.approx(expected, abs=1e-6)


def test_both_directions_are_averaged_or_as_the_original_does_summed():
    rows, columns = contrastive_loss(LOPSIDED, 0.0), contrastive_loss(LOPSIDED.T, 0.0)
    # Columns: log(1 + e^-3 + e^-2), log(e + 1 + e^2) and log(1 + 1 + e^-1) + 1.
    by_hand = (0.169846 + 1.098612 + 3.349012) / 3, (0.169846 + 2.407606 + 1.861995) / 3
    found = [float(reduce_directions(columns, rows, name)) for name in ("mean", "sum")]
    assert found == pytest.approx([sum(by_hand) / 2, sum(by_hand)], abs=4e-6)


@pytest.mark.parametrize(
    ("positives", "weights", "label_smoothing", "expected"),
    [
        # The first row's target is half and half: log(e^3 + e + 1) - (3 + 1) / 2.
        (FIRST_TWO, None, 0.0, (1.169846 + 1.098612 + 3.349012) / 3),
        # Without the second pair: log(1 + e^-3), and 1 + log(e + 1 / e) twice.
        (None, WEIGHTS, 0.0, (0.048587 + 2 * 2.126928) / 3),
        (FIRST_TWO, WEIGHTS, 0.0, (0.048587 + 2 * 2.126928) / 3),
        # A tenth of the target lies evenly on the two columns that are left.
        (
            None,
            WEIGHTS,
            0.1,
            (0.9 * 0.048587 + 0.1 * 1.548587 + 2 * (0.9 * 2.126928 + 0.1 * 1.126928)) / 3,
        ),
        (None, np.zeros(3, "float32"), 0.1, 0.0),
        (FIRST_TWO, np.zeros(3, "float32"), 0.1, 0.0),
        # Weights count by their ratios, however small.
        (None, 1e-6 * WEIGHTS, 0.0, (0.048587 + 2 * 2.126928) / 3),
    ],
)
def test_contrastive_loss_of_positives_and_weights(positives, weights, label_smoothing, expected):
    loss = contrastive_loss(LOPSIDED, label_smoothing, positives, weights)
    assert float(loss) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("logits", "positives", "weights", "expected"),
    [
        # softplus(-2) = 0.126928 and softplus(0) = log 2
        (EYE, None, None, 0.126928 + 0.693147),
        # softplus of -3, 1, 0; of 0, 0, 0; of 1, 2, 1
        (LOPSIDED, None, None, (2.054996 + 2.079442 + 4.753452) / 3),
        # softplus of -3, -1, 0; the others as before
        (LOPSIDED, FIRST_TWO, None, (1.054996 + 2.079442 + 4.753452) / 3),
        # softplus of -3, 0 and twice of 1, 1
        (LOPSIDED, None, WEIGHTS, (0.741734 + 2 * 2.626524) / 3),
        (LOPSIDED, None, np.zeros(3, "float32"), 0.0),
    ],
)
def test_sigmoid_loss(logits, positives, weights, expected):
    assert float(sigmoid_loss(logits, positives, weights)) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # (softmax - target) / 2, softmax of (2, 0) = (0.880797, 0.119203)
        (lambda x: contrastive_loss(x, 0.0), [[-0.059601, 0.059601], [0.059601, -0.059601]]),
        (lambda x: contrastive_loss(x, 0.1), [[-0.034601, 0.034601], [0.034601, -0.034601]]),
        # Both columns are positives of the first row: target (1/2, 1/2).
        (
            lambda x: contrastive_loss(x, 0.0, np.array([[True, True], [False, True]])),
            [[0.190399, -0.190399], [0.059601, -0.059601]],
        ),
        # (sigmoid - 1) / 2 and sigmoid / 2
        (lambda x: sigmoid_loss(x), [[-0.059601, 0.25], [0.25, -0.059601]]),
        # One pair alone has no negative left.
        (
            lambda x: contrastive_loss(x, 0.1, None, np.array([1.0, 0.0], "float32")),
            np.zeros((2, 2)),
        ),
        (
            lambda x: sigmoid_loss(x, None, np.array([1.0, 0.0], "float32")),
            [[-0.119203, 0.0], [0.0, 0.0]],
        ),
        (lambda x: contrastive_loss(x, 0.1, None, np.zeros(2, "float32")), np.zeros((2, 2))),
        (lambda x: sigmoid_loss(x, None, np.zeros(2, "float32")), np.zeros((2, 2))),
    ],
)
def test_gradients(loss, expected):
    np.testing.assert_allclose(gradient(loss, EYE), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("positives", "weights", "expected"),
    [
        (None, None, 1 / 3),  # a tie goes to the first column
        (FIRST_TWO, None, 2 / 3),
        (None, WEIGHTS, 1 / 3),
        (None, np.zeros(3, "float32"), 0.0),
    ],
)
def test_in_batch_accuracy(positives, weights, expected):
    found = weighted_mean(right_rows(LOPSIDED, positives, weights), weights)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_pairs_that_share_an_image_or_a_text_are_positives():
    image_ids, text_ids = np.array([1, 1, 2, 3]), np.array([4, 5, 6, 5])
    expected = np.eye(4, dtype=bool)
    expected[0, 1] = expected[1, 0] = True
    np.testing.assert_array_equal(positive_pairs(image_ids), expected)
    expected[1, 3] = expected[3, 1] = True
    np.testing.assert_array_equal(positive_pairs(image_ids, text_ids), expected)
    assert positive_pairs() is None
    some = positive_pairs(image_ids, text_ids, rows=np.array([2, 0]))
    np.testing.assert_array_equal(some, np.array(expected)[[2, 0]])


@pytest.mark.parametrize("loss", [lambda *x: contrastive_loss(x[0], 0.1, *x[1:]), sigmoid_loss])
def test_a_pair_of_weight_0_is_as_good_as_not_there(loss):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 6)).astype("float32")
    positives = positive_pairs(np.array([0, 0, 1, 2, 1, 0]))
    weights = np.array([1, 0, 3, 2, 0, 0.5], "float32")
    kept = weights > 0
    expected = loss(logits[kept][:, kept], np.array(positives)[kept][:, kept], weights[kept])
    assert float(loss(logits, positives, weights)) == pytest.approx(float(expected), abs=1e-6)


def test_initial_logit_bias():
    assert initial_logit_bias(2) == 0.0
    assert initial_logit_bias(32768) == pytest.approx(-10.397177)  # SigLIP rounds it to -10
    with pytest.raises(ValueError, match="batch_size=1: expected an integer of 2 or more"):
        initial_logit_bias(1)


def test_the_loss_is_float32_and_finite_for_half_precision_logits():
    loss = contrastive_loss(ops.cast(np.full((3, 3), 60000.0), "float16"))
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    assert float(loss) == pytest.approx(1.098612, abs=1e-6)  # log 3


def test_large_logits_do_not_overflow():
    assert float(contrastive_loss(1000 * EYE, 0.0)) == 0.0
    assert float(contrastive_loss(1000 * (2 - EYE), 0.0)) == pytest.approx(2000.0)


def test_temperature_gradient(tiny_config, pairs):
    """One step of plain SGD moves the temperature by the gradient worked out by hand."""
    config = AlignConfig(
        text_config=dataclasses.replace(
            tiny_config.text_config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
        vision_config=dataclasses.replace(tiny_config.vision_config, drop_connect_rate=0.0),
        projection_dim=8,
        temperature_init_value=0.5,
    )
    model = AlignModel(config)
    model.freeze()
    model.text_projection.trainable = False
    assert [weight.name for weight in model.trainable_weights] == ["temperature"]
    logits = ops.convert_to_numpy(model(pairs).logits_per_text).astype("float64")

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    target = 0.9 * np.eye(4) + 0.1 / 4
    # d loss / d logits, of both directions; d logits / d temperature = -logits / temperature
    by_logits = (softmax(logits) - target + (softmax(logits.T) - target).T) / (2 * 4)
    gradient = (by_logits * -logits / 0.5).sum()
    assert abs(gradient) > 1e-3

    model.compile(optimizer=keras.optimizers.SGD(0.1))
    model.fit(pairs, batch_size=4, epochs=1, verbose=0)
    moved = float(ops.convert_to_numpy(model.temperature)) - 0.5
    assert moved == pytest.approx(-0.1 * gradient, rel=1e-3)


def test_one_device_gathers_nothing():
    embeds = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(gather_across_replicas(embeds)), embeds)
    assert num_replicas() == 1
