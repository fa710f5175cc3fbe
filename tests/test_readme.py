"""The Python examples of the README run, in their order, on align-tiny."""

import pathlib
import re
import shutil

import keras
import pytest

from align_tf.checkpoint import BUNDLED

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_python_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_serving")
    from PIL import Image

    from align_tf.server import ModelServer

    classify, data, fine_tune, export, client = re.findall(
        r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    example = next((BUNDLED["align-tiny"] / "examples").glob("*.png"))
    Image.open(example).convert("RGB").save("photo.jpg")

    names = {}
    exec(classify, names)
    assert names["outputs"].logits_per_image.shape == (1, 2)
    for name, caption in (("a", "a cat"), ("b", "a dog")):
        (tmp_path / "pets").mkdir(exist_ok=True)
        shutil.copy("photo.jpg", f"pets/{name}.jpg")
        (tmp_path / "pets" / f"{name}.txt").write_text(caption)
    exec(data, names)
    assert len(names["validation"]) == 1
    exec(fine_tune, names)
    assert (tmp_path / "my-align" / "model.safetensors").is_file()
    exec(export, names)
    with ModelServer("models/align", model_name="align") as server:
        exec(client.replace("8501", str(server.rest_port)), names)
    assert names["result"].probs.shape == (1, 2)
    shutil.rmtree("models")
