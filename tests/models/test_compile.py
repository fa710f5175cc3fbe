"""What compile, fit, evaluate and predict are given: the right answer, or one line."""

import keras
import numpy as np
import pytest

from align_tf import AlignModel
from align_tf.evaluation import Embedder


@pytest.fixture(scope="module")
def trained(tiny_config) -> AlignModel:
    """Compiled with the optimizer of compile(): what each test leaves of it is not asked."""
    keras.utils.set_random_seed(0)
    model = AlignModel(tiny_config)
    model.compile(run_eagerly=True)
    return model


def refused(call, *args, **options) -> str:
    with pytest.raises(ValueError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


OTHER = "expected None; AlignModel minimises its contrastive loss, or after use_sigmoid_loss("
NO_TARGETS = (
    "expected None, as there are no targets to compare with; loss, loss_i2t, loss_t2i, "
    "accuracy_i2t, accuracy_t2i, temperature are logged, and align_tf.training.RetrievalEvaluation"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["accuracy"]}, f"metrics=['accuracy']: {NO_TARGETS}"),
        ({"metrics": {"image_embeds": "mse"}}, f"metrics={{'image_embeds': 'mse'}}: {NO_TARGETS}"),
        ({"weighted_metrics": ["mae"]}, f"weighted_metrics=['mae']: {NO_TARGETS}"),
        ({"loss_weights": [1.0, 2.0]}, f"loss_weights=[1.0, 2.0]: {OTHER}"),
        ({"loss": "mse"}, f"loss='mse': {OTHER}"),
    ],
)
def test_losses_and_metrics_of_targets_are_refused(options, message, trained):
    assert refused(trained.compile, "sgd", **options).startswith(message)


def test_the_optimizers_of_compile(tiny_config, trained):
    optimizer = trained.optimizer
    assert type(optimizer) is keras.optimizers.AdamW
    assert float(optimizer.learning_rate) == pytest.approx(1e-5)
    model = AlignModel(tiny_config)
    model.compile("adamw", None, None, [], [])  # Keras's order
    assert type(model.optimizer) is keras.optimizers.AdamW
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-3)


def test_a_keras_file_is_compiled_where_the_model_was(tiny_config, trained, tmp_path):
    AlignModel(tiny_config).save(tmp_path / "new.keras")
    new = keras.saving.load_model(tmp_path / "new.keras")
    assert not new.compiled
    assert getattr(new, "optimizer", None) is None
    trained.save(tmp_path / "trained.keras")
    again = keras.saving.load_model(tmp_path / "trained.keras")
    assert again.compiled
    assert type(again.optimizer) is keras.optimizers.AdamW
    assert float(again.optimizer.learning_rate) == pytest.approx(1e-5)


def test_an_endless_dataset_asks_for_steps(trained, pairs):
    import tensorflow as tf

    once = tf.data.Dataset.from_tensors(pairs)
    for endless in (once.repeat(), once.repeat().map(lambda batch: batch)):
        for call, options, name in (
            (trained.fit, {}, "steps_per_epoch"),
            (trained.evaluate, {}, "steps"),
            (trained.predict, {}, "steps"),
            (trained.fit, {"validation_data": endless, "x": once}, "validation_steps"),
        ):
            message = refused(call, **{"x": endless, "verbose": 0, **options})
            assert message.startswith(f"an endless dataset: expected {name}, the number of batches")
    assert trained.predict(once.repeat(), steps=2, verbose=0)["image_embeds"].shape == (8, 8)
    assert np.isfinite(trained.evaluate(once.repeat(), steps=1, verbose=0)[0])


def test_a_generator_of_batches(trained, pairs):
    def batches():
        yield from (pairs, (pairs,))

    found = trained.predict(batches(), verbose=0)
    assert found["text_embeds"].shape == (8, 8)


def test_weights_of_classes_are_refused(trained, pairs):
    message = refused(trained.fit, pairs, class_weight={0: 2.0}, verbose=0)
    assert message == "class_weight: expected None; pairs have no class, but sample_weight"


@pytest.mark.parametrize("call", ["fit", "evaluate", "predict"])
def test_images_and_texts_of_other_numbers_are_no_pairs(call, trained, pairs):
    given = {**pairs, "pixel_values": pairs["pixel_values"][:1]}
    assert refused(getattr(trained, call), given, verbose=0) == (
        "rows of pairs, pixel_values of 1, input_ids of 4, attention_mask of 4: expected as many "
        "of each, an image and its text a row; for all images by all texts call model(inputs)"
    )


@pytest.mark.parametrize("call", ["fit", "predict", "__call__", "get_text_features"])
@pytest.mark.parametrize(
    ("name", "id_", "last"),
    [
        ("input_ids", 40, 39),
        ("input_ids", -1, 39),
        ("token_type_ids", 2, 1),
        ("position_ids", 16, 15),
    ],
)
def test_ids_of_no_row_are_refused(call, name, id_, last, trained, pairs):
    ids = np.zeros((4, 6), "int32")
    ids[2, 3] = id_
    options = {"verbose": 0} if call in ("fit", "predict") else {}
    message = refused(getattr(trained, call), {**pairs, name: ids}, **options)
    assert message == f"{name} that hold {id_}: expected 0 to {last}"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_mask", (4, 5)),
        ("attention_mask", (1, 6)),
        ("token_type_ids", (4, 6, 1)),
        ("position_ids", (2, 6)),
    ],
)
def test_inputs_of_another_shape_than_the_texts_are_refused(name, shape, trained, pairs):
    given = {**pairs, name: np.ones(shape, "int32")}
    for call in (trained, trained.get_text_features):
        told = refused(call, given)
        assert told == f"{name} of shape {shape}: expected that of input_ids, (4, 6)"


def test_position_ids_of_one_row_are_those_of_all(trained, pairs):
    given = {**pairs, "position_ids": np.arange(6, dtype="int32")[None]}
    found, expected = (trained.get_text_features(x) for x in (given, pairs))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="a text of 0 tokens: expected 1 or more"):
        trained.get_text_features(np.zeros((1, 0), "int32"))


@pytest.mark.parametrize("level", [np.nan, np.inf, -np.inf, 40, -40])
def test_pixels_that_no_processor_gives_are_refused(level, trained, pairs):
    pixels = pairs["pixel_values"].copy()
    pixels[2, 3, 4, 1] = level
    for call in (
        trained,
        lambda x: trained.fit(x, verbose=0),
        lambda x: Embedder(trained).pairs(x),
    ):
        told = refused(call, {**pairs, "pixel_values": pixels})
        assert told.startswith(f"pixel_values that reach {level:g}: expected float (n, height")


@pytest.mark.parametrize("id_", [40, -1])
def test_an_embedder_refuses_what_the_model_does(id_, trained, pairs):
    with pytest.raises(ValueError, match=f"^input_ids that hold {id_}: expected 0 to 39$"):
        Embedder(trained).texts({"input_ids": np.array([[2, id_, 3]])})


def test_an_error_of_the_data_is_a_line(trained, pairs):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("a data set of TensorFlow, which JAX's tests go without")
    import tensorflow as tf

    def broken(batch):
        with tf.control_dependencies([tf.debugging.Assert(False, ["pairs: 07: no image"])]):
            return {name: tf.identity(value) for name, value in batch.items()}

    dataset = tf.data.Dataset.from_tensors(pairs).map(broken)
    for call in (trained.fit, trained.evaluate, trained.predict):
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            call(dataset, verbose=0)
        assert str(error.value) == "pairs: 07: no image"
