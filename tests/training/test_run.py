"""Training by a recipe: what it leaves, what it says, and where it ends."""

import json
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy
from small_training import WORDS

from align_tf import AlignModel, AlignProcessor
from align_tf.configuration import presets
from align_tf.data import make_dataset
from align_tf.training import Recipe, RetrievalEvaluation, read_recipe, run, train
from align_tf.training.run import _take_best
from align_tf.training.validation import Best

pytestmark = pytest.mark.usefixtures("traced_once")


def test_training_leaves_what_from_pretrained_reads(unbroken):
    folders = sorted(path.name for path in unbroken.iterdir() if path.is_dir())
    assert folders == ["checkpoint-18", "checkpoint-20"]
    for folder in (unbroken, unbroken / "checkpoint-18"):
        AlignModel.from_pretrained(folder)
        assert AlignProcessor.from_pretrained(folder).tokenizer.vocab_size == len(WORDS)
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[0]["learning_rate"] == pytest.approx(0.01 * 15 / 17)
    assert lines[-1]["learning_rate"] == 0.0
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"temperature", "images_per_second", "gradient_norm"} <= lines[1].keys()
    assert all(line["gradient_norm"] > 0 for line in lines)
    name = "model.safetensors"
    assert (unbroken / name).read_bytes() == (unbroken / "checkpoint-20" / name).read_bytes()


def test_the_state_holds_what_a_step_changes(unbroken):
    state = safetensors.numpy.load_file(unbroken / "checkpoint-18" / "training_state.safetensors")
    assert state["optimizer/0/iteration"] == 18
    # Each dropout and drop-connect has drawn once a step; that of an encoder layer twice.
    draws = [value[1] for key, value in state.items() if key.startswith("seed/")]
    assert set(draws) == {18, 36}
    moving = state["model/vision_model/stem_bn/moving_mean"]
    assert np.abs(moving).max() > 0
    # The checkpoint that users load holds the averages, not the weights that train.
    model = safetensors.numpy.load_file(unbroken / "checkpoint-18" / "model.safetensors")
    found = model["text_projection.bias"]
    (key,) = [key for key in state if key.endswith("text_projection_bias_average")]
    np.testing.assert_array_equal(found, state[key])
    assert not np.array_equal(found, state["model/align/text_projection/bias"])


@pytest.mark.slow  # of another shape than the others, so all is traced anew, validation too
def test_from_scratch_by_epochs_with_validation(settings, place, monkeypatch, capsys, small_config):
    """A preset, epochs for steps, a smaller image, frozen blocks, an average, TensorBoard."""
    pytest.importorskip("tensorboard")
    text = {**small_config.text_config.to_dict(), "num_hidden_layers": 2}
    towers = (text, small_config.vision_config.to_dict())
    monkeypatch.setitem(presets.PRESETS, "mine", (*towers, {"projection_dim": 8}))
    del settings["model"], settings["steps"]
    settings |= {"preset": "mine", "processor": str(place / "tiny"), "epochs": 2, "seed": 5}
    settings |= {"validation_data": settings["data"], "tensorboard": True, "log_every": 2}
    settings |= {"image_size": 12, "freeze": {"text": [0], "vision": [0]}}
    settings |= {"loss": "sigmoid", "accumulation": 2}
    del settings["batch_norm"]
    output = train(Recipe(**settings))

    err = capsys.readouterr().err
    assert "step 6/6  epoch 2/2  loss " in err  # 24 pairs twice, 8 at a time
    assert "step 6/6  epoch 2/2  val_loss " in err
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    model = AlignModel.from_pretrained(output)
    model.compile()
    validation = make_dataset(
        settings["data"], AlignProcessor.from_pretrained(output), batch_size=8
    )
    measured = model.evaluate(validation, verbose=0, return_dict=True)
    retrieved = RetrievalEvaluation(validation)
    retrieved.set_model(model)
    measured |= retrieved.evaluate()
    assert {"val_loss", "val_r1_i2t"} <= lines[-1].keys()
    for key, value in measured.items():  # of the average, which is what is saved
        assert lines[-1][f"val_{key}"] == pytest.approx(value, rel=1e-5), key
    assert model.config.vision_config.image_size == 12
    assert model.config.text_config.vocab_size == len(WORDS)
    assert float(model.logit_bias) == pytest.approx(-np.log(7), abs=0.1)
    processor = AlignProcessor.from_pretrained(output).image_processor
    assert processor.size == {"height": 15, "width": 15}
    assert processor.crop_size == {"height": 12, "width": 12}
    state = safetensors.numpy.load_file(output / "checkpoint-6" / "training_state.safetensors")
    assert not state["model/text_model/layer_0/output/bias"].any()  # as it began
    assert state["model/text_model/layer_1/output/bias"].any()
    assert list((output / "tensorboard").glob("events.*"))


def test_the_recipe_of_the_readme_runs(settings, tmp_path):
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (tmp_path / "finetune.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    small = {key: settings[key] for key in ("model", "data", "output", "batch_size")}
    flags = {**small, "epochs": 1, "warmup_steps": 1}
    recipe = read_recipe(tmp_path / "finetune.yaml", flags)
    assert (recipe.optimizer, recipe.freeze) == ("adamw", "vision")
    before = AlignModel.from_pretrained(settings["model"])
    after = AlignModel.from_pretrained(train(recipe))
    for tower, same in (
        (lambda m: m.vision_model, True),
        (lambda m: m.text_model.blocks[0], False),
    ):
        pairs = zip(tower(before).get_weights(), tower(after).get_weights(), strict=True)
        assert all(np.array_equal(old, new) for old, new in pairs) is same


def test_a_loss_that_is_not_finite_leaves_no_checkpoint(settings, traced_once, monkeypatch):
    make_model = run.make_model

    def make_broken_model(*arguments):
        model = make_model(*arguments)
        model.temperature.assign(np.nan)
        return model

    monkeypatch.setattr(run, "make_model", make_broken_model)
    message = r"step 1: the loss is nan, so no .* unless it is one of its pairs: "
    with pytest.raises(ValueError, match=message) as error:
        train(Recipe(**settings))
    output = pathlib.Path(settings["output"])
    assert not list(output.glob("*checkpoint-*"))
    keys = (output / "not_finite.txt").read_text().splitlines()
    assert len(set(keys)) == 8
    assert {f"{index:02}" for index in range(24)} >= {pathlib.Path(key).stem for key in keys}
    said = f"{', '.join(keys[:4])} and 4 more, listed in {output / 'not_finite.txt'}"
    assert str(error.value).endswith(said)


def test_a_best_that_was_not_kept_is_told(tmp_path):
    recipe = Recipe(
        model="align-tiny",
        data="pairs",
        output=str(tmp_path),
        steps=2,
        validation_data="pairs",
        keep_best="val_loss",
    )
    figures = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match="keep_best='val_loss': no validation has found it; expe"):
        _take_best(tmp_path, None, Best(recipe, figures, 2))
    figures.write_text('{"step": 1, "val_loss": 0.5}\n{"step": 2, "val_loss": 0.6}\n')
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(
        ValueError, match=r"keep_best='val_loss': .*/checkpoint-1 is gone; expected"
    ):
        _take_best(tmp_path, None, Best(recipe, figures, 2))
