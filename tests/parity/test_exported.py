"""The ONNX towers as users of transformers feed them: its processor, its layout, its embeddings."""

import numpy as np
import pytest

from align_tf import AlignModel, AlignProcessor, export_onnx
from align_tf.hub import BUNDLED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
onnxruntime = pytest.importorskip("onnxruntime")

EXAMPLES = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))


def test_what_transformers_prepares_gives_its_embeddings(tmp_path):
    from PIL import Image

    model = AlignModel.from_pretrained("align-tiny")
    export_onnx(model, AlignProcessor.from_pretrained("align-tiny"), tmp_path)
    images = [Image.open(path) for path in EXAMPLES]
    texts = [path.stem.replace("_", " ") for path in EXAMPLES]
    # Both from the folder of the export, as transformers' own classes read it.
    processor = transformers.AlignProcessor.from_pretrained(tmp_path)
    inputs = processor(images=images, text=texts, padding="longest", return_tensors="pt")
    theirs = transformers.AlignModel.from_pretrained(BUNDLED["align-tiny"], dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs.eval()(**inputs)
    feed = {name: value.numpy() for name, value in inputs.items()}
    for file, output in (("vision_model.onnx", "image_embeds"), ("text_model.onnx", "text_embeds")):
        session = onnxruntime.InferenceSession(tmp_path / file)
        values = {row.name: feed[row.name] for row in session.get_inputs()}  # as they are
        (embeds,) = session.run([output], values)
        unit = torch.nn.functional.normalize(expected[output]).numpy()
        np.testing.assert_allclose(embeds, unit, atol=1e-5, rtol=0)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "align"
