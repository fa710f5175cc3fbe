"""Figures in the logs while a model trains, and what Keras's callbacks do with them."""

import keras
import numpy as np
import pytest

from align_tf import AlignImageProcessor, AlignModel, AlignProcessor, AlignTokenizer
from align_tf.evaluation import Embedder, retrieval_metrics
from align_tf.files import CheckpointError
from align_tf.training import (
    CompilationCount,
    ResumableCheckpoint,
    RetrievalEvaluation,
    ZeroShotEvaluation,
)

RETRIEVAL = {
    f"val_{name}_{way}"
    for name in ("r1", "r5", "r10", "median_rank", "mean_rank")
    for way in ("i2t", "t2i")
}


@pytest.fixture(scope="module")
def shared(tiny_config):
    """A model whose step is traced once, and what it begins with."""
    keras.utils.set_random_seed(0)
    model = AlignModel(tiny_config)
    model.freeze()  # the projection and the temperature train: enough to move the figures
    model.compile(optimizer=keras.optimizers.Adam(0.1), jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model, [np.array(value) for value in model.variables + model.optimizer.variables]


@pytest.fixture
def model(shared):
    model, values = shared
    for variable, value in zip(model.variables + model.optimizer.variables, values, strict=True):
        variable.assign(value)
    model.trained_batches = 0
    return model


def fit(model, pairs, *callbacks, steps=5, **options):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensors(pairs).repeat(steps)
    return model.fit(
        dataset, callbacks=list(callbacks), shuffle=False, verbose=0, **options
    ).history


class Values(keras.callbacks.Callback):
    """Keeps what the logs say of one figure after each batch."""

    def __init__(self, name):
        super().__init__()
        self.name, self.values = name, []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append((batch, logs.get(self.name)))


@pytest.mark.slow
def test_retrieval_of_each_epoch_is_in_the_history(model, pairs):
    history = fit(model, pairs, RetrievalEvaluation(pairs), epochs=3)
    assert set(history) >= RETRIEVAL
    assert all(len(history[name]) == 3 for name in RETRIEVAL)
    embeds = Embedder(model).pairs(pairs)
    last = retrieval_metrics(embeds["image_embeds"], embeds["text_embeds"])
    for name, value in last.items():
        assert history[f"val_{name}"][-1] == pytest.approx(value)
    assert len(set(history["val_mean_rank_i2t"])) > 1  # it follows the weights


def test_rows_of_one_image_are_one_image(model, pairs):
    ids = {"image_ids": np.array([0, 0, 0, 0]), "text_ids": np.arange(4)}
    history = fit(model, pairs, RetrievalEvaluation({**pairs, **ids}), epochs=1)
    assert history["val_r1_i2t"] == history["val_r1_t2i"] == [1.0]  # all answers are right


def test_early_stopping_checkpoints_and_tensorboard_see_the_figures(model, pairs, tmp_path):
    best = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", "val_mean_rank_i2t", mode="min", save_best_only=True
    )
    # Recall cannot grow beyond all of it: 10 are more than the 4 there are.
    stop = keras.callbacks.EarlyStopping("val_r10_i2t", mode="max", patience=2)
    board = keras.callbacks.TensorBoard(tmp_path)
    history = fit(model, pairs, RetrievalEvaluation(pairs), best, stop, board, epochs=9)
    assert len(history["loss"]) == 3
    assert best.best == min(history["val_mean_rank_i2t"])
    assert (tmp_path / "best.keras").is_file()
    (events,) = (tmp_path / "validation").iterdir()
    assert b"epoch_r1_i2t" in events.read_bytes()


def test_every_few_steps(model, pairs):
    seen = Values("val_r10_i2t")
    callback = RetrievalEvaluation(pairs, every_steps=3)
    history = fit(model, pairs, callback, seen, epochs=2)
    measured = [step for step, (_, value) in enumerate(seen.values, 1) if value is not None]
    assert measured == [3, 6, 9]
    assert history["val_r10_i2t"] == [1.0, 1.0]  # the last figure is there at the epoch's end


def test_every_few_steps_when_a_batch_stands_for_several(small_config, pairs):
    model = AlignModel(small_config)
    model.freeze()
    model.compile(optimizer="sgd", steps_per_execution=2, run_eagerly=True)
    seen = Values("val_r10_i2t")
    fit(model, pairs, RetrievalEvaluation(pairs, every_steps=3), seen, steps=4, epochs=1)
    # Executed are steps 0-1 and 2-3: the third is done with the second execution.
    assert [batch for batch, value in seen.values if value is not None] == [3]


def test_steps_are_counted_from_those_done_before(model, pairs):
    fit(model, pairs, epochs=1)  # five steps
    seen = Values("val_r10_i2t")
    fit(model, pairs, RetrievalEvaluation(pairs, every_steps=4), seen, epochs=1)
    assert [batch for batch, value in seen.values if value is not None] == [2]  # the eighth step


def test_zero_shot(model, pairs):
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "cat",
        "dog",
        "photo",
        *map(str, range(9)),
    ]
    callback = ZeroShotEvaluation(
        pairs["pixel_values"],
        [0, 1, 1, 0],
        ["cat", "dog"],
        AlignTokenizer(vocab, model_max_length=16),
        templates=["{}", "photo {}"],
    )
    history = fit(model, pairs, callback, epochs=2)
    assert history["val_top5"] == [1.0, 1.0]
    assert all(value in (0.0, 0.25, 0.5, 0.75, 1.0) for value in history["val_top1"])
    assert len(history["val_mean_per_class"]) == 2


def test_every_steps_is_checked(pairs):
    with pytest.raises(ValueError, match="every_steps=0: expected 1 or more, or None"):
        RetrievalEvaluation(pairs, every_steps=0)


# --- checkpoints ------------------------------------------------------------------------------

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Few steps are not worth a trace of TensorFlow; JAX's compiled ones, which another test has left
# in the cache, take the memory of what they are given.
EAGERLY = keras.backend.backend() == "tensorflow"


@pytest.fixture
def processor():
    return AlignProcessor(AlignImageProcessor(size=16, crop_size=16), AlignTokenizer(VOCAB))


def new_model(small_config):
    """A model whose dropout and optimizer have states."""
    keras.utils.set_random_seed(1)
    model = AlignModel(small_config)
    model.compile(optimizer=keras.optimizers.Adam(0.01), run_eagerly=EAGERLY)
    return model


@pytest.mark.slow
def test_a_training_goes_on_from_its_last_checkpoint(small_config, pairs, processor, tmp_path):
    unbroken = new_model(small_config)
    fit(unbroken, pairs, epochs=3, steps_per_epoch=2, steps=6)

    checkpoints = ResumableCheckpoint(tmp_path, processor, keep=1)
    model = new_model(small_config)
    assert checkpoints.restore(model) == 0
    fit(model, pairs, checkpoints, epochs=2, steps_per_epoch=2, steps=4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]

    model = new_model(small_config)
    step = checkpoints.restore(model)
    assert step == 4
    fit(model, pairs, checkpoints, initial_epoch=2, epochs=3, steps_per_epoch=2, steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    for found, expected in zip(model.get_weights(), unbroken.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)
    loaded = AlignModel.from_pretrained(tmp_path / "checkpoint-6")
    for found, expected in zip(loaded.get_weights(), unbroken.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)


def leaves_out_steps(small_config) -> AlignModel:
    """A model whose first steps overflow: the scale of its loss is far too high."""
    keras.utils.set_random_seed(1)
    model = AlignModel(small_config, dtype="mixed_float16")
    optimizer = keras.optimizers.SGD(0.01)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**40)
    model.compile(optimizer=optimizer, run_eagerly=EAGERLY)
    return model


@pytest.mark.slow
def test_batches_are_counted_not_the_steps_of_the_optimizer(
    small_config, pairs, processor, tmp_path
):
    model, checkpoints = leaves_out_steps(small_config), ResumableCheckpoint(tmp_path, processor)
    assert checkpoints.restore(model) == 0
    seen = Values("val_r10_i2t")
    callbacks = (checkpoints, RetrievalEvaluation(pairs, every_steps=3), seen)
    fit(model, pairs, *callbacks, epochs=2, steps_per_epoch=2, steps=4)
    assert int(model.optimizer.iterations) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert [value is not None for _, value in seen.values] == [False, False, True, False]

    model, seen = leaves_out_steps(small_config), Values("val_r10_i2t")
    assert checkpoints.restore(model) == model.trained_batches == 4
    callbacks = (checkpoints, RetrievalEvaluation(pairs, every_steps=3), seen)
    fit(model, pairs, *callbacks, initial_epoch=2, epochs=3, steps_per_epoch=2, steps=2)
    assert (tmp_path / "checkpoint-6").is_dir()
    assert [value is not None for _, value in seen.values] == [False, True]


@pytest.mark.slow  # a training and its validation to trace
def test_what_is_saved_is_measured(small_config, pairs, processor, tmp_path):
    """The moving average of the weights, of which validation takes nothing away."""
    weights = []
    for measuring in (False, True):
        keras.utils.set_random_seed(1)
        model = AlignModel(small_config)
        optimizer = keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5)
        model.compile(optimizer=optimizer, run_eagerly=EAGERLY)
        callbacks = (RetrievalEvaluation(pairs), ResumableCheckpoint(tmp_path, processor))
        options = {"validation_data": pairs, "validation_batch_size": 10}
        history = fit(
            *(model, pairs, *callbacks * measuring),
            **options if measuring else {},
            epochs=3,
        )
        weights.append(model.get_weights())
    for found, expected in zip(*weights, strict=True):
        np.testing.assert_array_equal(found, expected)
    saved = AlignModel.from_pretrained(tmp_path / "checkpoint-15")
    saved.compile()
    logs = saved.evaluate(pairs, batch_size=10, verbose=0, return_dict=True)
    evaluation = RetrievalEvaluation(pairs)
    evaluation.set_model(saved)
    for key, value in (logs | evaluation.evaluate()).items():
        assert history[f"val_{key}"][-1] == pytest.approx(value, rel=1e-5), key


def test_a_checkpoint_of_another_model_is_an_error(
    small_config, pairs, processor, tmp_path, capsys
):
    checkpoints = ResumableCheckpoint(tmp_path, processor)
    fit(new_model(small_config), pairs, checkpoints, steps=1)
    other = new_model(small_config)
    other.freeze("vision")
    other.compile(optimizer=keras.optimizers.Adam(0.01))
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        checkpoints.restore(other)
    assert "checkpoint-1 is broken" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_leaves_no_checkpoint(small_config, pairs, processor, tmp_path):
    model = new_model(small_config)
    model.temperature.assign(np.nan)  # pixels are refused before they come to a loss
    with pytest.raises(ValueError, match="step 1: the loss is nan, so no checkpoint"):
        fit(model, pairs, ResumableCheckpoint(tmp_path / "run", processor), steps=1)
    assert not (tmp_path / "run").exists()


def test_keep_is_positive(processor, tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        ResumableCheckpoint(tmp_path, processor, keep=0)


# --- compilations -----------------------------------------------------------------------------


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="compilations are JAX's")
def test_each_shape_of_a_batch_is_a_compilation(small_config, pairs):
    model = AlignModel(small_config)
    model.freeze()
    model.compile(optimizer="sgd", steps_per_execution=2)
    shorter = {**pairs, **{name: pairs[name][:, :4] for name in ("input_ids", "attention_mask")}}

    def batches():
        for batch in (pairs, shorter, pairs, shorter, shorter, pairs):
            yield (batch,)

    count = CompilationCount()
    model.fit(batches(), verbose=0, callbacks=[count])
    assert count.count == 2
    model.fit(batches(), verbose=0)  # not listened to
    assert count.count == 2


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX tells")
def test_compilations_are_counted_on_jax_alone():
    with pytest.raises(RuntimeError, match="counted on JAX, Keras runs on tensorflow"):
        CompilationCount()
