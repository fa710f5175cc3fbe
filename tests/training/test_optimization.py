"""Optimizers and schedule: values worked out by hand, rates by tower and depth, saving."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from align_tf import AlignModel
from align_tf.training import make_optimizer, optimization
from align_tf.training.optimization import AdamW, Lamb, WarmupDecay, learning_rates

WEIGHTS = [1.0, -2.0, 2.0]
GRADIENTS = ([0.1, 0.2, -0.3], [0.3, 0.1, 0.1])
# In float32, 1 - 0.999 is off by 5e-5 of itself; its root and the rate of 0.1 make 2.5e-6 of it.
ATOL = 1e-5


def run(optimizer, *, rates=None, name="kernel"):
    """Takes two steps on WEIGHTS and returns the weights after each."""
    variable = keras.Variable(np.array(WEIGHTS, "float32"), name=name)
    optimizer.rates = rates or {}
    optimizer.build([variable])
    steps = []
    for gradient in GRADIENTS:
        optimizer.apply([ops.convert_to_tensor(np.array(gradient, "float32"))], [variable])
        steps.append(ops.convert_to_numpy(variable).copy())
    return steps


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("kind", ["lamb", "adamw"])
def test_the_norm_of_the_gradients_is_kept(kind, clip_norm, tiny_config):
    optimizer = make_optimizer(
        AlignModel(tiny_config),
        optimizer=kind,
        total_steps=5,
        clip_norm=clip_norm,
        watch_gradients=True,
    )
    again = type(optimizer).from_config(optimizer.get_config())
    for made in (optimizer, again):
        run(made)
        found = float(ops.convert_to_numpy(made.gradient_norm))
        assert found == pytest.approx(0.11**0.5, rel=1e-5)  # of the second, before it is clipped


def schedule(steps, **settings):
    made = WarmupDecay(**settings)
    return [float(made(step)) for step in steps]


def test_warmup_then_linear_decay_to_zero():
    values = schedule([0, 1, 2, 4, 5, 6, 9], learning_rate=0.8, warmup_steps=2, total_steps=6)
    np.testing.assert_allclose(values, [0.0, 0.4, 0.8, 0.4, 0.2, 0.0, 0.0], atol=1e-7)


def test_warmup_then_cosine_decay_to_zero():
    settings = {"learning_rate": 0.8, "warmup_steps": 2, "total_steps": 6, "decay": "cosine"}
    # 0.5 * (1 + cos(pi / 4)) = 0.8535534 a quarter of the way down.
    values = schedule([1, 2, 3, 4, 6], **settings)
    np.testing.assert_allclose(values, [0.4, 0.8, 0.6828427, 0.4, 0.0], atol=1e-6)


def test_no_warmup_starts_at_the_top():
    constant = {"learning_rate": 0.5, "warmup_steps": 0, "total_steps": 4, "decay": "constant"}
    assert schedule([0, 1, 4, 9], **constant) == [0.5] * 4
    assert schedule([0, 1], learning_rate=0.5, warmup_steps=0, total_steps=4) == [0.5, 0.375]


def test_schedule_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"warmup_steps=6: .* fewer than the 6 steps"):
        WarmupDecay(0.1, 6, 6)
    with pytest.raises(ValueError, match=r"schedule='step': expected one of linear, cosine"):
        WarmupDecay(0.1, 0, 6, "step")


def test_adamw_by_hand():
    # Decay first: w = w - 0.1 * 0.01 * w = (0.999, -1.998, 1.998). Then step 1: m/(1-b1) = g and
    # v/(1-b2) = g^2, so each weight moves by the rate against the sign of its gradient.
    first, second = run(AdamW(0.1, weight_decay=0.01))
    np.testing.assert_allclose(first, [0.899, -2.098, 2.098], atol=ATOL)
    # Step 2, first weight: decayed 0.898101; m = 0.9*0.01 + 0.1*0.3 = 0.039, / 0.19 = 0.2052632;
    # v = 0.999*1e-5 + 1e-3*0.09 = 9.999e-5, / 0.001999 = 0.0500200, root 0.2236515;
    # 0.898101 - 0.1 * 0.2052632 / 0.2236515 = 0.8063228.
    # second: -2.095902 - 0.1 * (0.028 / 0.19) / sqrt(4.996e-5 / 0.001999) = -2.1891186
    # third: 2.095902 + 0.1 * (0.017 / 0.19) / sqrt(9.991e-5 / 0.001999) = 2.1359242
    np.testing.assert_allclose(second, [0.8063228, -2.1891186, 2.1359242], atol=ATOL)


def test_lamb_by_hand():
    # |w| = 3 and, in step 1, each element of the update is 1 or -1, so |update| = sqrt(3) and the
    # trust ratio is sqrt(3) = 1.7320508: every weight moves by 0.17320508.
    first, second = run(Lamb(0.1))
    np.testing.assert_allclose(first, [0.8267949, -2.1732051, 2.1732051], atol=ATOL)
    # Step 2: update (0.2052632 / 0.2236515, 0.1473684 / 0.1580902, -0.0894737 / 0.2235619) =
    # (0.9177813, 0.9321791, -0.4002188), its length 1.3679963; |w| = 3.1826577, the ratio
    # 2.3265105.
    np.testing.assert_allclose(second, [0.6132722, -2.3900776, 2.2663163], atol=ATOL)


def test_lamb_decays_the_weights_as_keras_does():
    np.testing.assert_allclose(
        run(Lamb(0.1, weight_decay=0.01))[0],
        # w decayed to 0.999 w, |w| = 2.997, the ratio 2.997 / sqrt(3) = 1.7303187
        np.array(WEIGHTS) * 0.999 - 0.17303187 * np.sign(GRADIENTS[0]),
        atol=ATOL,
    )


def test_lamb_moves_a_weight_of_zero_and_leaves_one_without_gradient():
    weights = [keras.Variable(np.full(3, value, "float32")) for value in (0.0, 2.0)]
    optimizer = Lamb(0.1)
    optimizer.build(weights)
    optimizer.apply([ops.ones(3), ops.zeros(3)], weights)
    # Neither has a ratio of lengths; it is 1. The first moves by the rate.
    np.testing.assert_allclose(ops.convert_to_numpy(weights[0]), [-0.1] * 3, atol=ATOL)
    np.testing.assert_array_equal(ops.convert_to_numpy(weights[1]), [2.0] * 3)


@pytest.mark.parametrize(("ours", "keras_own"), [(Lamb, "Lamb"), (AdamW, "AdamW")])
def test_a_rate_of_one_is_keras_own_step(ours, keras_own):
    settings = {"learning_rate": 0.05, "weight_decay": 0.02}
    expected = run(getattr(keras.optimizers, keras_own)(**settings))
    np.testing.assert_array_equal(run(ours(**settings)), expected)


@pytest.mark.parametrize("joined", [0, 8, 100])
def test_weights_take_lambs_step_joined_as_alone(joined, monkeypatch):
    monkeypatch.setattr(optimization, "JOINED", joined)
    shapes = {
        "kernel": (2, 2),
        "gamma": (3,),
        "temperature": (),
        "embeddings": (4, 3),
        "bias": (1,),
    }
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=shape) for shape in shapes.values()]
    gradients = [rng.normal(size=shape) for shape in shapes.values()] * 2
    gradients[1] = np.zeros(3)  # of which no ratio is to be had

    def stepped(optimizer, dtype):
        weights = [
            keras.Variable(start, dtype=dtype, name=name)
            for start, name in zip(starts, shapes, strict=True)
        ]
        optimizer.build(weights)
        optimizer.exclude_from_weight_decay(var_names=["gamma", "temperature", "bias"])
        for step in (gradients[:5], gradients[5:]):
            optimizer.apply([ops.cast(gradient, dtype) for gradient in step], weights)
        return [ops.convert_to_numpy(weight) for weight in weights]

    for dtype, atol in (("float32", 1e-7), ("float64", 1e-9)):
        settings = {"learning_rate": 0.05, "weight_decay": 0.02}
        found = stepped(Lamb(**settings), dtype)
        expected = stepped(keras.optimizers.Lamb(**settings), dtype)
        for name, one, other in zip(shapes, found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=atol, err_msg=name)


@pytest.mark.parametrize("optimizer_class", [Lamb, AdamW])
def test_a_rate_of_half_is_half_the_learning_rate_and_decay(optimizer_class):
    halved = run(optimizer_class(0.1, weight_decay=0.02), rates={"kernel": 0.5})
    np.testing.assert_array_equal(halved, run(optimizer_class(0.05, weight_decay=0.02)))


@pytest.mark.parametrize("name", ["gamma", "beta", "bias", "temperature", "logit_bias"])
def test_norms_biases_and_temperature_do_not_decay(name):
    plain = run(AdamW(0.1, weight_decay=0.0), name=name)
    np.testing.assert_array_equal(run(AdamW(0.1, weight_decay=0.5), name=name), plain)
    assert np.abs(run(AdamW(0.1, weight_decay=0.5))[0] - plain[0]).max() > 0.04


def test_rates_by_tower_and_depth(tiny_config):
    model = AlignModel(tiny_config)
    rates = learning_rates(model, text_rate=0.1, vision_rate=1.0, layer_decay=0.5)
    # Two layers over the embeddings, three blocks over the stem, then the projections.
    assert rates["text_model/embeddings/word_embeddings/embeddings"] == pytest.approx(0.0125)
    assert rates["text_model/layer_0/attention/query/kernel"] == pytest.approx(0.025)
    assert rates["text_model/layer_1/output/bias"] == pytest.approx(0.05)
    assert rates["align/text_projection/kernel"] == pytest.approx(0.1)
    assert rates["vision_model/stem_conv/kernel"] == 0.0625
    assert rates["vision_model/block_0/depthwise_conv/kernel"] == 0.125
    assert rates["vision_model/block_2/project_bn/gamma"] == 0.5
    assert "align/temperature" not in rates
    assert learning_rates(model, text_rate=1.0, vision_rate=1.0, layer_decay=1.0) == {}


def fitted(config, batches, *callbacks, dtype="float32", run_eagerly=False, **settings):
    """Trains a new model, a step for each batch."""
    keras.utils.set_random_seed(0)
    model = AlignModel(config, dtype=dtype)
    settings = {"learning_rate": 0.01, "total_steps": 8, "schedule": "constant", **settings}
    model.compile(optimizer=make_optimizer(model, **settings), run_eagerly=run_eagerly)
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    dataset = tf.data.Dataset.from_tensor_slices(stacked)
    model.fit(dataset, verbose=0, shuffle=False, callbacks=list(callbacks))
    return model


def weights_of(model):
    return {w.path: ops.convert_to_numpy(w) for w in model.weights}


class Steps(keras.callbacks.Callback):
    """Keeps what each step leaves: weights, and the optimizer's count, rate and scale."""

    def __init__(self):
        super().__init__()
        self.weights, self.counts, self.rates, self.scales = [], [], [], []

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer  # on JAX, reading the model brings it up to date
        trained = self.model.trainable_variables
        self.weights.append({w.path: np.array(ops.convert_to_numpy(w)) for w in trained})
        self.counts.append(int(optimizer.iterations))
        self.rates.append(float(optimizer.learning_rate))
        self.scales.append(float(optimizer.dynamic_scale))


@pytest.mark.slow
def test_fit_moves_each_tower_by_its_rate(small_config, pairs):
    """Under LAMB a rate of 1e-6 hardly moves the text tower."""
    keras.utils.set_random_seed(0)
    start = weights_of(AlignModel(small_config))
    end = weights_of(fitted(small_config, [pairs] * 2, text_rate=1e-6))

    def moved(path):
        return np.abs(end[path] - start[path]).max()

    assert moved("vision_model/stem_conv/kernel") > 1e-3
    assert 0 < moved("text_model/layer_0/attention/query/kernel") < 1e-6


@pytest.mark.parametrize("optimizer_class", [Lamb, AdamW])
def test_fit_takes_a_rate_that_is_no_schedule(optimizer_class):
    """The steps of `fit`, compiled, are those of `run`."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    kernel = model.layers[0].kernel
    kernel.assign(np.array(WEIGHTS)[:, None])
    # The loss is what the layer gives, so that its gradient is what the layer takes.
    jit = keras.backend.backend() == "jax"
    model.compile(optimizer_class(0.1), loss=lambda _, given: given, jit_compile=jit)
    model.fit(np.array(GRADIENTS), np.zeros((2, 1)), batch_size=1, shuffle=False, verbose=0)
    expected = run(optimizer_class(0.1))[1]
    np.testing.assert_allclose(ops.convert_to_numpy(kernel)[:, 0], expected, atol=ATOL)


@pytest.mark.slow
def test_saved_model_goes_on_training_alike(small_config, pairs, tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = dataclasses.replace(
        small_config,
        text_config=dataclasses.replace(small_config.text_config, **still),
        vision_config=dataclasses.replace(small_config.vision_config, drop_connect_rate=0.0),
    )
    settings = {"weight_decay": 0.1, "text_rate": 0.5, "layer_decay": 0.5}
    # Eagerly, as two traces take longer than these few steps.
    model = fitted(config, [pairs] * 2, optimizer="adamw", run_eagerly=True, **settings)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.rates["text_model/layer_0/output/bias"] == 0.25
    before = weights_of(model)
    for one in (model, loaded):
        one.fit(pairs, batch_size=4, verbose=0, shuffle=False)
    expected = weights_of(model)
    for path, value in weights_of(loaded).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    assert any(np.any(value != before[path]) for path, value in expected.items())


@pytest.mark.slow
def test_mixed_float16_leaves_out_a_step_that_is_not_finite(small_config, pairs):
    """Neither count, rate nor average know of the second of four steps."""
    good, bad = ({**pairs, "sample_weight": np.full(4, w, "float32")} for w in (1.0, np.inf))
    settings = {"clip_norm": 1.0, "vision_rate": 0.5, "schedule": "linear", "ema_momentum": 0.75}
    steps = Steps()
    model = fitted(small_config, [good, bad, good, good], steps, dtype="mixed_float16", **settings)
    assert steps.counts == [1, 1, 2, 3]
    assert steps.rates == pytest.approx([0.00875, 0.00875, 0.0075, 0.00625])  # of 0.01 and 8 steps
    assert steps.scales == [32768.0, 16384.0, 16384.0, 16384.0]
    for variable in model.trainable_variables:
        path = variable.path
        first, skipped, second, third = (weights[path] for weights in steps.weights)
        np.testing.assert_array_equal(skipped, first, err_msg=path)
        # The average begins as the first step's weights; each further step is a quarter of it.
        expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
        found = ops.convert_to_numpy(variable)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=path)
    assert all(np.isfinite(value).all() for value in weights_of(model).values())
    for path in ("vision_model/stem_conv/kernel", "text_model/layer_0/attention/query/kernel"):
        kernels = [weights[path] for weights in steps.weights]
        moved = [np.abs(after - before).max() for before, after in itertools.pairwise(kernels)]
        assert min(moved[1:]) > 1e-4


def test_make_optimizer_says_what_is_wrong(tiny_config):
    model = AlignModel(tiny_config)
    with pytest.raises(ValueError, match=r"optimizer='sgd': expected one of lamb, adamw"):
        make_optimizer(model, optimizer="sgd", total_steps=3)
    with pytest.raises(ValueError, match=r"layer_decay=0: expected a positive number"):
        make_optimizer(model, layer_decay=0, total_steps=3)
