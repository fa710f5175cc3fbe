"""Checkpoints and configurations exchanged with transformers, both ways."""

import json
import logging
import pathlib
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from keras import ops

from align_tf import AlignConfig, AlignModel, AlignTextModel, AlignVisionConfig, AlignVisionModel
from align_tf.files import CheckpointError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-5,
    "hidden_act": "relu",
}
VISION = {
    "image_size": 33,
    "width_coefficient": 0.25,
    "depth_coefficient": 1.0,
    "kernel_sizes": [3, 5],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "depthwise_padding": [1],
    "strides": [1, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 6],
    "hidden_dim": 64,
    "pooling_type": "max",
}
JOINT = {
    "text_config": TEXT,
    "vision_config": VISION,
    "projection_dim": 8,
    "temperature_init_value": 0.5,
    "model_type": "align",
}
IDS = np.array([[2, 11, 5, 38], [2, 9, 30, 3]])
PIXELS = np.random.default_rng(0).random((2, 33, 33, 3), "float32")


def our_logits(model: AlignModel) -> np.ndarray:
    output = model({"input_ids": IDS, "pixel_values": PIXELS})
    return ops.convert_to_numpy(output.logits_per_image)


def their_logits(model: Any) -> np.ndarray:
    pixels = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(IDS), pixel_values=pixels)
    return output.logits_per_image.float().numpy()


# --- config.json ---------------------------------------------------------------------------


def assert_same_values(ours: dict, theirs: Any) -> None:
    """Compares all arguments of the reference's class, in the towers too."""
    for key in type(theirs).__annotations__:
        if key in ("bos_token_id", "eos_token_id", "sub_configs_defaults"):
            continue
        value = getattr(theirs, key)
        if key.endswith("_config"):
            assert_same_values(ours[key], value)
        else:
            assert ours[key] == value, key


def test_transformers_reads_our_config(tmp_path):
    config = AlignConfig.from_dict(JOINT)
    config.save_pretrained(tmp_path)
    assert_same_values(config.to_dict(), transformers.AlignConfig.from_pretrained(tmp_path))
    text = transformers.AlignTextConfig.from_pretrained(tmp_path)
    assert_same_values(config.text_config.to_dict(), text)
    config.vision_config.save_pretrained(tmp_path / "vision")
    vision = transformers.AlignVisionConfig.from_pretrained(tmp_path / "vision")
    assert_same_values(config.vision_config.to_dict(), vision)


def test_we_read_the_config_of_transformers(tmp_path):
    values = {key: value for key, value in JOINT.items() if key != "model_type"}
    theirs = transformers.AlignConfig(**values)
    theirs.save_pretrained(tmp_path)
    ours = AlignConfig.from_pretrained(tmp_path)
    assert_same_values(ours.to_dict(), theirs)
    assert AlignVisionConfig.from_pretrained(tmp_path) == ours.vision_config


# --- weights -------------------------------------------------------------------------------


def load_theirs(model_class: Any, folder: pathlib.Path, **options: Any) -> Any:
    """Loads a model of transformers and holds it to its own report of what it found."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert {key: list(found) for key, found in report.items() if found} == {}
    return model.eval()


def test_transformers_loads_what_we_write(twins, tmp_path):
    _, ours = twins(JOINT)
    ours.save_pretrained(tmp_path / "ours")
    theirs = load_theirs(transformers.AlignModel, tmp_path / "ours")
    np.testing.assert_allclose(their_logits(theirs), our_logits(ours), atol=1e-5)

    ours.text_model.save_pretrained(tmp_path / "text")
    theirs = load_theirs(transformers.AlignTextModel, tmp_path / "text")
    expected = theirs(torch.from_numpy(IDS)).pooler_output.detach().numpy()
    actual = ops.convert_to_numpy(ours.text_model(IDS).pooler_output)
    np.testing.assert_allclose(actual, expected, atol=1e-5)

    ours.vision_model.save_pretrained(tmp_path / "vision")
    load_theirs(transformers.AlignVisionModel, tmp_path / "vision")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_transformers_loads_the_dtype_we_write(dtype, twins, tmp_path):
    _, ours = twins(JOINT)  # its config.json says float32
    ours.save_pretrained(tmp_path / dtype, dtype=dtype)
    theirs = load_theirs(transformers.AlignModel, tmp_path / dtype, dtype="auto")
    assert {str(weight.dtype) for weight in theirs.parameters()} == {f"torch.{dtype}"}
    again = our_logits(AlignModel.from_pretrained(tmp_path / dtype))
    np.testing.assert_allclose(their_logits(theirs.float()), again, atol=1e-5)


def test_a_checkpoint_comes_back_as_it_went(twins, tmp_path):
    theirs, ours = twins(JOINT)
    ours.save_pretrained(tmp_path / "ours")
    again = load_theirs(transformers.AlignModel, tmp_path / "ours").state_dict()
    for name, tensor in theirs.state_dict().items():
        if "num_batches_tracked" not in name:
            assert torch.equal(tensor, again[name]), name


def test_shards_of_transformers(twins, tmp_path):
    theirs, ours = twins(JOINT)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = AlignModel.from_pretrained(tmp_path / "shards")
    np.testing.assert_array_equal(our_logits(again), our_logits(ours))
    AlignTextModel.from_pretrained(tmp_path / "shards")


@pytest.fixture
def binary(twins, tmp_path) -> tuple[pathlib.Path, dict, np.ndarray]:
    """A folder to hold pytorch_model.bin, the tensors for it, and the logits to expect."""
    theirs, ours = twins(JOINT)
    folder = tmp_path / "binary"
    theirs.config.save_pretrained(folder)
    return folder, theirs.state_dict(), our_logits(ours)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "first format"])
def test_pytorch_files(zipped, binary):
    folder, tensors, expected = binary
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    np.testing.assert_array_equal(our_logits(AlignModel.from_pretrained(folder)), expected)
    AlignVisionModel.from_pretrained(folder)


def test_pytorch_shards_of_half_precision(binary):
    folder, tensors, expected = binary
    weight_map = {}
    for index, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        names = list(tensors)[index - 1 :: 2]
        name = f"pytorch_model-0000{index}-of-00002.bin"
        torch.save({key: tensors[key].to(dtype) for key in names}, folder / name)
        weight_map.update(dict.fromkeys(names, name))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    actual = our_logits(AlignModel.from_pretrained(folder))
    np.testing.assert_allclose(actual, expected, atol=0.1)


class Bomb:
    """What a pickle runs when it is opened."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "first format"])
def test_a_pickle_that_runs_code_is_refused(zipped, binary, tmp_path):
    folder, tensors, _ = binary
    path = folder / "pytorch_model.bin"
    bomb = {**tensors, "temperature": Bomb(tmp_path / "went off")}
    torch.save(bomb, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a whole PyTorch file"):
        AlignModel.from_pretrained(folder)
    assert not (tmp_path / "went off").exists()
    torch.load(path, weights_only=False)  # the bomb is real
    assert (tmp_path / "went off").exists()


@pytest.mark.parametrize("content", ["truncated", "pickle", "noise", "list", "nested"])
def test_broken_pytorch_files_are_refused(content, binary):
    folder, tensors, _ = binary
    path = folder / "pytorch_model.bin"
    torch.save({"list": [1, 2], "nested": {"model": tensors}}.get(content, tensors), path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "pickle":
        path.write_bytes(pickle.dumps({"temperature": 1.0}))
    elif content == "noise":
        path.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError) as caught:
        AlignModel.from_pretrained(folder)
    message = "expected a dict of tensors" if content in ("list", "nested") else "not a whole Py"
    assert f"pytorch_model.bin: {message}" in str(caught.value)


# --- warm start ----------------------------------------------------------------------------

BERT = TEXT
EFFICIENTNET = {**VISION, "hidden_dim": 320, "pooling_type": "mean"}  # a quarter of B0's 1280
TEXT_CLASSES = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"]
VISION_CLASSES = ["EfficientNetModel", "EfficientNetForImageClassification"]


def tower(name: str, folder: pathlib.Path, randomize: Any) -> Any:
    config = transformers.BertConfig(**BERT, attn_implementation="eager")
    if "EfficientNet" in name:
        config = transformers.EfficientNetConfig(**EFFICIENTNET)
    model = randomize(getattr(transformers, name)(config))
    model.save_pretrained(folder)
    return getattr(model, model.base_model_prefix, model)


@pytest.mark.parametrize("vision_class", VISION_CLASSES)
@pytest.mark.parametrize("text_class", TEXT_CLASSES)
def test_from_towers(text_class, vision_class, randomize, tmp_path, caplog):
    bert = tower(text_class, tmp_path / "text", randomize)
    efficientnet = tower(vision_class, tmp_path / "vision", randomize)
    with caplog.at_level(logging.WARNING, logger="align_tf"):
        model = AlignModel.from_towers(text=tmp_path / "text", vision=tmp_path / "vision")

    with torch.no_grad():
        expected = bert(torch.from_numpy(IDS)).last_hidden_state.numpy()
        pixels = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())
        images = efficientnet(pixels, output_hidden_states=True).hidden_states[-1]
    actual = ops.convert_to_numpy(model.text_model(IDS).last_hidden_state)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    actual = ops.convert_to_numpy(model.vision_model(PIXELS).last_hidden_state)
    np.testing.assert_allclose(actual, images.permute(0, 2, 3, 1).numpy(), atol=1e-5)

    assert model.config.projection_dim == 8
    assert "encoder.top_bn, encoder.top_conv" in caplog.text
    assert ("cls" in caplog.text) == (text_class == "BertForMaskedLM")
    assert ("has no pooler/kernel, pooler/bias: new" in caplog.text) == (bert.pooler is None)
    assert model.text_model.config.hidden_act == "relu"


def test_from_towers_with_an_image_projection(randomize, tmp_path):
    tower("BertModel", tmp_path / "text", randomize)
    tower("EfficientNetModel", tmp_path / "vision", randomize)
    model = AlignModel.from_towers(
        text=tmp_path / "text",
        vision=tmp_path / "vision",
        projection_dim=12,
        temperature_init_value=0.07,
    )
    assert our_logits(model).shape == (2, 2)
    assert model.image_projection.kernel.shape == (8, 12)
    assert float(ops.convert_to_numpy(model.temperature)) == pytest.approx(0.07)


def test_towers_that_are_swapped_are_told(randomize, tmp_path):
    tower("BertModel", tmp_path / "text", randomize)
    tower("EfficientNetModel", tmp_path / "vision", randomize)
    with pytest.raises(ValueError, match="model_type='efficientnet': expected 'bert'"):
        AlignModel.from_towers(text=tmp_path / "vision", vision=tmp_path / "text")


# --- memory --------------------------------------------------------------------------------

PEAK = """
import resource, sys
import keras
from align_tf import AlignModel

keras.ops.zeros((1,))  # the backend is up
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = AlignModel.from_pretrained(sys.argv[1])
after = peak()
size = sum(keras.ops.size(weight) * 4 for weight in model.weights)
print((after - before) / float(size))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_peak_memory_of_loading_align_base(form, tmp_path):
    """Under 1.5 times the weights, above what the imported library takes."""
    vision = {"image_size": 289, "hidden_dim": 640}
    theirs = transformers.AlignModel(transformers.AlignConfig(vision_config=vision))
    if form == "safetensors":
        theirs.save_pretrained(tmp_path)
    else:
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    del theirs
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5
