"""The original training code's checkpoints, by way of this project, in transformers."""

import pathlib

import numpy as np
import pytest
from keras import ops

from align_tf import AlignVisionModel
from align_tf.export.convert import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

B7 = pathlib.Path(__file__).parents[1] / "goldens" / "coyo_align" / "b7-narrow"
# The narrow tower keeps its 8 channels in the first block. The original gives that block a
# residual for it and transformers does not, as it has no need to at the width of B0 to B7.
CONFIG = {
    "text_config": {"num_attention_heads": 4},
    "vision_config": {"first_block_residual": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("b7") / "hf"
    convert(B7, "hf", folder, config=CONFIG)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    model, report = transformers.AlignModel.from_pretrained(folder, output_loading_info=True)
    assert {key: list(found) for key, found in report.items() if found} == {}
    return model.eval()


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def test_transformers_gives_the_texts_of_the_original(theirs):
    arrays = np.load(B7 / "expected.npz")
    names = ("input_ids", "attention_mask", "token_type_ids")
    tokens = {name: torch.from_numpy(arrays[name].astype("int64")) for name in names}
    with torch.no_grad():
        states = theirs.text_model(**tokens).last_hidden_state[:, 0]
        features = theirs.text_projection(states).numpy()
    np.testing.assert_allclose(unit(features), unit(arrays["text_features"]), atol=1e-5)
    assert theirs.temperature.item() == arrays["temperature"].astype("float32")


def test_transformers_gives_our_images(theirs, folder):
    """All 55 blocks, in float64: the random weights amplify what float32 rounds off."""
    image = np.load(B7 / "expected.npz")["image"].astype("float64") / 127.5 - 1
    ours = AlignVisionModel.from_pretrained(folder, dtype="float64")
    expected = ops.convert_to_numpy(ours(image).pooler_output)
    with torch.no_grad():
        pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
        actual = theirs.vision_model.double()(pixels).pooler_output.numpy()
    np.testing.assert_allclose(unit(actual), unit(expected), atol=1e-6)


def test_what_transformers_would_compute_otherwise_is_refused(tmp_path):
    with pytest.raises(ValueError, match="transformers has no residual in the first block"):
        convert(B7, "hf", tmp_path / "hf", config={"text_config": CONFIG["text_config"]})
