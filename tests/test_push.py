"""Models, processors, adapters and exports go to a hub over HTTP with a card, and come back."""

import base64
import hashlib
import http.server
import json
import shutil
import threading

import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from keras import ops

from align_tf import AlignModel, AlignProcessor
from align_tf.cli.main import main

COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub of one commit: takes files, and gives them again."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, parts = self.server, self.path.partition("?")[0].split("/")
        hub.tokens.append(self.headers.get("Authorization"))
        if hub.refuses:
            self.answer(403, {"error": "You have no rights here"})
        elif parts[-1] == "create":
            hub.created.append(json.loads(body))
            self.answer(200, {"url": f"{hub.url}/{json.loads(body).get('organization')}/mine"})
        elif "preupload" in parts:
            files = [{**file, "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "commit" not in parts:  # of the card's header: nothing is wrong
            self.answer(200, {"errors": [], "warnings": []})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.files[line["value"]["path"]] = content
                else:
                    hub.messages.append(line["value"]["summary"])
            url = f"{hub.url}/me/mine/commit/{COMMIT}"
            self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        if "/resolve/" in path:
            content = hub.files.get(path.partition("/resolve/")[2].partition("/")[2])
            if content is None:
                self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            digest = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
            return
        files = [{"rfilename": name} for name in hub.files]
        if "/tree/" in path:
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
                for name, content in hub.files.items()
            ]
            self.answer(200, files)
            return
        self.answer(200, {"id": "me/mine", "sha": COMMIT, "siblings": files})

    do_HEAD = do_GET

    def answer(self, code, values, headers=None):
        content = values if isinstance(values, bytes) else json.dumps(values).encode()
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.refuses, server.files, server.created = False, {}, []
        server.messages, server.tokens = [], []
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def logits(model, pairs):
    return ops.convert_to_numpy(model(pairs).logits_per_image)


def header(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_model_and_its_processor_come_back(hub, checkpoint, pairs, tmp_path):
    model = AlignModel.from_pretrained(checkpoint)
    url = model.push_to_hub("me/mine", token="secret", private=True, commit_message="My model")
    assert url == f"{hub.url}/me/mine/commit/{COMMIT}"
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"]
    (made,) = hub.created
    assert (made["name"], made["organization"]) == ("mine", "me")
    assert made.get("private") or made["visibility"] == "private"  # as huggingface_hub's version
    assert (hub.messages, set(hub.tokens)) == (["My model"], {"Bearer secret"})
    processor = AlignProcessor.from_pretrained(checkpoint)
    processor.push_to_hub("me/mine", token="secret")
    again = AlignModel.from_pretrained("me/mine", cache_dir=tmp_path)
    np.testing.assert_array_equal(logits(again, pairs), logits(model, pairs))
    read = AlignProcessor.from_pretrained("me/mine", cache_dir=tmp_path)
    assert read.tokenizer.vocab == processor.tokenizer.vocab
    card = hub.files["README.md"].decode()
    assert header(card) == {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["align", "align-tf"],
    }
    assert 'AlignModel.from_pretrained("me/mine"), AlignProcessor.from_pre' in card
    assert "from transformers import AlignModel" in card


def test_an_adapter_comes_back(hub, checkpoint, pairs, tmp_path):
    model = AlignModel.from_pretrained(checkpoint)
    model.enable_lora(2)
    for weight in model.trainable_weights:
        weight.assign(np.random.default_rng(0).normal(0, 0.3, weight.shape))
    expected = logits(model, pairs)
    model.push_adapter_to_hub("me/mine", token="secret")
    assert sorted(hub.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert header(hub.files["README.md"].decode())["library_name"] == "peft"
    again = AlignModel.from_pretrained(checkpoint)
    again.load_adapter("me/mine", cache_dir=tmp_path)
    np.testing.assert_allclose(logits(again, pairs), expected, rtol=1e-5, atol=1e-5)
    whole = AlignModel.from_pretrained("me/mine", cache_dir=tmp_path)  # and the model it names
    np.testing.assert_allclose(logits(whole, pairs), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def trained(checkpoint, tmp_path):
    """A folder as a training leaves it, and the figures of it."""
    folder = tmp_path / "trained"
    shutil.copytree(checkpoint, folder)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").touch()
    (folder / "metrics.jsonl").touch()
    recipe = "model: kakaobrain/align-base\ndata: /secret/pairs\noutput: x\nsteps: 7\n"
    (folder / "recipe.yaml").write_text(recipe)
    figures = {"task": "retrieval", "images": 1000, "data": "/secret/flickr"}
    figures["metrics"] = {"r1_i2t": 0.4567, "r1_t2i": 0.1234}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    return folder


def test_a_base_that_is_here_alone_is_none_of_the_hub(tmp_path, capsys):
    def card(base):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        return main(["push", str(tmp_path), "me/mine", "--dry-run"]), *capsys.readouterr()

    code, out, _ = card("align-tiny")
    assert code == 0 and "base_model" not in header(out)
    assert 'model = AlignModel.from_pretrained("align-tiny")' in out
    assert 'AlignModel.from_pretrained("the model that it was trained on"), "me/mine")' in out
    code, _, err = card(3)
    assert code == 2
    assert err.endswith("adapter_config.json: base_model_name_or_path=3: expected a text\n")


def test_the_command_uploads_what_a_training_left(hub, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    options = ["--license", "apache-2.0", "--trained-on", "Pets of ours."]
    options += ["--figures", str(tmp_path / "figures.json")]
    assert main(["push", str(trained), "me/mine", *options, "--dry-run"]) == 0
    card = capsys.readouterr().out
    assert not hub.files and not (trained / "README.md").exists()
    assert main(["push", str(trained), "me/mine", *options]) == 0
    assert capsys.readouterr().out == f"{hub.url}/me/mine/commit/{COMMIT}\n"
    assert sorted(hub.files) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ]
    assert hub.files["README.md"].decode() == card
    assert header(card)["base_model"] == "kakaobrain/align-base"
    assert header(card)["license"] == "apache-2.0"
    for line in ("Pets of ours.", "retrieval, 1,000 images of flickr:", "| r1_i2t | 0.4567 |"):
        assert line in card.splitlines()
    assert "steps: 7\n```" in card
    assert "secret" not in card
    assert main(["push", str(trained), "me/mine", "--license", "mit"]) == 2
    assert "--license: of no use, as " in capsys.readouterr().err


def test_an_export_has_a_card_too(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "out" / "1").mkdir(parents=True)
    (tmp_path / "out" / "1" / "saved_model.pb").write_bytes(b"1")
    assert main(["push", str(tmp_path / "out"), "me/mine"]) == 0
    assert sorted(hub.files) == ["1/saved_model.pb", "README.md"]
    assert "align-tf serve exported" in hub.files["README.md"].decode()


def test_mistakes_are_told(hub, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")

    def said(*arguments):
        assert main(["push", *map(str, arguments)]) == 2
        (*_, line) = capsys.readouterr().err.splitlines()
        return line.removeprefix("align-tf: error: ")

    assert said(tmp_path / "none", "me/mine") == f"{tmp_path / 'none'}: no such folder"
    assert said(tmp_path, "me/mine").startswith(f"{tmp_path}: expected the folder of a checkpoint")
    assert said(trained, "me mine") == (
        "repo_id='me mine': expected an owner and a name, such as me/my-align"
    )
    assert said(trained, "me mine", "--dry-run").startswith("repo_id='me mine': expected an owner")
    assert said("gs://bucket/model", "me/mine").startswith(
        "gs://bucket/model: remote folders are not supported here"
    )
    (tmp_path / "figures.json").write_text("{}")
    (trained / "README.md").unlink(missing_ok=True)
    broken = said(trained, "me/mine", "--figures", tmp_path / "figures.json")
    assert broken.endswith("figures.json: expected what align-tf evaluate --output writes")
    (tmp_path / "figures.json").write_text('{"task": "knn", "metrics": {"top1": "high"}}')
    broken = said(trained, "me/mine", "--figures", tmp_path / "figures.json")
    assert broken.endswith("figures.json: expected what align-tf evaluate --output writes")
    recipe = (trained / "recipe.yaml").read_text()
    (trained / "recipe.yaml").write_text("a: [1")
    assert "recipe.yaml: not valid YAML" in said(trained, "me/mine")
    (trained / "recipe.yaml").write_text(recipe)
    hub.refuses = True
    line = said(trained, "me/mine")
    assert line.startswith("me/mine: the Hugging Face hub took nothing: ")
    assert "You have no rights here" in line
    assert not (trained / "README.md").exists()  # the next attempt may give a license
    (trained / "README.md").write_bytes("# Gr\u00fc\u00dfe".encode("cp1252"))
    assert main(["push", str(trained), "me/mine", "--dry-run"]) == 0
    assert capsys.readouterr().out == "# Gr\u00fc\u00dfe"
    (trained / "README.md").unlink()
