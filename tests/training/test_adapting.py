"""`align-tf train --lora-rank`: the adapter alone is kept on the way, and the training resumes."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from align_tf import AlignModel, AlignProcessor
from align_tf.cli.main import main
from align_tf.training.recipe import Recipe
from align_tf.training.run import make_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("png_alone")]

# Is killed, as by kill -9, after the step behind the first checkpoint.
KILLED = """
import os, signal, sys
from align_tf.cli.main import main
from align_tf.training import hosts

say = hosts.say

def say_and_die(message):
    say(message)
    if message.startswith("step 4/"):
        os.kill(os.getpid(), signal.SIGKILL)

hosts.say = say_and_die
sys.exit(main())
"""


def command(place, output):
    settings = {
        "model": place / "tiny",
        "data": place / "pairs",
        "output": output,
        "batch-size": 8,
        "steps": 6,
        "save-every": 3,
        "log-every": 1,
        "lora-rank": 2,
        "lora-alpha": 4,
        "learning-rate": 0.01,
        "ema-momentum": 0.5,
    }
    parts = [(f"--{key}", str(value)) for key, value in settings.items()]
    return ["train", *(part for pair in parts for part in pair)]


@pytest.fixture(scope="module")
def unbroken(place, png_alone, tmp_path_factory):
    """The folder of a training that ran through."""
    output = tmp_path_factory.mktemp("adapting") / "out"
    assert main(command(place, output)) == 0
    return output


def copied(output, to):
    shutil.copytree(output, to)
    recipe = (to / "recipe.yaml").read_text()
    (to / "recipe.yaml").write_text(recipe.replace(str(output), str(to)))
    return to


def tensors(path):
    return safetensors.numpy.load_file(path)


def assert_same(output, unbroken):
    for name in (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "checkpoint-6/training_state.safetensors",
        "checkpoint-6/adapter_model.safetensors",
    ):
        found, expected = tensors(output / name), tensors(unbroken / name)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            np.testing.assert_array_equal(value, expected[key], err_msg=f"{name}: {key}")


def test_a_checkpoint_holds_the_adapter_alone(unbroken, place):
    folder = unbroken / "checkpoint-3"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
        *("training_state.json", "training_state.safetensors", "vocab.txt"),
    ]
    weights = [key for key in tensors(folder / "training_state.safetensors") if "model/" in key]
    assert {key.rpartition("/")[2] for key in weights} == {"lora_kernel_a", "lora_kernel_b"}
    assert len(weights) == len(tensors(folder / "adapter_model.safetensors")) == 2 * (6 + 2 * 3 + 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["base_model_name_or_path"] == str(place / "tiny")


def test_the_trained_model_has_its_adapter_merged_and_beside_it(unbroken, place):
    whole = AlignModel.from_pretrained(unbroken)
    assert whole.adapters == []
    assert sorted(path.name for path in (unbroken / "adapter").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors"),
    ]
    adapted = AlignModel.from_pretrained(place / "tiny")
    before = adapted.text_projection.get_weights()[0]
    adapted.load_adapter(unbroken / "adapter")
    adapted.merge_adapter()
    merged = whole.text_projection.get_weights()[0]
    assert np.abs(merged - before).max() > 1e-3
    for one, other in zip(adapted.weights, whole.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=1e-6)


def test_a_training_goes_on_to_the_same_adapter(unbroken, place, capsys, tmp_path):
    """As after a kill between the checkpoints of the steps 3 and 6."""
    output = copied(unbroken, tmp_path / "again")
    for name in ("checkpoint-6", "adapter"):
        shutil.rmtree(output / name)
    (output / "model.safetensors").unlink()
    assert main(command(place, output)) == 0
    said = capsys.readouterr().err
    assert "weights, LoRA of rank 2; frozen: BatchNorm" in said
    assert "Going on from step 3, " in said
    assert_same(output, unbroken)


def test_a_model_that_has_changed_is_told(unbroken, place, capsys, tmp_path):
    output = copied(unbroken, tmp_path / "out")
    for name in ("tiny", "pairs"):
        shutil.copytree(place / name, tmp_path / name)
    recipe = (output / "recipe.yaml").read_text()
    (output / "recipe.yaml").write_text(recipe.replace(str(place), str(tmp_path)))
    (output / "data_listing.npz").unlink()  # of the other pairs
    path = tmp_path / "tiny" / "model.safetensors"
    changed = tensors(path)
    changed["text_projection.bias"] += 1
    safetensors.numpy.save_file(changed, path)
    assert main(command(tmp_path, output)) == 2
    said = capsys.readouterr().err
    assert f"checkpoint-6: an adapter of other weights than {tmp_path / 'tiny'} holds" in said
    assert "none of its checkpoints is whole; another output starts anew" in said


def test_a_training_that_is_killed_reaches_the_same_adapter(unbroken, place, capsys, tmp_path):
    output = tmp_path / "killed"
    process = subprocess.run([sys.executable, "-c", KILLED, *command(place, output)])
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-3"]
    assert main(command(place, output)) == 0
    assert "Going on from step 3, " in capsys.readouterr().err
    assert_same(output, unbroken)


def test_an_adapter_is_trained_on_as_the_model_that_it_makes(place, tmp_path):
    adapted = AlignModel.from_pretrained(place / "tiny")
    before = [weight.path for weight in adapted.trainable_weights]
    adapted.enable_lora(2)
    adapted.save_adapter(tmp_path)
    settings = {"model": str(tmp_path), "data": "pairs", "output": "out", "steps": 10}
    recipe = Recipe(**settings).counted(10)
    processor = AlignProcessor.from_pretrained(tmp_path)
    model = make_model(recipe, processor, 1)
    assert model.adapters == []
    assert [weight.path for weight in model.trainable_weights] == before
    recipe = Recipe(**settings, lora_rank=2).counted(10)
    with pytest.raises(ValueError, match="an adapter; with lora_rank expected a whole model, wh"):
        make_model(recipe, processor, 1)
