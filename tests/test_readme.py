"""The examples and commands of the README run, on align-tiny."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import keras
import numpy as np
import pytest
from PIL import Image

from align_tf.cli.main import main
from align_tf.hub import BUNDLED

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A folder with what the examples read is the working directory; what they define."""
    monkeypatch.chdir(tmp_path)
    example = next((BUNDLED["align-tiny"] / "examples").glob("*.png"))
    Image.open(example).convert("RGB").save("photo.jpg")
    (tmp_path / "pets").mkdir()
    for name, caption in (("a", "a cat"), ("b", "a dog")):
        shutil.copy("photo.jpg", f"pets/{name}.jpg")
        (tmp_path / "pets" / f"{name}.txt").write_text(caption)
    return {}


def examples():
    found = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    order = ("classify", "data", "fine_tune", "search", "export", "client", "phone", "onnx")
    return dict(zip(order, found, strict=True))


def ask(server, example, names):
    exec(example.replace("8501", str(server.rest_port)), names)
    assert names["result"].probs.shape == (1, 2)
    assert names["embedding"].shape == (192,)


def test_python_examples_run(names, tiny_server):
    pytest.importorskip("faiss")
    example = examples()
    exec(example["classify"], names)
    assert names["outputs"].logits_per_image.shape == (1, 2)
    exec(example["data"], names)
    assert len(names["validation"]) == 1
    exec(example["search"], names)
    assert [pathlib.Path(hit.path).stem for hit in names["hits"]] in (["a", "b"], ["b", "a"])
    ask(tiny_server, example["client"], names)


@pytest.mark.slow
def test_python_examples_train_and_export(names, tmp_path):
    pytest.importorskip("tensorflow_serving")
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("onnxruntime")
    from align_tf.server import ModelServer

    example = examples()
    for name in ("classify", "data", "fine_tune"):
        exec(example[name], names)
    assert (tmp_path / "my-align" / "model.safetensors").is_file()
    exec(example["export"], names)
    with ModelServer("models/align", model_name="align") as server:
        ask(server, example["client"], names)
    shutil.rmtree("models")
    readme = README.read_text(encoding="utf-8")
    for heading, name in (("On a phone", "phone"), ("In ONNX Runtime", "onnx")):
        command = readme.partition(f"## {heading}")[2].partition("```sh\n")[2].partition("\n")[0]
        assert main(shlex.split(command)[1:]) == 0
        exec(example[name], names)
        names[name] = names["tower"]
    pixels = names["inputs"]["pixel_values"].numpy()
    on_phone = names["phone"](pixel_values=pixels)["image_embeds"]
    np.testing.assert_allclose(names["embeds"] @ on_phone.T, [[1]], atol=1e-3)


@pytest.mark.slow
def test_an_export_runs_in_plain_tensorflow(tiny_export):
    readme = README.read_text(encoding="utf-8")
    command = readme.partition('\npython -c "import tensorflow_text')[2].partition("```")[0]
    command = 'python -c "import tensorflow_text' + command.replace("\\\n", " ")
    command = command.replace("models/align", str(tiny_export))
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True, check=False
    )
    assert "Result for output key text_embeds:" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_the_commands_of_search_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    section = README.read_text(encoding="utf-8").partition("## Search a collection")[2]
    commands = section.partition("```sh\n")[2].partition("```")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BUNDLED["align-tiny"] / "examples", "photos")
    for command in commands:
        program, *arguments = shlex.split(command)
        assert (program, main(arguments)) == ("align-tf", 0), command
    assert "panda" in capsys.readouterr().out
    assert pathlib.Path("found.png").is_file()


def test_the_command_that_serves_runs(tmp_path, monkeypatch, keep_port):
    """It listens on loopback with the files, metrics, health and limits that are told of it."""
    from align_tf.server import ModelServer

    section = README.read_text(encoding="utf-8").partition("`align-tf serve` is for one machine")[2]
    command = section.partition("```sh\n")[2].partition("```")[0].replace("\\\n", " ")
    program, *arguments = shlex.split(command)
    ports = ["--grpc-port", str(keep_port()), "--rest-port", str(keep_port())]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pathlib.Path(__file__).parent / "goldens/tf_serving/probe", "models/align")
    pathlib.Path("batching.txt").write_text("max_batch_size { value: 2 }")
    pathlib.Path("monitoring.txt").write_text("prometheus_config { enable: true }")
    seen = []

    def wait(server, announce):
        url = f"http://127.0.0.1:{server.rest_port}"
        with urllib.request.urlopen(f"{url}/monitoring/prometheus/metrics") as answer:
            seen.append(answer.status)
        with urllib.request.urlopen(f"{url}/v1/models/align") as answer:
            seen.append("AVAILABLE" in answer.read().decode())
        rows = {"instances": [[1, 2, 3, 4]] * 3}
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{url}/v1/models/align:predict", json.dumps(rows).encode())
        seen.append(json.loads(error.value.read())["error"])
        seen.append(server._gate.limits.max_concurrent_requests)

    monkeypatch.setattr(ModelServer, "wait", wait)
    assert (program, main([*arguments, *ports])) == ("align-tf", 0)
    too_large = "Task size 3 is larger than maximum input batch size 2"
    assert seen == [200, True, too_large, 64]
