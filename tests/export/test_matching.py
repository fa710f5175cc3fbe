"""What a model and a processor that do not fit are told, by each export and before it writes."""

import dataclasses
import os

import keras
import pytest

from align_tf import AlignImageProcessor, AlignModel, AlignProcessor, AlignTextModel, AlignTokenizer

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

import tensorflow as tf

from align_tf import AlignConfig, export_litert, export_onnx, export_saved_model
from align_tf.export import saved_model
from align_tf.export.matching import check_fit

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


def processor_of(words=VOCAB, **settings):
    images = AlignImageProcessor(**{"size": 20, "crop_size": 16, **settings})
    return AlignProcessor(images, AlignTokenizer(list(words)))


@pytest.mark.parametrize("export", [export_saved_model, export_litert, export_onnx])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": [*VOCAB, *(f"w{i}" for i in range(10))]}, "a vocabulary of 41 words, the model"),
        ({"crop_size": {"height": 3, "width": 16}}, "images are 3 pixels high: the model takes 4"),
        ({"crop_size": {"height": 16, "width": 1}}, "images are 1 pixels wide: the model takes 4"),
        ({"do_rescale": False}, "pixel_values reach 255: the model takes 32 at most; expected do_"),
    ],
)
def test_a_processor_of_another_model_is_told(export, change, message, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(AlignModel(tiny_config), processor_of(**change), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("export", [export_saved_model, export_litert, export_onnx])
def test_what_is_no_model_or_no_processor_is_told(export, tiny_config, tmp_path):
    tower, processor = AlignTextModel(tiny_config.text_config), processor_of()
    with pytest.raises(ValueError, match="AlignTextModel: expected an AlignModel"):
        export(tower, processor, tmp_path / "out")
    with pytest.raises(ValueError, match="AlignTokenizer: expected an AlignProcessor"):
        export(AlignModel(tiny_config), processor.tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_grey_images_are_no_colour_images(tiny_config):
    vision = dataclasses.replace(tiny_config.vision_config, num_channels=1)
    model = AlignModel(dataclasses.replace(tiny_config, vision_config=vision))
    with pytest.raises(ValueError, match="images have 3 channels, the model takes 1"):
        check_fit(model, processor_of())


def test_the_least_side_is_the_one_that_the_tower_takes(tiny_config):
    assert AlignConfig.from_preset("align-base").vision_config.least_side == 32
    square = dataclasses.replace(tiny_config.vision_config, depthwise_padding=[1])
    for vision, least in ((tiny_config.vision_config, 4), (square, 2)):
        assert vision.least_side == least
        model = AlignModel(dataclasses.replace(tiny_config, vision_config=vision))
        states = model.vision_model(keras.ops.ones((1, least, least, 3))).last_hidden_state
        assert states.shape == (1, 1, 1, 8)


def test_a_processor_that_fits_passes(tiny_config):
    model = AlignModel(tiny_config)
    check_fit(model, processor_of(crop_size=4))
    check_fit(model, processor_of(do_center_crop=False, do_resize=False))


def test_warmup_requests_are_of_a_size_that_fits(tiny_config, tmp_path, monkeypatch):
    prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    monkeypatch.setattr(saved_model, "make_signatures", lambda *_: {})
    images = AlignImageProcessor(size=50, crop_size={"height": 48, "width": 40})
    processor = AlignProcessor(images, AlignTokenizer(VOCAB))  # the configuration says 16
    text = dataclasses.replace(tiny_config.text_config, max_position_embeddings=5)
    model = AlignModel(dataclasses.replace(tiny_config, text_config=text))
    folder = export_saved_model(model, processor, tmp_path)
    path = os.fspath(folder / "assets.extra" / saved_model.WARMUP_NAME)
    shapes = {}
    for record in tf.data.TFRecordDataset(path):
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        shapes.update({k: tf.make_ndarray(tensor).shape for k, tensor in request.inputs.items()})
    assert (shapes["pixel_values"], shapes["input_ids"]) == ((1, 48, 40, 3), (1, 5))
