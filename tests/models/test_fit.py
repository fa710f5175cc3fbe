"""Training through Keras's own fit, evaluate and predict, on either backend."""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable

import keras
import numpy as np
import pytest
import safetensors.numpy
from keras import ops

from align_tf import AlignConfig, AlignModel

LOGS = {"loss", "loss_i2t", "loss_t2i", "accuracy_i2t", "accuracy_t2i", "temperature"}


@pytest.fixture(scope="module")
def steady_config(steady_config) -> AlignConfig:
    """With a temperature that a step moves."""
    return dataclasses.replace(steady_config, temperature_init_value=0.5)


def compile_once(config: AlignConfig, **options) -> Callable[[], AlignModel]:
    """Returns what gives a compiled model back as it was made: its step is traced once."""
    keras.utils.set_random_seed(0)
    model = AlignModel(config)
    model.compile(optimizer=keras.optimizers.SGD(0.3), **options)
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    start = [(variable, ops.convert_to_numpy(variable)) for variable in variables]

    def restart() -> AlignModel:
        for variable, value in start:
            variable.assign(value)
        return model

    return restart


@pytest.fixture(scope="module")
def restart(steady_config) -> Callable[[], AlignModel]:
    return compile_once(steady_config)


@pytest.fixture(scope="module")
def restart_two_steps(steady_config) -> Callable[[], AlignModel]:
    return compile_once(steady_config, steps_per_execution=2)


@pytest.fixture
def model(restart) -> AlignModel:
    """Compiled with SGD(0.3); it may be trained, and not be changed in another way."""
    return restart()


@pytest.fixture
def still(model) -> AlignModel:
    """The model, at a rate of 0."""
    model.optimizer.learning_rate = 0.0
    return model


@pytest.fixture
def padded(pairs) -> dict[str, np.ndarray]:
    """The pairs, and two of weight 0."""
    padded = {key: np.concatenate([value, value[:2][::-1]]) for key, value in pairs.items()}
    padded["pixel_values"][4:] = 0
    padded["sample_weight"] = np.array([1, 1, 1, 1, 0, 0], "float32")
    return padded


def twin(model: AlignModel, **options) -> AlignModel:
    again = AlignModel(model.config, **options)
    again.set_weights(model.get_weights())
    return again


def rows(pairs: dict, chosen) -> dict:
    return {key: value[chosen] for key, value in pairs.items()}


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(np.abs(a - b).max() for a, b in zip(one, other, strict=True))


def train(model: AlignModel, pairs: dict, *, batch_size: int = 4, epochs: int = 3, **options):
    """Three epochs; returns the logs, and the weights after each epoch."""
    weights = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights())
    )
    options = {"shuffle": False, "verbose": 0, "callbacks": [record], **options}
    history = model.fit(pairs, batch_size=batch_size, epochs=epochs, **options).history
    return history, weights


@pytest.fixture(scope="module")
def kept() -> dict:
    return {}


@pytest.fixture
def expected(restart, pairs, kept) -> tuple[dict, list]:
    """The logs and weights of the plain training of `pairs`."""
    if "plain" not in kept:
        kept["plain"] = train(restart(), pairs)
        restart()
    return kept["plain"]


class Counted(AlignModel):
    """Counts how often its step is traced."""

    traced = 0

    def train_step(self, *state_and_data):
        Counted.traced += 1
        return super().train_step(*state_and_data)


@pytest.fixture
def of_one_step(steady_config, pairs, kept) -> tuple[AlignModel, dict, bool]:
    """A model after Adam's first step; what the optimizer holds, and if it did before `fit`."""
    if "adam" not in kept:
        model = Counted(steady_config)
        model.compile(optimizer=keras.optimizers.Adam(1e-3, beta_1=0.9, beta_2=0.999))
        model.evaluate(pairs, verbose=0)
        built = model.optimizer.built
        model.fit(pairs, batch_size=4, verbose=0)
        held = {v.path: np.array(ops.convert_to_numpy(v)) for v in model.optimizer.variables}
        kept["adam"] = model, held, built
    return kept["adam"]


# --- losses --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fit", "evaluate", "predict"])
def test_a_model_outlives_data_that_break_off(call, model, pairs):
    """On JAX a model's weights are on their way from step to step meanwhile."""

    def batches():
        yield (pairs,)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        getattr(model, call)(batches(), verbose=0)
    assert np.isfinite(model.predict(pairs, verbose=0)["text_embeds"]).all()
    model.fit(pairs, verbose=0)


def test_logs_of_fit_and_evaluate(model, pairs):
    start = float(model(pairs, return_loss=True).loss)
    history, _ = train(model, pairs, epochs=2)
    assert set(history) == LOGS
    assert history["loss"][0] == pytest.approx(start, abs=1e-5)
    both = (np.array(history["loss_i2t"]) + history["loss_t2i"]) / 2
    np.testing.assert_allclose(history["loss"], both, atol=1e-5)
    assert history["temperature"][0] == 0.5 != history["temperature"][1]

    logits = ops.convert_to_numpy(model(pairs).logits_per_image)
    found = model.evaluate(pairs, batch_size=4, verbose=0, return_dict=True)
    assert set(found) == LOGS
    assert found["accuracy_i2t"] == (logits.argmax(1) == range(4)).mean()
    assert found["accuracy_t2i"] == (logits.argmax(0) == range(4)).mean()


def test_padding_of_weight_0_changes_nothing(model, padded, expected):
    found, weights = train(model, padded, batch_size=6)
    for key in LOGS:
        np.testing.assert_allclose(found[key], expected[0][key], atol=1e-5, err_msg=key)
    assert apart(weights[-1], expected[1][-1]) < 1e-5


def test_a_batch_of_weight_0_trains_nothing_and_counts_for_no_metric(model, pairs, padded):
    before = model.get_weights()
    absent = {**padded, "sample_weight": np.zeros(6, "float32")}
    assert model.train_on_batch(absent, return_dict=True)["loss"] == 0.0
    assert apart(model.get_weights(), before) == 0.0
    both = {key: np.concatenate([value, value]) for key, value in padded.items()}
    both["sample_weight"][6:] = 0
    one = model.evaluate(pairs, batch_size=4, verbose=0, return_dict=True)
    two = model.evaluate(both, batch_size=6, verbose=0, return_dict=True)
    for key in LOGS:
        assert two[key] == pytest.approx(one[key], abs=1e-6), key


def test_a_batch_by_itself_is_taken_as_fit_takes_it(model, pairs):
    weight = np.array([1, 0, 1, 1], "float32")
    beside = model.test_on_batch(pairs, sample_weight=weight, return_dict=True)
    assert beside == model.test_on_batch({**pairs, "sample_weight": weight}, return_dict=True)
    assert beside != model.test_on_batch(pairs, return_dict=True)
    assert model.predict_on_batch(pairs)["text_embeds"].shape == (4, 8)
    with pytest.raises(ValueError, match="class_weight: expected None; pairs have no class"):
        model.train_on_batch(pairs, class_weight={0: 2.0})
    for call in (model.train_on_batch, model.test_on_batch, model.predict_on_batch):
        with pytest.raises(ValueError, match="a batch of tuple: expected a dict of pixel_values"):
            call((pairs, None))
        with pytest.raises(ValueError, match="rows of pairs, pixel_values of 2, input_ids of 4"):
            call({**pairs, "pixel_values": pairs["pixel_values"][:2]})


@pytest.mark.slow
def test_loss_is_the_mean_over_pairs_as_those_of_the_directions_are(still, pairs):
    """Five pairs in batches of four: of the last, alone in its batch, the loss is 0."""
    filler = rows(pairs, [0, 1, 2, 3, 0, 0, 0, 0])
    filler["sample_weight"] = np.array([1, 1, 1, 1, 1, 0, 0, 0], "float32")
    of_four = float(still(pairs, return_loss=True).loss)
    assert of_four > 0.5
    logs = still.evaluate(filler, batch_size=4, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(0.8 * of_four, abs=1e-5)
    assert logs["loss"] == pytest.approx((logs["loss_i2t"] + logs["loss_t2i"]) / 2, abs=1e-6)
    in_parts = twin(still)
    in_parts.compile(optimizer=keras.optimizers.SGD(0.0), accumulation=2)
    for model in (still, in_parts):
        history, _ = train(model, filler, epochs=1)
        assert history["loss"] == [pytest.approx(0.8 * of_four, abs=1e-5)]
        assert [metric.name for metric in model.metrics].count("loss") == 1


@pytest.mark.slow
def test_an_epoch_from_which_nothing_can_be_learned_is_an_error(model, pairs):
    absent = {**pairs, "sample_weight": np.zeros(4, "float32")}
    alone = {**pairs, "sample_weight": np.array([1, 0, 0, 1], "float32")}  # in batches of 2
    usable = "no usable pair, .* every row has a sample_weight of 0"
    one = "one pair in each batch, .* expected a batch_size of 2 or more"
    fit = functools.partial(model.fit, shuffle=False, verbose=0)
    for data, size, message in ((absent, 4, usable), (alone, 2, one), (pairs, 1, one)):
        with pytest.raises(ValueError, match=f"the data: {message}"):
            model.evaluate(data, batch_size=size, verbose=0)
        with pytest.raises(ValueError, match=f"epoch 1: {message}"):
            fit(data, batch_size=size)
        with pytest.raises(ValueError, match=f"epoch 1: {message}"):  # not the validation's
            fit(data, batch_size=size, validation_data=pairs)
        with pytest.raises(ValueError, match=f"the data: {message}"):
            fit(pairs, batch_size=4, validation_data=data, validation_batch_size=size)
    fit(pairs, batch_size=3)  # a last batch of one


@pytest.mark.slow
def test_fit_counts_its_batches(model, restart_two_steps, pairs):
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(model.trained_batches)
    )
    before = model.trained_batches
    listed = keras.callbacks.CallbackList([callback], add_history=True, model=model)
    for callbacks in (callback, [callback], listed):
        model.fit(pairs, batch_size=2, epochs=2, callbacks=callbacks, verbose=0)
    model.fit(pairs, batch_size=2, verbose=0)
    assert [count - before for count in seen] == [2, 4, 6, 8, 10, 12]
    assert model.trained_batches - before == 14
    model = restart_two_steps()
    before = model.trained_batches
    model.fit(rows(pairs, [0, 1, 2, 3, 0, 1]), batch_size=2, epochs=2, verbose=0)
    assert model.trained_batches - before == 6
    import tensorflow as tf

    data = tf.data.Dataset.from_tensors(rows(pairs, [0, 1])).repeat(3).filter(lambda x: True)
    model.fit(data, epochs=2, verbose=0)  # of a length that nobody knows
    assert model.trained_batches - before == 12


def test_keras_sample_weight_multiplies_the_one_in_the_batch(restart, padded):
    weights = np.array([1.0, 2.0, 0.0, 3.0, 1.0, 1.0], "float32")
    _, expected = train(restart(), {**padded, "sample_weight": weights}, batch_size=6)
    halves = np.array([2.0, 2.0, 5.0, 1.0, 0.5, 1.0], "float32")
    divided = {**padded, "sample_weight": weights / halves}
    _, found = train(restart(), divided, batch_size=6, sample_weight=halves)
    assert apart(found[-1], expected[-1]) < 1e-6
    _, other = train(restart(), divided, batch_size=6)
    assert apart(other[-1], expected[-1]) > 1e-3


@pytest.mark.slow
def test_weights_beside_a_validation_and_in_tuples_count(still, padded):
    """Keras drops the weight of (x, None, weight) in arrays."""
    import tensorflow as tf

    weight = padded["sample_weight"]
    x = {key: value for key, value in padded.items() if key != "sample_weight"}
    expected = still.evaluate(x, batch_size=6, sample_weight=weight, verbose=0)[0]
    data = tf.data.Dataset.from_tensors((x, None, weight))
    assert still.evaluate(data, verbose=0)[0] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_array_equal(still.predict(data, verbose=0)["sample_weight"], weight)
    for validation in ((x, None, weight), [x, None, weight], padded, collections.UserDict(padded)):
        logs = still.fit(padded, batch_size=6, validation_data=validation, verbose=0).history
        assert logs["val_loss"] == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("weight", [[1, 1], [1, -1, 1, 1], [1, np.nan, 1, 1], np.ones((4, 2))])
def test_weights_that_are_none_are_refused(weight, model, pairs):
    with pytest.raises(ValueError, match=r"sample_weight of shape .*: expected 4 finite numbers"):
        model.fit(pairs, sample_weight=np.array(weight, "float32"), verbose=0)
    with pytest.raises(ValueError, match=r"sample_weight of shape .*: expected 4 finite numbers"):
        model.evaluate({**pairs, "sample_weight": np.array(weight, "float32")}, verbose=0)


def test_ids_make_positives(model, pairs):
    plain = float(model(pairs, return_loss=True).loss)
    ids = {**pairs, "image_ids": np.array([7, 8, 9, 7]), "text_ids": np.array([1, 2, 3, 1])}
    logits = ops.convert_to_numpy(model(pairs).logits_per_image).astype("float64")
    target = np.eye(4) + np.eye(4)[[3, 1, 2, 0]]
    target = 0.9 * target / target.sum(-1, keepdims=True) + 0.1 / 4

    def cross_entropy(logits):
        return -(target * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1).mean()

    expected = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    assert float(model(ids, return_loss=True).loss) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - plain) > 1e-3
    found = model.evaluate(ids, batch_size=4, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(expected, abs=1e-5)


def test_sigmoid_loss_has_a_bias_that_is_saved(model, pairs, tmp_path):
    model = twin(model)
    assert not model.has_logit_bias
    plain = ops.convert_to_numpy(model(pairs).logits_per_image)
    model.use_sigmoid_loss(batch_size=4)
    assert float(model.logit_bias) == pytest.approx(-np.log(3))
    logits = ops.convert_to_numpy(model(pairs).logits_per_image)
    np.testing.assert_allclose(logits, plain - np.log(3), atol=1e-6)
    signs = 2 * np.eye(4) - 1
    expected = np.log1p(np.exp(-signs * logits)).sum() / 4  # 1 / n of the sum over all pairs
    model.compile(optimizer=keras.optimizers.SGD(0.3))
    history, _ = train(model, pairs)
    assert set(history) == LOGS
    assert history["loss"][0] == pytest.approx(expected, abs=1e-5)
    assert float(model.logit_bias) != pytest.approx(-np.log(3), abs=1e-4)

    model.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert tensors["logit_bias"] == float(model.logit_bias)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["logit_bias_init_value"] == pytest.approx(-np.log(3))
    model.save(tmp_path / "model.keras")
    for again in (
        AlignModel.from_pretrained(tmp_path),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        assert float(again.logit_bias) == float(model.logit_bias)
        found = float(again(pairs, return_loss=True).loss)
        assert found == pytest.approx(float(model(pairs, return_loss=True).loss), abs=1e-6)
    again.use_sigmoid_loss(batch_size=2)  # starts the bias anew
    assert float(again.logit_bias) == 0.0


def test_the_temperature_stays_within_its_bounds(steady_config, pairs):
    model = AlignModel(steady_config, temperature_bounds=(0.4, 0.55))
    optimizer = keras.optimizers.SGD(1.0)
    for gradient, temperature in ((0.05, 0.45), (1.0, 0.4), (-0.1, 0.5), (-1.0, 0.55)):
        optimizer.apply([ops.convert_to_tensor(gradient)], [model.temperature])
        assert float(model.temperature) == pytest.approx(temperature)
    model.freeze()  # the projection and the temperature train
    model.compile(optimizer=keras.optimizers.SGD(1e3))
    model.fit(pairs, batch_size=4, verbose=0)
    assert float(model.temperature) in (pytest.approx(0.4), pytest.approx(0.55))
    for bounds in ((0.0, 1.0), (0.5, 0.1)):
        with pytest.raises(ValueError, match=r"temperature_bounds=.*: expected two positive"):
            AlignModel(steady_config, temperature_bounds=bounds)


# --- Keras's own ---------------------------------------------------------------------------


def test_steps_per_execution(model, restart_two_steps, pairs):
    two = {key: np.concatenate([value, value[::-1]]) for key, value in pairs.items()}
    two["pixel_values"][4:] = np.random.default_rng(1).random((4, 16, 16, 3))
    logs, weights = train(model, two, batch_size=2)
    found_logs, found = train(restart_two_steps(), two, batch_size=2)
    assert apart(found[-1], weights[-1]) < 1e-6
    for key in LOGS:
        np.testing.assert_allclose(found_logs[key], logs[key], atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_jit_compile(model, pairs, expected):
    assert not model.jit_compile or keras.backend.backend() == "jax"
    compiled = twin(model)
    compiled.compile(optimizer=keras.optimizers.SGD(0.3), jit_compile=True)
    _, found = train(compiled, pairs)
    assert apart(found[-1], expected[1][-1]) < 1e-5


def test_callbacks_and_validation(model, pairs, tmp_path):
    history = model.fit(
        pairs,
        batch_size=3,  # a ragged last batch
        epochs=5,
        validation_data=pairs,
        validation_batch_size=3,
        verbose=0,
        callbacks=[
            keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "val_loss"),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 1)
            ),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        ],
    ).history
    assert set(history) == LOGS | {f"val_{key}" for key in LOGS}
    assert len(history["loss"]) == 2
    assert np.isfinite(list(history.values())).all()
    assert "accuracy_i2t" in (tmp_path / "log.csv").read_text()
    again = keras.saving.load_model(tmp_path / "best.keras")
    assert set(again.evaluate(pairs, verbose=0, return_dict=True)) == LOGS


def test_a_token_that_occurs_again_is_summed_before_it_is_squared(of_one_step):
    """After one step Adam's moments are (1 - beta_1) g and (1 - beta_2) g^2, for each weight."""
    moments = of_one_step[1]
    names = [name for name in moments if name.endswith("embeddings_momentum")]
    assert len(names) == 3
    for name in names:
        gradient = moments[name] / 0.1
        assert np.abs(gradient).max() > 1e-5
        second = moments[name.replace("momentum", "velocity")] / 0.001
        np.testing.assert_allclose(second, gradient**2, rtol=1e-3, atol=1e-10)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's variables")
def test_a_step_is_traced_once(of_one_step, pairs):
    """Variables that an optimizer makes within the step would have TensorFlow trace it again."""
    model, _, built = of_one_step
    assert not built  # by an evaluation: it would take the memory of a training
    model.fit(pairs, batch_size=4, epochs=2, verbose=0)
    assert model.traced == 1


def test_clipping_and_average_of_weights(model, pairs):
    """Three steps of length 0.1; what fit leaves is the average of the weights after each."""
    model = twin(model)
    start = model.get_weights()
    optimizer = keras.optimizers.SGD(
        1.0, global_clipnorm=0.1, use_ema=True, ema_momentum=0.25, ema_overwrite_frequency=None
    )
    model.compile(optimizer=optimizer)
    _, weights = train(model, pairs)
    for before, after in itertools.pairwise([start, *weights]):
        norm = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(after, before, strict=True)))
        assert norm == pytest.approx(0.1, rel=1e-3)
    average = [0.0625 * a + 0.1875 * b + 0.75 * c for a, b, c in zip(*weights, strict=True)]
    assert apart(model.get_weights(), average) < 1e-6
    for other in weights:
        assert apart(model.get_weights(), other) > 1e-3


def test_mixed_bfloat16(model, pairs, expected):
    mixed = twin(model, dtype="mixed_bfloat16")
    mixed.compile(optimizer=keras.optimizers.SGD(0.3))
    found, _ = train(mixed, pairs)
    np.testing.assert_allclose(found["loss"], expected[0]["loss"], atol=0.05)
    assert {weight.dtype for weight in mixed.weights} == {"float32"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_a_model_all_of_a_small_dtype_trains_its_batch_norm(dtype, steady_config, pairs, kept):
    def moving_variance(dtype):
        keras.utils.set_random_seed(0)
        trained = twin(AlignModel(steady_config), dtype=dtype)
        trained.unfreeze_batch_norm()
        trained.compile(optimizer=keras.optimizers.SGD(0.1))
        trained.fit(pairs, batch_size=4, verbose=0)
        return trained.vision_model.stem_bn.moving_variance

    if "variance" not in kept:
        kept["variance"] = ops.convert_to_numpy(moving_variance("float32"))
    expected, moving = kept["variance"], moving_variance(dtype)
    assert moving.dtype == dtype
    assert np.abs(expected - 1).max() > 5e-3
    found = ops.convert_to_numpy(ops.cast(moving, "float32"))
    np.testing.assert_allclose(found, expected, atol=1e-2)  # bfloat16 has 256 steps from 1 to 2


@pytest.mark.slow
def test_predict_joins_the_embeddings_of_batches(restart, restart_two_steps, pairs):
    many = rows(pairs, [0, 1, 2, 3, 0])
    for model in (restart(), restart_two_steps()):
        expected = model(many)
        found = model.predict(many, batch_size=2, verbose=0)
        assert list(found) == ["image_embeds", "text_embeds"]
        for key, array in found.items():
            np.testing.assert_allclose(array, ops.convert_to_numpy(expected[key]), atol=1e-6)
        weight = np.array([1, 1, 1, 0, 0], "float32")
        found = model.predict({**many, "sample_weight": weight}, batch_size=2, verbose=0)
        assert set(found) == {"image_embeds", "text_embeds", "sample_weight"}
        np.testing.assert_array_equal(found["sample_weight"], weight)


def test_ids_that_are_floats_are_the_whole_numbers(model, pairs):
    import tensorflow as tf

    floats = {**pairs, "input_ids": pairs["input_ids"].astype("float32")}
    expected = model.evaluate(pairs, verbose=0)
    np.testing.assert_allclose(model.evaluate(floats, verbose=0), expected, rtol=1e-6)
    found = model.evaluate(tf.data.Dataset.from_tensors(floats), verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    alone = keras.Sequential([model.text_model])(floats["input_ids"]).pooler_output
    ids = keras.ops.convert_to_tensor(pairs["input_ids"])
    np.testing.assert_allclose(alone, model.text_model(ids).pooler_output, rtol=1e-6)
    for wrong in (floats["input_ids"] + 0.5, floats["input_ids"].astype("float16")):
        with pytest.raises(ValueError, match=r"^input_ids of float\d\d: expected whole numbers"):
            model({**floats, "input_ids": wrong})


def test_what_fit_cannot_take_is_told(steady_config, pairs):
    model = AlignModel(steady_config)  # its own: on JAX a step that fails takes the state with it
    model.compile(optimizer="sgd")
    with pytest.raises(ValueError, match="unknown inputs pixels: expected pixel_values, input_ids"):
        model.fit({**pairs, "pixels": pairs["pixel_values"]}, verbose=0)
    with pytest.raises(ValueError, match="expected pixel_values; for texts alone"):
        model.fit({"input_ids": pairs["input_ids"]}, verbose=0)
    with pytest.raises(ValueError, match=r"^x: missing; expected a data set, or a dict"):
        model.fit(verbose=0)
    with pytest.raises(ValueError, match="expected a dict of pixel_values"):
        model.fit(pairs["pixel_values"], verbose=0)
    with pytest.raises(ValueError, match="targets beside the batch: expected none"):
        model.fit(pairs, np.zeros(4), verbose=0)
    with pytest.raises(ValueError, match="targets beside the batch: expected none"):
        model.evaluate(pairs, np.zeros(4), verbose=0)
    import tensorflow as tf

    with pytest.raises(ValueError, match="targets beside the batch: expected none"):
        model.fit(tf.data.Dataset.from_tensors((pairs, np.zeros(4))), verbose=0)
    pair_by_pair = tf.data.Dataset.from_tensor_slices(pairs)
    for call in (model.fit, model.evaluate, model.predict):
        expected = r"^the data set gives .* of shape \(.*\), one pair at a time: expected batches"
        for data in (pair_by_pair, pair_by_pair.map(lambda pair: (pair,))):
            with pytest.raises(ValueError, match=expected):
                call(data, verbose=0)
    with pytest.raises(ValueError, match="loss='mse': expected None; AlignModel minimises"):
        model.compile(optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match="accumulation=0: expected a positive integer"):
        model.compile(optimizer="sgd", accumulation=0)
    if keras.backend.backend() != "jax":
        with pytest.raises(ValueError, match="loop_blocks=True: the loop is JAX's"):
            model.compile(loop_blocks=True)
