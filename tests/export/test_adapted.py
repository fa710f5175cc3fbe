"""What Keras's LoRA made of a model is exported; what cannot be had leaves nothing behind."""

import os

import keras
import numpy as np
import pytest

from align_tf import AlignModel, AlignProcessor, AlignTokenizer

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

import tensorflow as tf

from align_tf import export_litert, export_onnx, export_saved_model
from align_tf.export import litert, onnx, saved_model


@pytest.mark.slow
def test_an_adapted_model_is_exported_as_it_computes(checkpoint, processor, tmp_path):
    model = AlignModel.from_pretrained(checkpoint)
    tokenizer = AlignTokenizer(processor.tokenizer.vocab, model_max_length=16)
    processor = AlignProcessor(processor.image_processor, tokenizer)
    texts = ["a red picture", "blue"]
    plain = model.get_text_features(processor(text=texts, padding="longest"))
    rng = np.random.default_rng(0)
    for block in model.text_model.blocks:
        for layer in (block.attention.query, block.attention.value):
            layer.enable_lora(2)
            layer.lora_kernel_b.assign(rng.normal(0, 0.5, layer.lora_kernel_b.shape))
    expected = model.get_text_features(processor(text=texts, padding="longest")).numpy()
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    plain /= np.linalg.norm(plain, axis=-1, keepdims=True)
    assert (expected * plain).numpy().sum(-1).max() < 0.99
    folder = export_saved_model(model, processor, tmp_path)
    served = tf.saved_model.load(os.fspath(folder)).signatures["embed_text"]
    got = served(texts=tf.constant(texts))["text_embeds"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("export", [export_saved_model, export_litert, export_onnx])
def test_where_nothing_can_be_written_is_told_first(
    export, tiny_config, processor, tmp_path, monkeypatch
):
    monkeypatch.setattr(saved_model, "inference_copy", None)  # not to be come to
    monkeypatch.setattr(litert, "plain_copy", None)
    monkeypatch.setattr(onnx, "plain_copy", None)
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "align"):
        with pytest.raises(FileExistsError, match=f"{tmp_path}/file: a file; expected a folder"):
            export(AlignModel(tiny_config), processor, directory)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("export", [export_saved_model, export_litert, export_onnx])
def test_a_model_of_which_nothing_but_nan_comes_is_told(export, tiny_config, processor, tmp_path):
    model = AlignModel(tiny_config)
    model.text_model.blocks[0].intermediate.bias.assign(np.full(20, np.nan))
    with pytest.raises(ValueError, match="layer_0/intermediate/bias holds NaN or infinity"):
        export(model, processor, tmp_path / "new" / "align")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_float16_cannot_hold_leaves_no_folder(tiny_config, processor, tmp_path):
    model = AlignModel(tiny_config)
    model.text_model.blocks[0].intermediate.bias.assign(np.full(20, 70000.0))
    with pytest.raises(ValueError, match="layer_0/intermediate/bias reaches 70000, float16 only"):
        export_saved_model(model, processor, tmp_path / "new" / "align", dtype="float16")
    assert list(tmp_path.iterdir()) == []
