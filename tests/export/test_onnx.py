"""The towers as ONNX files: the model's embeddings in two runtimes, and the files beside."""

import dataclasses
import functools
import importlib.util
import json

import keras
import numpy as np
import pytest

from align_tf import AlignConfig, AlignModel, AlignProcessor, export_onnx
from align_tf.cli.main import main
from align_tf.export import onnx as onnx_export
from align_tf.hub import BUNDLED

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

IMAGE, TEXT, INT8_TEXT = "vision_model.onnx", "text_model.onnx", "text_model_quantized.onnx"
CLOSE = 1e-5  # between embeddings of unit length, of two runtimes; measured: 3e-7
INT8_COSINE = 0.999  # of align-tiny's examples; measured: 0.9999

EXAMPLES = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))

# What a configuration may ask for: text, vision, joint.
CONFIGURATIONS = {
    "gelu, swish": ({}, {}, {}),
    "gelu_new, gelu, max, square padding": (
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2},
        {"hidden_act": "gelu", "pooling_type": "max", "depthwise_padding": [1]},
        {},
    ),
    "relu, mish, relative_key, projection": (
        {"hidden_act": "relu", "position_embedding_type": "relative_key", "type_vocab_size": 3},
        {"hidden_act": "mish", "squeeze_expansion_ratio": 0.5, "batch_norm_eps": 0.1},
        {"image_projection": True, "projection_dim": 5, "logit_bias_init_value": -3.0},
    ),
    "silu, selu, relative_key_query, pruned heads, even kernels": (
        {
            "hidden_act": "silu",
            "position_embedding_type": "relative_key_query",
            "pruned_heads": {0: [1], 1: [0, 2]},
        },
        {
            "hidden_act": "selu",
            "kernel_sizes": [4, 2],
            "depth_divisor": 4,
            "first_block_residual": True,
            "out_channels": [32, 24],
            "in_channels": [32, 32],
        },
        {"projection_dim": 8},
    ),
    "swish, relu, one layer, one block": (
        {"hidden_act": "swish", "num_hidden_layers": 1},
        {
            "hidden_act": "relu",
            **{"kernel_sizes": [3], "in_channels": [32], "out_channels": [24], "strides": [2]},
            **{"num_block_repeats": [1], "expand_ratios": [3]},
        },
        {},
    ),
}


def unlike_new(config, **options):
    """Returns a model whose BatchNorms have statistics that matter, as a trained model's do."""
    keras.utils.set_random_seed(0)
    model, rng = AlignModel(config, **options), np.random.default_rng(0)
    for weight in model.vision_model.weights:
        if "_bn/" in weight.path:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def changed(config, text, vision, joint):
    values = config.to_dict()
    values["text_config"] |= text
    values["vision_config"] |= vision
    return AlignConfig.from_dict({**values, **joint})


def some_pixels(count, height, width):
    """Pixels with the channels last."""
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (count, height, width, 3)).astype("float32")


def some_tokens(count, length, words=40):
    ids = np.random.default_rng(0).integers(1, words, (count, length))
    types = np.arange(length)[None] % 2 + 0 * ids
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}


def unit(features):
    features = keras.ops.convert_to_numpy(features)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def in_onnxruntime(folder, file):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more would spin between calls, beside other tests
    session = onnxruntime.InferenceSession(folder / file, options)
    return lambda inputs: session.run(None, inputs)[0]


@functools.cache
def core():
    """Opens OpenVINO, for as long as the process lives.

    Where another thread lets go of it, as Python's collector may, the main thread is left with a
    stack for signals that is no more, and the next signal ends the process.
    """
    import openvino

    return openvino.Core()


def in_openvino(folder, file):
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core().compile_model(folder / file, "CPU", settings)
    return lambda inputs: compiled(inputs)[0]


absent_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)
in_each_runtime = pytest.mark.parametrize(
    "run", [in_onnxruntime, pytest.param(in_openvino, marks=(absent_openvino, pytest.mark.slow))]
)


def assert_images_are_the_models(model, tower, pixels):
    embeds = tower({"pixel_values": pixels.transpose(0, 3, 1, 2)})
    expected = unit(model.get_image_features(pixels))
    np.testing.assert_allclose(embeds, expected, atol=CLOSE, rtol=0)


def assert_texts_are_the_models(model, tower, tokens):
    expected = unit(model.get_text_features({k: v.astype("int32") for k, v in tokens.items()}))
    np.testing.assert_allclose(tower(tokens), expected, atol=CLOSE, rtol=0)


@in_each_runtime
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_embeddings_are_the_models(run, name, tiny_config, processor, tmp_path):
    model = unlike_new(changed(tiny_config, *CONFIGURATIONS[name]))
    folder = export_onnx(model, processor, tmp_path / "onnx")
    for file in (IMAGE, TEXT):
        onnx.checker.check_model(folder / file, full_check=True)
    tokens = some_tokens(3, 16)
    tokens["attention_mask"][1, 5:] = 0
    tokens["attention_mask"][2] = 0  # attends evenly
    images, texts = run(folder, IMAGE), run(folder, TEXT)
    assert_images_are_the_models(model, images, some_pixels(1, 16, 16))
    assert_images_are_the_models(model, images, some_pixels(3, 21, 18))
    assert_texts_are_the_models(model, texts, some_tokens(1, 1))
    assert_texts_are_the_models(model, texts, tokens)


@pytest.fixture(scope="module")
def tiny():
    return AlignModel.from_pretrained("align-tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    assert main(["export", "--format", "onnx", "--output", str(folder)]) == 0
    return folder


@in_each_runtime
def test_align_tiny_takes_other_sizes_and_lengths(run, tiny, folder):
    images, texts = run(folder, IMAGE), run(folder, TEXT)
    assert_images_are_the_models(tiny, images, some_pixels(3, 96, 96))
    assert_images_are_the_models(tiny, images, some_pixels(1, 289, 289))
    assert_texts_are_the_models(tiny, texts, some_tokens(1, 64, words=6000))
    assert_texts_are_the_models(tiny, texts, some_tokens(3, 7, words=6000))


def test_names_and_kinds_are_hugging_faces(folder):
    inputs, outputs = {}, {}
    for file in (IMAGE, TEXT):
        session = onnxruntime.InferenceSession(folder / file)
        inputs |= {row.name: (row.type, row.shape) for row in session.get_inputs()}
        outputs |= {row.name: (row.type, row.shape) for row in session.get_outputs()}
    tokens = ("tensor(int64)", ["batch_size", "sequence_length"])
    assert inputs == {
        "pixel_values": ("tensor(float)", ["batch_size", 3, "height", "width"]),
        "input_ids": tokens,
        "attention_mask": tokens,
        "token_type_ids": tokens,
    }
    embeds = ("tensor(float)", ["batch_size", 192])
    assert outputs == {"image_embeds": embeds, "text_embeds": embeds}


@pytest.mark.parametrize("file", [IMAGE, TEXT])
def test_operations_are_standard_and_named_by_their_place(folder, file):
    model = onnx.load(folder / file)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    place = {IMAGE: "vision_model/block_3/expand_conv/Conv"}
    place[TEXT] = "text_model/layer_1/attention/query/MatMul"
    assert place[file] in names


def test_what_a_runtime_needs_is_beside_the_towers(folder, tiny):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *(IMAGE, TEXT, "onnx.json", "config.json", "preprocessor_config.json"),
        *("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
    settings = json.loads((folder / "onnx.json").read_text())
    assert settings["temperature"] == float(keras.ops.convert_to_numpy(tiny.temperature))
    assert (settings["height"], settings["width"], settings["max_length"]) == (96, 96, 64)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["AlignModel"]
    inputs = AlignProcessor.from_pretrained(folder)(EXAMPLES, ["a rose"], return_tensors="np")
    pixels = inputs["pixel_values"].transpose(0, 3, 1, 2)
    embeds = in_onnxruntime(folder, IMAGE)({"pixel_values": pixels})
    expected = unit(tiny.get_image_features(inputs["pixel_values"]))
    np.testing.assert_allclose(embeds, expected, atol=CLOSE, rtol=0)


@pytest.mark.slow
def test_int8_keeps_the_winning_labels_in_a_third_of_the_size(tiny, folder, tmp_path, capsys):
    command = ["export", "--format", "onnx", "--quantize", "int8", "--output", str(tmp_path)]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "text_model_quantized.onnx: 2.2 MB, cosine to the model 0.9999" in captured.err
    assert "pre-process" not in captured.err
    assert json.loads((tmp_path / "onnx.json").read_text())["quantize"] == "int8"
    assert not (tmp_path / TEXT).exists()
    assert (tmp_path / IMAGE).read_bytes() == (folder / IMAGE).read_bytes()
    names = [path.stem.replace("_", " ") for path in EXAMPLES]
    inputs = AlignProcessor.from_pretrained(tmp_path)(EXAMPLES, [*names, "dog", "house", "clock"])
    expected = tiny(inputs)
    tokens = {
        name: keras.ops.convert_to_numpy(inputs[name]).astype("int64")
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    embeds = in_onnxruntime(tmp_path, INT8_TEXT)(tokens)
    exact = keras.ops.convert_to_numpy(expected.text_embeds)
    cosines = (embeds * exact).sum(-1)
    assert cosines.min() > INT8_COSINE and cosines.max() < 1 - 1e-6
    images = keras.ops.convert_to_numpy(expected.image_embeds)
    np.testing.assert_array_equal((images @ embeds.T).argmax(-1), (images @ exact.T).argmax(-1))
    assert (tmp_path / INT8_TEXT).stat().st_size < (folder / TEXT).stat().st_size / 3


@pytest.mark.parametrize("kind", ["lora", "int8", "mixed_bfloat16", "float16"])
def test_a_model_of_another_kind_is_written_as_it_computes(kind, tiny_config, processor, tmp_path):
    policy = kind if "float" in kind else None
    model = unlike_new(tiny_config, dtype=policy)
    tokens, pixels = some_tokens(3, 6), some_pixels(2, 16, 16)
    if kind == "int8":
        model({**tokens, "pixel_values": pixels})
        model.quantize("int8")
    if kind == "lora":
        for block in model.text_model.blocks:
            block.attention.value.enable_lora(2)
            b = block.attention.value.lora_kernel_b
            b.assign(np.random.default_rng(0).normal(0, 1, b.shape))
    folder = export_onnx(model, processor, tmp_path)
    close = {"lora": 1 - 1e-6, "int8": 0.995}.get(kind, 0.999)  # the others round as they compute
    texts = in_onnxruntime(folder, TEXT)(tokens) * unit(model.get_text_features(tokens))
    images = in_onnxruntime(folder, IMAGE)({"pixel_values": pixels.transpose(0, 3, 1, 2)})
    images = images * unit(model.get_image_features(pixels))
    assert min(texts.sum(-1).min(), images.sum(-1).min()) > close
    kinds = {weight.data_type for weight in onnx.load(folder / TEXT).graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_a_changed_layer_is_written_as_it_computes(tiny_config, processor, tmp_path):
    model = unlike_new(tiny_config)
    model.vision_model.blocks[0].activation = keras.activations.relu
    model.vision_model.blocks[1].project_bn.epsilon = 0.5
    model.text_model.blocks[0].output_norm.epsilon = 0.5
    folder = export_onnx(model, processor, tmp_path)
    assert_images_are_the_models(model, in_onnxruntime(folder, IMAGE), some_pixels(2, 16, 16))
    assert_texts_are_the_models(model, in_onnxruntime(folder, TEXT), some_tokens(2, 6))


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.slow
def test_weights_that_no_message_holds_are_in_a_file_beside(
    quantize, tiny_config, processor, tmp_path, monkeypatch
):
    monkeypatch.setattr(onnx_export, "LARGEST_MESSAGE", 1000)
    model = unlike_new(tiny_config)
    folder = export_onnx(model, processor, tmp_path, quantize=quantize)
    file = INT8_TEXT if quantize else TEXT
    assert (folder / f"{IMAGE}_data").stat().st_size > 1000
    graph, weights = sorted(folder.glob("text*"))
    assert (graph.name, weights.name) == (file, f"{file}_data")
    assert weights.stat().st_size > 1000
    assert_images_are_the_models(model, in_onnxruntime(folder, IMAGE), some_pixels(2, 16, 16))
    figures = onnx_export.compare_onnx(folder, model, processor)
    assert figures[IMAGE]["bytes"] == sum(path.stat().st_size for path in folder.glob("vision*"))
    assert figures[file]["cosine"] > (0.99 if quantize else 1 - 1e-5)


def test_no_tower_of_another_model_stays(tiny_config, processor, tmp_path):
    first = unlike_new(tiny_config)
    export_onnx(first, processor, tmp_path)
    (tmp_path / "notes.onnx").write_bytes(b"mine")
    export_onnx(first, processor, tmp_path, quantize="int8")
    towers = {"notes.onnx", IMAGE, TEXT, INT8_TEXT}
    assert {path.name for path in tmp_path.glob("*.onnx")} == towers
    export_onnx(AlignModel(tiny_config), processor, tmp_path, quantize="int8")
    assert {path.name for path in tmp_path.glob("*.onnx")} == towers - {TEXT}
    (tmp_path / "onnx.json").write_text("broken")
    export_onnx(first, processor, tmp_path)
    assert {path.name for path in tmp_path.glob("*.onnx")} == towers - {INT8_TEXT}


def test_a_failure_leaves_the_files_that_were_there(tiny_config, processor, tmp_path):
    (tmp_path / IMAGE).write_bytes(b"old")
    model = AlignModel(tiny_config)
    with pytest.raises(ValueError, match="quantize='int4'"):
        export_onnx(model, processor, tmp_path, quantize="int4")
    model.vision_model.blocks[0].activation = lambda x: x
    with pytest.raises(ValueError, match=r"block_0/.*activation: activation <.*ONNX export"):
        export_onnx(model, processor, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [IMAGE]
    assert (tmp_path / IMAGE).read_bytes() == b"old"
    model = AlignModel(tiny_config)
    export_onnx(model, processor, tmp_path)
    assert_images_are_the_models(model, in_onnxruntime(tmp_path, IMAGE), some_pixels(1, 16, 16))


def test_statistics_of_which_nothing_but_nan_comes_are_told(tiny_config, processor, tmp_path):
    model = AlignModel(tiny_config)
    norm = model.vision_model.stem_bn
    norm.moving_variance.assign(np.full(norm.moving_variance.shape, -1.0))
    with pytest.raises(ValueError, match="stem_conv/kernel holds NaN or infinity"):
        export_onnx(model, processor, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoints_folder_is_left_alone(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"a checkpoint, of model\.safetensors; expected"):
        export_onnx(model, processor, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    export_onnx(model, processor, tmp_path / "onnx")
    assert AlignModel.from_pretrained(tmp_path).config == dataclasses.replace(
        model.config, extra={**model.config.extra, **AlignConfig.from_pretrained(tmp_path).extra}
    )


def test_an_absent_package_is_named_before_anything_is_loaded(absent, capsys):
    command = ["export", "--format", "onnx", "--model", "nowhere", "--output", "x"]
    absent("onnxruntime")
    assert main([*command, "--quantize", "int8"]) == 2
    absent("onnx")
    assert main(command) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line == (
            'align-tf: error: ONNX export needs onnx and onnxruntime: pip install "align-tf[onnx]"'
        )
