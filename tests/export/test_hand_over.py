"""A model on JAX is exported by one call, and the export embeds as the model does."""

import keras
import numpy as np
import pytest

from align_tf import AlignModel, AlignProcessor, export_saved_model
from align_tf.evaluation import Embedder
from align_tf.export import saved_model
from align_tf.hub import BUNDLED

if keras.backend.backend() != "jax":
    pytest.skip("from TensorFlow there is nothing to hand over", allow_module_level=True)

TEXTS = ["a picture of a rose", "two pandas, and a police car"]


def test_the_export_embeds_as_the_model_on_jax(tmp_path):
    import tensorflow as tf

    model = AlignModel.from_pretrained("align-tiny")
    # Weights that are on no disk: the export has them from the model.
    model.text_projection.kernel.assign(model.text_projection.kernel * 1.5 + 0.01)
    query = model.text_model.blocks[0].attention.query
    query.enable_lora(2)
    query.lora_kernel_b.assign(np.random.default_rng(0).normal(0, 0.5, query.lora_kernel_b.shape))
    processor = AlignProcessor.from_pretrained("align-tiny")
    assert export_saved_model(model, processor, tmp_path) == tmp_path / "1"
    pictures = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))[:2]
    inputs = processor(images=pictures, text=TEXTS)
    embedder = Embedder(model)

    signatures = tf.saved_model.load(str(tmp_path / "1")).signatures
    images = signatures["embed_image"](
        image_bytes=tf.constant([path.read_bytes() for path in pictures])
    )["image_embeds"]
    texts = signatures["embed_text"](texts=tf.constant(TEXTS))["text_embeds"]
    np.testing.assert_allclose(images, embedder.images(inputs["pixel_values"]), atol=1e-5)
    np.testing.assert_allclose(texts, embedder.texts(inputs), atol=1e-5)
    with pytest.raises(FileExistsError, match="this version is there already"):
        export_saved_model(model, processor, tmp_path, version=1)


def test_a_failure_on_tensorflow_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "EXPORT", "raise OSError('no space left on device')")
    processor = AlignProcessor.from_pretrained("align-tiny")
    with pytest.raises(RuntimeError, match=r"(?s)on TensorFlow failed:.*no space left on device"):
        export_saved_model(AlignModel.from_pretrained("align-tiny"), processor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_tensorflow_cannot_have_is_told_in_a_line(tmp_path):
    model = AlignModel.from_pretrained("align-tiny")
    processor = AlignProcessor.from_pretrained("align-tiny")
    layer = model.text_model.blocks[0]
    layer.intermediate.bias.assign(np.full(layer.intermediate.bias.shape, 70000.0))
    message = r"^text_model/layer_0/intermediate/bias reaches 70000, float16 only 65504: choose \w+"
    with pytest.raises(ValueError, match=message):
        export_saved_model(model, processor, tmp_path / "new", dtype="float16")
    layer.activation = keras.activations.relu
    message = r"^text_model.blocks\[0\]: activation <.*> is not what the configuration says"
    with pytest.raises(ValueError, match=message):
        export_saved_model(model, processor, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
