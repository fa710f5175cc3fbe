"""The command line: results, machine-readable output, mistakes that end in one line."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import urllib.request

import keras
import numpy as np
import pytest
from PIL import Image

from align_tf.cli.main import main
from align_tf.hub import BUNDLED

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

TESTS = pathlib.Path(__file__).parents[1]
SERVING = TESTS.parent / "serving"
MODELS = TESTS / "goldens" / "tf_serving" / "models.config"
EXAMPLES = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_loads_nothing_heavy():
    script = (
        "import sys\n"
        "from align_tf.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'tensorflow', 'keras', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for command in ("quickstart", "classify", "train", "evaluate", "search", "export", "serve"):
        assert command in shown.stdout


def test_no_command_shows_help_and_fails(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "quickstart" in err


def test_classify_prints_json_with_probabilities_that_sum_to_one(capsys):
    labels = ["pizza", "rocket", "snake"]
    code, out, _ = run(capsys, "classify", *EXAMPLES[:2], "--json", "--labels", *labels)
    assert code == 0
    results = json.loads(out)
    assert [result["image"] for result in results] == [str(path) for path in EXAMPLES[:2]]
    for result in results:
        assert list(result["probs"]) == labels
        assert sum(result["probs"].values()) == pytest.approx(1.0, abs=1e-5)


def test_classify_takes_a_template_with_other_braces(capsys):
    template = ["--template", "{} in {x} {"]
    code, out, _ = run(
        capsys, "classify", EXAMPLES[0], "--json", "--labels", "pizza", "rocket", *template
    )
    assert code == 0 and list(json.loads(out)[0]["probs"]) == ["pizza", "rocket"]


def test_classify_prints_a_table(capsys):
    code, out, err = run(capsys, "classify", EXAMPLES[0], "--labels", "pizza", "rocket")
    assert code == 0
    assert "pizza" in out and "%" in out
    assert "Loading align-tiny" in err


def test_a_broken_image_is_named_and_the_others_are_answered(capsys, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(EXAMPLES[0].read_bytes()[:200])
    code, out, err = run(
        capsys, "classify", broken, EXAMPLES[0], "--json", "--labels", "pizza", "rocket"
    )
    assert code == 2
    assert [result["image"] for result in json.loads(out)] == [str(EXAMPLES[0])]
    assert "broken.png" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["classify", "none.png", "--labels", "a"], "none.png: no such file"),
        (["classify", __file__, "--labels", "a", "--template", "a photo"], "--template"),
        (["classify", __file__, "--labels", "a", "--model", "nowhere"], "'nowhere'"),
        (["evaluate", "--data", "./nowhere"], "./nowhere"),
        (["evaluate", "--data", "x", "--task", "knn", "--labels", "a"], "--labels"),
        (["evaluate", "--data", "x", "--train-data", "y"], "--train-data"),
        (["evaluate", "--data", "x", "--output", "."], "--output ."),
        (["export", "--model", "./nowhere", "--output", "x"], "./nowhere"),
        (["export", "--quantize", "int8", "--output", "x"], "--format litert"),
        (["export", "--format", "litert", "--dtype", "bfloat16", "--output", "x"], "--dtype"),
        (["serve"], "--model-config-file"),
        (["serve", "./nowhere"], "nowhere"),
    ],
)
def test_a_mistake_ends_in_one_line(capsys, arguments, expected):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and expected in last


def test_export_prints_the_folder_alone(capsys, checkpoint, tmp_path):
    code, out, _ = run(capsys, "export", "--model", checkpoint, "--output", tmp_path / "align")
    assert code == 0
    assert out.strip() == str(tmp_path / "align" / "1")
    assert (tmp_path / "align" / "1" / "saved_model.pb").is_file()


def test_quickstart_gives_the_same_answer_three_ways(capsys, tmp_path):
    pytest.importorskip("tensorflow_serving")
    code, out, _ = run(capsys, "quickstart", "--json", "--output", tmp_path)
    assert code == 0
    report = json.loads(out)
    assert report["saved_model"] == str(tmp_path / "1")
    assert len(report["results"]) == len(EXAMPLES) >= 6
    for row in report["results"]:
        assert row["grpc"] == pytest.approx(row["keras"], abs=1e-5)
        assert row["rest"] == pytest.approx(row["keras"], abs=1e-5)
    right = [row["label"].replace(" ", "_") == row["image"][:-4] for row in report["results"]]
    assert np.mean(right) >= 0.8


def test_serve_answers_as_its_flags_say_until_ctrl_c(capsys, monkeypatch):
    pytest.importorskip("tensorflow_serving")
    from align_tf.client import AlignClient, AlignServerError
    from align_tf.server import ModelServer

    seen, wait = {}, ModelServer.wait

    def ask(port, protocol, inputs):
        settings = {"model_name": "probe", "version_label": "stable", "protocol": protocol}
        with AlignClient(f"127.0.0.1:{port}", **settings) as client:
            return client.predict({"x": inputs})["y"].shape

    def asked_and_stopped(server, announce):
        def announce_and_stop():
            announce()
            seen["REST"] = ask(server.rest_port, "rest", np.ones((1, 4)))
            seen["gRPC"] = ask(server.grpc_port, "grpc", np.ones((1, 4)))
            with pytest.raises(AlignServerError, match="larger than 1000 bytes"):
                ask(server.rest_port, "rest", np.ones((100, 4)))
            page = f"http://127.0.0.1:{server.rest_port}/monitoring/prometheus/metrics"
            seen["metrics"] = urllib.request.urlopen(page, timeout=60).read()
            os.kill(os.getpid(), signal.SIGINT)

        wait(server, announce_and_stop)

    monkeypatch.setattr(ModelServer, "wait", asked_and_stopped)
    flags = ["--model-config-file", MODELS, "--grpc-port", "0", "--rest-port", "0"]
    flags += ["--enable-batching", "--batching-parameters-file", SERVING / "batching.config"]
    flags += ["--monitoring-config-file", SERVING / "monitoring.config"]
    code, out, err = run(capsys, "serve", *flags, "--max-request-bytes", "1000")
    assert (code, out) == (0, "")
    assert b"wrapped_run_count" in seen.pop("metrics")
    assert seen == {"REST": (1, 3), "gRPC": (1, 3)}
    first, *_, last = err.splitlines()
    assert first.startswith("Serving probe (versions 1, 2): gRPC at 127.0.0.1:")
    assert last == "Stopping ..."


@pytest.mark.slow
def test_quickstart_keeps_serving_until_it_is_stopped(tmp_path):
    pytest.importorskip("tensorflow_serving")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "align_tf.cli",
            "quickstart",
            "--keep-serving",
            "--output",
            os.fspath(tmp_path),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = next(line for line in process.stdout if "curl" in line)
        url = next(word for word in line.split() if word.startswith("http"))
        status = urllib.request.urlopen(url.removesuffix(":predict"), timeout=30).read()
        assert b"AVAILABLE" in status
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


def test_classify_accepts_any_picture_file(capsys, tmp_path):
    path = tmp_path / "gray.jpg"
    Image.fromarray(np.full((30, 300), 128, np.uint8)).save(path)
    code, out, _ = run(capsys, "classify", path, "--json", "--labels", "", "a gray square")
    assert code == 0
    assert len(json.loads(out)[0]["probs"]) == 2


@pytest.mark.parametrize("command", [["serve", "models"], ["quickstart"]])
def test_an_absent_extra_names_the_pip_command(capsys, absent, command):
    absent("tensorflow_serving", "align_tf.server")
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and 'pip install "align-tf[serve]"' in last
