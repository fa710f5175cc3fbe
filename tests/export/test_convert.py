"""Conversion between formats: the same model comes out, and nothing half-made or lost."""

import dataclasses
import json
import pathlib
import zipfile

import keras
import numpy as np
import pytest
import safetensors.numpy
from keras import ops

from align_tf import AlignImageProcessor, AlignModel, AlignProcessor
from align_tf.cli.main import main
from align_tf.export import convert as convert_module
from align_tf.export.convert import convert
from align_tf.files import CheckpointError

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

B3 = pathlib.Path(__file__).parents[1] / "goldens" / "coyo_align" / "b3-narrow"
HEADS = {"text_config": {"num_attention_heads": 2}}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "cat", "dog"]


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory) -> pathlib.Path:
    """A checkpoint folder with everything in it: not to be written to."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("folder")
    AlignModel(tiny_config).save_pretrained(folder)
    AlignImageProcessor(size=20, crop_size=16).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory) -> pathlib.Path:
    """The same model as a .keras file."""
    path = tmp_path_factory.mktemp("file") / "tiny.keras"
    convert(folder, "keras", path)
    return path


def logits(model: AlignModel, pairs: dict[str, np.ndarray]) -> np.ndarray:
    return ops.convert_to_numpy(model(pairs).logits_per_image)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(capsys, *arguments):
    code = main(["convert", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- what comes out ------------------------------------------------------------------------


def test_there_and_back(folder, file, pairs, tmp_path):
    expected = logits(AlignModel.from_pretrained(folder), pairs)
    np.testing.assert_array_equal(logits(keras.saving.load_model(file), pairs), expected)
    convert(file, "hf", tmp_path / "hf", processor=folder)
    np.testing.assert_array_equal(
        logits(AlignModel.from_pretrained(tmp_path / "hf"), pairs), expected
    )
    assert names(tmp_path / "hf") == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    again = AlignProcessor.from_pretrained(tmp_path / "hf")
    assert again.image_processor.crop_size == {"height": 16, "width": 16}
    assert again.tokenizer.vocab == WORDS
    assert names(tmp_path) == ["hf"]  # no temporary folder stays


@pytest.mark.slow
def test_an_original_checkpoint_becomes_a_keras_file(tmp_path):
    path = tmp_path / "b3.keras"
    summary = convert(B3, "keras", path, config=HEADS)
    assert summary == {
        "source": str(B3),
        "source_format": "original",
        "to": "keras",
        "output": str(path),
        "tensors": 565,
        "parameters": 431_737,
        "dtype": "float32",
        "unused": {
            "loss_i2t_tracker": 2,
            "loss_t2i_tracker": 2,
            "loss_tracker": 2,
            "optimizer": 824,
        },
        "dry_run": False,
        "notes": [],
    }
    model = keras.saving.load_model(path)
    arrays = np.load(B3 / "expected.npz")
    features = ops.convert_to_numpy(model.get_text_features(arrays["input_ids"].astype("int32")))
    np.testing.assert_allclose(features[:3], arrays["text_features"][:3], atol=1e-5)
    assert model.config.image_projection


def test_the_dtype_of_a_folder(file, tmp_path):
    assert convert(file, "hf", tmp_path / "hf", dtype="bfloat16")["dtype"] == "bfloat16"
    stored = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    assert {str(a.dtype) for n, a in stored.items() if "num_batches" not in n} == {"bfloat16"}


def test_the_dtype_of_a_keras_file(folder, file, pairs, tmp_path):
    convert(file, "keras", tmp_path / "half.keras", dtype="float16")
    model = keras.saving.load_model(tmp_path / "half.keras")
    query = model.text_model.blocks[0].attention.query
    assert (query.kernel.dtype, query.compute_dtype) == ("float16", "float16")
    expected = logits(AlignModel.from_pretrained(folder), pairs)
    np.testing.assert_allclose(logits(model, pairs), expected, atol=0.1)


@pytest.mark.slow
def test_a_saved_model(file, folder, tmp_path):
    import tensorflow as tf

    summary = convert(file, "savedmodel", tmp_path / "align", processor=folder, dtype="float16")
    assert summary["output"] == str(tmp_path / "align" / "1")
    loaded = tf.saved_model.load(summary["output"])
    tokens = tf.constant([[2, 31, 3]], tf.int32)
    served = loaded.signatures["embed_tokens"](
        input_ids=tokens, attention_mask=tokens * 0 + 1, token_type_ids=tokens * 0
    )["text_embeds"]
    model = AlignModel.from_pretrained(folder)
    features = ops.convert_to_numpy(model.get_text_features(tokens))
    expected = features / np.linalg.norm(features)
    np.testing.assert_allclose(served, expected, atol=5e-3)
    assert np.abs(served - expected).max() > 0  # it is float16 that was written


def test_image_settings(folder, tmp_path):
    model = AlignModel.from_pretrained(folder)
    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.txt").write_text("\n".join(WORDS))
    for source, given, mode, expected in (
        (folder, None, None, ("hf", 16)),
        (folder, None, "original", ("original", 16)),
        (folder, words, None, ("hf", 16)),
        (None, words, None, ("hf", 289)),
    ):
        notes = []
        processor = convert_module._read_processor(source, given, mode, model, notes)
        images = processor.image_processor
        assert (images.mode, images.crop_size["height"]) == expected
        assert notes == ["no image settings in the source: those of align-base"] * (
            expected[1] == 289
        )


def test_without_a_tokenizer_the_weights_are_written_and_it_is_said(file, tmp_path):
    summary = convert(file, "hf", tmp_path / "hf")
    assert names(tmp_path / "hf") == ["config.json", "model.safetensors"]
    assert "tiny.keras: no tokenizer with it" in summary["notes"][0]


# --- what is refused -----------------------------------------------------------------------


def test_what_transformers_lacks_is_refused(tiny_config, tmp_path):
    vision = dataclasses.replace(tiny_config.vision_config, first_block_residual=True)
    for config, message in (
        (dataclasses.replace(tiny_config, image_projection=True), "no image projection"),
        (dataclasses.replace(tiny_config, vision_config=vision), "no residual in the first block"),
    ):
        AlignModel(config).save(tmp_path / "model.keras")
        with pytest.raises(ValueError, match=f"model.keras: transformers has {message}"):
            convert(tmp_path / "model.keras", "hf", tmp_path / "hf")
    assert names(tmp_path) == ["model.keras"]


def test_a_rule_of_residuals_that_changes_nothing_is_no_hindrance(tiny_config, tmp_path):
    vision = dataclasses.replace(
        tiny_config.vision_config, first_block_residual=True, strides=[2, 2]
    )
    AlignModel(dataclasses.replace(tiny_config, vision_config=vision)).save(tmp_path / "m.keras")
    convert(tmp_path / "m.keras", "hf", tmp_path / "hf")


def test_a_source_that_is_broken_is_refused_before_anything_is_written(file, folder, tmp_path):
    content = file.read_bytes()
    (tmp_path / "cut.keras").write_bytes(content[: len(content) // 2])
    (tmp_path / "noise.keras").write_bytes(b"\xff" * 64)
    keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)]).save(
        tmp_path / "other.keras"
    )
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in folder.iterdir():
        (cut / path.name).write_bytes(path.read_bytes()[:-10])
    (cut / "config.json").write_bytes((folder / "config.json").read_bytes())
    before = names(tmp_path)
    for source, message in (
        ("cut.keras", "cut.keras: not a whole .keras file"),
        ("noise.keras", "noise.keras: not a whole .keras file"),
        ("other.keras", "other.keras: expected an AlignModel, found Sequential"),
        ("cut", "model.safetensors: not a whole safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / source, "hf", tmp_path / "hf")
    with pytest.raises(FileNotFoundError, match=r"none.keras: no such file"):
        convert(tmp_path / "none.keras", "hf", tmp_path / "hf")
    assert names(tmp_path) == before


def test_a_class_that_is_no_model_of_ours_is_not_made(file, tmp_path):
    written = tmp_path / "written"
    call = {"module": "builtins", "class_name": "open", "config": [str(written), "w"]}
    lambdas = {"module": "keras.layers", "class_name": "Lambda", "config": {"function": call}}
    for name, config, message in (
        ("call", {**call, "registered_name": "open"}, "expected an AlignModel, found open"),
        ("layer", {**lambdas, "registered_name": None}, "expected an AlignModel, found Lambda"),
        ("liar", {**call, "class_name": "AlignModel", "registered_name": "x"}, "expected an Align"),
        ("list", [call], "not a whole .keras file"),
        ("deep", "[" * 100_000, "not a whole .keras file"),
    ):
        path = tmp_path / f"{name}.keras"
        with zipfile.ZipFile(file) as whole, zipfile.ZipFile(path, "w") as archive:
            text = config if isinstance(config, str) else json.dumps(config)
            archive.writestr("config.json", text)
            archive.writestr("metadata.json", whole.read("metadata.json"))
            archive.writestr("model.weights.h5", whole.read("model.weights.h5"))
        with pytest.raises(CheckpointError, match=f"{name}.keras: {message}"):
            convert(path, "hf", tmp_path / "hf")
        assert not written.exists()


def test_a_value_that_the_dtype_cannot_hold_is_named(folder, tmp_path):
    model = AlignModel.from_pretrained(folder)
    model.text_projection.bias.assign([0.0] * 7 + [70000.0])
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"text_projection/bias reaches 70000, float16 only 65504"):
        convert(tmp_path / "model.keras", "hf", tmp_path / "hf", dtype="float16")
    convert(tmp_path / "model.keras", "hf", tmp_path / "hf", dtype="bfloat16")


@pytest.mark.parametrize("mode", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_what_keras_made_of_the_layers_is_converted(mode, folder, pairs, tmp_path):
    keras.utils.set_random_seed(0)
    model = AlignModel.from_pretrained(folder)
    expected = model(pairs)
    if mode:
        model.quantize(mode)
    query = model.text_model.blocks[0].attention.query
    query.enable_lora(2)
    query.lora_kernel_b.assign(np.random.default_rng(0).normal(0, 1, (2, 16)))
    plain, expected = expected, model(pairs)
    assert np.sum(plain.text_embeds * expected.text_embeds, axis=-1).min() < 0.99
    model.save(tmp_path / "model.keras")
    for to, name, dtype in (("hf", "hf", None), ("keras", "half.keras", "bfloat16")):
        summary = convert(tmp_path / "model.keras", to, tmp_path / name, dtype=dtype)
        assert (summary["tensors"], summary["parameters"]) == (99, 7311)
    half = keras.saving.load_model(tmp_path / "half.keras")
    assert {layer.quantization_mode for layer in half._flatten_layers()} == {None}
    for again in (AlignModel.from_pretrained(tmp_path / "hf"), half):
        assert np.sum(again(pairs).text_embeds * expected.text_embeds, axis=-1).min() > 0.998


def test_images_too_small_for_the_model_are_refused(file, folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    (small / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    AlignImageProcessor(size=3, crop_size=3).save_pretrained(small)
    with pytest.raises(ValueError, match=r"small: the processor's images are 3 pixels high: the"):
        convert(file, "hf", tmp_path / "hf", processor=small)
    assert names(tmp_path) == ["small"]


def test_a_vocabulary_beyond_the_embeddings_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match=r"align-tiny: a vocabulary of 6000 .* the model knows 40"):
        convert(file, "hf", tmp_path / "hf", processor="align-tiny")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "onnx"}, "to='onnx': expected one of hf, keras, savedmodel"),
        ({"to": "keras"}, "expected the name of a file that ends in .keras"),
        ({"to": "savedmodel"}, "no tokenizer with it; a SavedModel takes raw strings"),
        ({"dtype": "int8"}, "dtype='int8': expected one of float32, float16, bfloat16"),
        ({"config": {}}, "a .keras file holds its configuration"),
    ],
)
def test_settings_that_make_no_sense(settings, message, file, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(**{"source": file, "to": "hf", "output": tmp_path / "out", **settings})
    assert names(tmp_path) == []


# --- what is there already -----------------------------------------------------------------


def test_an_output_is_replaced_only_on_demand(file, folder, tmp_path):
    output = tmp_path / "hf"
    convert(file, "hf", output)
    (output / "README.md").write_text("mine")
    (output / "model.safetensors").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="hf: the folder is not empty; --overwrite replaces"):
        convert(file, "hf", output)
    assert (output / "model.safetensors").read_bytes() == b"old"
    convert(file, "hf", output, overwrite=True)
    assert (output / "README.md").read_text() == "mine"
    AlignModel.from_pretrained(output)

    copy = tmp_path / "copy.keras"
    copy.write_bytes(b"old")
    with pytest.raises(FileExistsError, match=r"copy\.keras: it is there already"):
        convert(folder, "keras", copy)
    assert copy.read_bytes() == b"old"
    convert(folder, "keras", copy, overwrite=True)
    keras.saving.load_model(copy)
    for to in ("hf", "savedmodel"):
        with pytest.raises(FileExistsError, match=r"copy\.keras: a file; expected a folder"):
            convert(folder, to, copy, overwrite=True)


def test_a_write_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(convert_module.AlignProcessor, "save_pretrained", fails)
    with pytest.raises(OSError, match="no space left"):
        convert(folder, "hf", tmp_path / "hf")
    assert names(tmp_path) == []


def test_outputs_get_the_usual_rights(folder, file, tmp_path):
    (tmp_path / "probe").touch()
    (tmp_path / "folder").mkdir()
    convert(folder, "hf", tmp_path / "hf")
    for usual, made in (
        (tmp_path / "folder", tmp_path / "hf"),
        (tmp_path / "probe", tmp_path / "hf" / "model.safetensors"),
        (tmp_path / "probe", file),
    ):
        assert made.stat().st_mode == usual.stat().st_mode


# --- the command ---------------------------------------------------------------------------


def test_the_command_prints_a_summary(capsys, folder, tmp_path):
    arguments = ("--from", folder, "--to", "hf", "--output", tmp_path / "hf")
    code, out, err = run(capsys, *arguments, "--dtype", "bfloat16")
    assert code == 0
    assert out.splitlines() == [
        f"from        {folder} (hf)",
        f"to          {tmp_path / 'hf'} (hf)",
        "tensors     99",
        "parameters  7,311",
        "dtype       bfloat16",
        "unused      num_batches_tracked (9)",
    ]
    assert err == f"Converting {folder} ...\n"


def test_a_dry_run_writes_nothing(capsys, folder, tmp_path):
    arguments = ("--from", folder, "--output", tmp_path / "out", "--dry-run")
    code, out, _ = run(capsys, *arguments, "--to", "savedmodel", "--json")
    summary = json.loads(out)
    assert (code, summary["dry_run"], summary["tensors"]) == (0, True, 99)
    code, out, _ = run(capsys, *arguments, "--to", "hf")
    assert (code, out.splitlines()[-1]) == (0, "dry run     nothing was written")
    assert names(tmp_path) == []


def test_the_command_reads_keys_of_the_config(capsys, tmp_path):
    (tmp_path / "heads.json").write_text(json.dumps(HEADS))
    arguments = ("--from", B3 / "model-weights", "--output", tmp_path / "b3.keras")
    code, out, err = run(capsys, *arguments, "--to", "keras", "--dry-run")
    assert (code, out) == (2, "")
    assert "give a config with" in err.splitlines()[-1]
    config = ("--config", tmp_path / "heads.json")
    code, out, _ = run(capsys, *arguments, "--to", "keras", "--dry-run", "--json", *config)
    assert (code, json.loads(out)["source_format"]) == (0, "original")
    code, out, err = run(capsys, *arguments[:2], "--output", tmp_path / "h", "--to", "hf", *config)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("align-tf: error:") and "no image projection" in err


def test_a_mistake_ends_in_one_line(capsys, folder, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "kept").touch()
    code, out, err = run(capsys, "--from", folder, "--to", "hf", "--output", tmp_path / "hf")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("align-tf: error:") and "not empty" in err
    assert names(tmp_path / "hf") == ["kept"]


def test_an_adapter_is_converted_with_the_model_that_it_names(capsys, folder, pairs, tmp_path):
    model = AlignModel.from_pretrained(folder)
    model.enable_lora(2)
    for weight in model.trainable_weights:
        weight.assign(np.random.default_rng(0).normal(0, 0.3, weight.shape))
    model.save_adapter(tmp_path / "adapter")
    code, _, err = run(
        capsys, "--from", tmp_path / "adapter", "--to", "hf", "--output", tmp_path / "whole"
    )
    assert (code, "error" in err) == (0, False)
    assert names(tmp_path / "whole") == [
        *("config.json", "model.safetensors", "preprocessor_config.json"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ]
    again = AlignModel.from_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(logits(again, pairs), logits(model, pairs), rtol=1e-4, atol=1e-4)
