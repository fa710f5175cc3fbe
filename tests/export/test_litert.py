"""The towers as LiteRT files: the model's embeddings in ai-edge-litert, and the files beside."""

import json
import os

import keras
import numpy as np
import pytest

from align_tf import AlignImageProcessor, AlignModel, AlignProcessor, AlignTokenizer
from align_tf.cli.main import main
from align_tf.hub import BUNDLED

pytest.importorskip("ai_edge_litert")
if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.schema_py_generated import BuiltinOperator

from align_tf import export_litert
from align_tf.export.litert import IMAGE_TOWER, SETTINGS_NAME, TEXT_TOWER
from align_tf.preprocessing.tokenization import TOKEN_INPUTS

pytestmark = pytest.mark.slow  # the conversion, and reading what it wrote

CLOSE = 2e-6  # between embeddings of unit length, of the two runtimes; measured: 4e-7
INT8_COSINE = 0.9998  # of align-tiny's examples; measured: 0.99996 of images, 0.99998 of texts

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
EXAMPLES = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))


def unlike_new(model):
    """Gives BatchNorm statistics that matter, as those of a trained model do."""
    rng = np.random.default_rng(0)
    for layer in model.vision_model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.weights])
    return model


@pytest.fixture(scope="module")
def model(tiny_config):
    keras.utils.set_random_seed(0)
    return unlike_new(AlignModel(tiny_config))


@pytest.fixture(scope="module")
def processor():
    images = AlignImageProcessor(size=20, crop_size=16, do_normalize=True, image_std=(0.1, 0.2, 1))
    return AlignProcessor(images, AlignTokenizer(VOCAB))


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    return export_litert(model, processor, tmp_path_factory.mktemp("litert") / "phone")


def run(folder, file, **inputs):
    interpreter = Interpreter(os.fspath(folder / file))
    (output,) = interpreter.get_signature_runner()(**inputs).values()
    return output


def some_tokens(count, length, seed=0):
    ids = np.random.default_rng(seed).integers(1, 40, (count, length), "int32")
    types = np.arange(length, dtype="int32")[None] % 2 + 0 * ids
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}


def unit(features):
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("file", "signature", "inputs", "output"),
    [
        (IMAGE_TOWER, "embed_pixels", {"pixel_values": np.float32}, "image_embeds"),
        (TEXT_TOWER, "embed_tokens", dict.fromkeys(TOKEN_INPUTS, np.int32), "text_embeds"),
    ],
)
def test_signatures_are_those_of_the_saved_model(folder, file, signature, inputs, output):
    interpreter = Interpreter(os.fspath(folder / file))
    assert list(interpreter.get_signature_list()) == [signature]
    runner = interpreter.get_signature_runner()
    found = {name: detail["dtype"] for name, detail in runner.get_input_details().items()}
    assert found == inputs
    assert [d["dtype"] for d in runner.get_output_details().values()] == [np.float32]
    assert list(runner.get_output_details()) == [output]


@pytest.mark.parametrize("file", [IMAGE_TOWER, TEXT_TOWER])
def test_every_operation_is_built_in(folder, file):
    interpreter = Interpreter(
        os.fspath(folder / file),
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    names = {operation["op_name"] for operation in interpreter._get_ops_details()}
    assert names
    assert [name for name in names if not hasattr(BuiltinOperator, name)] == []


@pytest.mark.parametrize("count", [1, 3])
def test_images_get_the_models_embeddings(folder, model, count):
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, 16, 16, 3)).astype("float32")
    embeds = run(folder, IMAGE_TOWER, pixel_values=pixels)
    assert embeds.shape == (count, 8)
    np.testing.assert_allclose(embeds, unit(model.get_image_features(pixels)), atol=CLOSE)


@pytest.mark.parametrize("length", [2, 6, 16])
@pytest.mark.parametrize("count", [1, 3])
def test_texts_get_the_models_embeddings(folder, model, count, length):
    tokens = some_tokens(count, length)
    tokens["attention_mask"][-1, length // 2 :] = 0
    embeds = run(folder, TEXT_TOWER, **tokens)
    assert embeds.shape == (count, 8)
    np.testing.assert_allclose(embeds, unit(model.get_text_features(tokens)), atol=CLOSE)


def test_padding_has_no_effect(folder):
    short = some_tokens(2, 5)
    long = some_tokens(2, 16, seed=1)
    for name in ("input_ids", "token_type_ids"):
        long[name][:, :5] = short[name]
    assert np.abs(run(folder, TEXT_TOWER, **short) - run(folder, TEXT_TOWER, **long)).max() > 0.01
    long["attention_mask"][:, 5:] = 0
    np.testing.assert_allclose(
        run(folder, TEXT_TOWER, **short), run(folder, TEXT_TOWER, **long), atol=CLOSE
    )


def test_an_app_finds_what_it_needs_beside_the_towers(folder, model, processor):
    settings = json.loads((folder / SETTINGS_NAME).read_text())
    assert settings["temperature"] == float(model.temperature.value)
    assert (settings["height"], settings["width"], settings["max_length"]) == (16, 16, 16)
    assert "logit_bias" not in settings
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), "uint8")
    inputs = AlignProcessor.from_pretrained(folder)(
        picture, "a cat", images_kwargs={"do_resize": False}
    )
    by_hand = picture * np.array(settings["scale"]) + settings["offset"]
    np.testing.assert_allclose(inputs["pixel_values"][0], by_hand, atol=1e-5)
    assert inputs["input_ids"].numpy()[0, :4].tolist() == [2, 5, 6, 3]


def test_a_model_of_another_kind_is_written_in_float32(tiny_config, processor, tmp_path):
    config = type(tiny_config).from_dict(
        {**tiny_config.to_dict(), "image_projection": True, "logit_bias_init_value": -3.0}
    )
    model = unlike_new(AlignModel(config, dtype="mixed_bfloat16"))
    twin = AlignModel(config, dtype="float32")
    twin.set_weights(model.get_weights())
    export_litert(model, processor, tmp_path)
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype("float32")
    embeds = run(tmp_path, IMAGE_TOWER, pixel_values=pixels)
    np.testing.assert_allclose(embeds, unit(twin.get_image_features(pixels)), atol=CLOSE)
    assert json.loads((tmp_path / SETTINGS_NAME).read_text())["logit_bias"] == -3.0


@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_an_adapted_model_is_written_as_it_computes(tiny_config, processor, quantize, tmp_path):
    keras.utils.set_random_seed(0)
    model = AlignModel(tiny_config)
    tokens = some_tokens(3, 6)
    plain = unit(model.get_text_features(tokens).numpy())
    if quantize:
        model({**tokens, "pixel_values": np.ones((1, 16, 16, 3), "float32")})
        model.quantize("int8")
    for block in model.text_model.blocks:
        block.attention.value.enable_lora(2)
        b = block.attention.value.lora_kernel_b
        b.assign(np.random.default_rng(0).normal(0, 1, b.shape))
    expected = unit(model.get_text_features(tokens).numpy())
    assert (plain * expected).sum(-1).min() < 0.9
    export_litert(model, processor, tmp_path, quantize=quantize)
    embeds = run(tmp_path, TEXT_TOWER, **tokens)
    assert (embeds * expected).sum(-1).min() > (0.995 if quantize else 1 - 1e-5)


def test_a_failure_leaves_the_files_that_were_there(tiny_config, processor, tmp_path):
    (tmp_path / IMAGE_TOWER).write_bytes(b"old")
    with pytest.raises(ValueError, match="quantize='int4'"):
        export_litert(AlignModel(tiny_config), processor, tmp_path, quantize="int4")
    assert [path.name for path in tmp_path.iterdir()] == [IMAGE_TOWER]
    assert (tmp_path / IMAGE_TOWER).read_bytes() == b"old"


@pytest.fixture(scope="module")
def tiny_int8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    arguments = ["export", "--format", "litert", "--quantize", "int8", "--output", str(folder)]
    assert main(arguments) == 0
    return folder


def test_int8_keeps_the_winning_labels_in_a_quarter_of_the_size(tiny_int8):
    model = AlignModel.from_pretrained("align-tiny")
    names = [path.stem.replace("_", " ") for path in EXAMPLES]
    inputs = AlignProcessor.from_pretrained(tiny_int8)(EXAMPLES, [*names, "dog", "house", "clock"])
    expected = model(inputs)
    tokens = {name: inputs[name].numpy() for name in TOKEN_INPUTS}
    images = run(tiny_int8, IMAGE_TOWER, pixel_values=inputs["pixel_values"].numpy())
    texts = run(tiny_int8, TEXT_TOWER, **tokens)
    assert ((images * expected.image_embeds).numpy().sum(-1) > INT8_COSINE).all()
    assert ((texts * expected.text_embeds).numpy().sum(-1) > INT8_COSINE).all()
    winners = expected.logits_per_image.numpy().argmax(-1)
    np.testing.assert_array_equal((images @ texts.T).argmax(-1), winners)
    size = sum((tiny_int8 / file).stat().st_size for file in (IMAGE_TOWER, TEXT_TOWER))
    weights = [*model.vision_model.weights, *model.text_model.weights]
    assert size < 0.35 * sum(4 * np.prod(weight.shape) for weight in weights)
