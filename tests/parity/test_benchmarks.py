"""The benchmarks run at tiny sizes, and say of each aim whether it was met."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)
for package in ("torch", "transformers", "tensorflow_serving", "matplotlib"):
    pytest.importorskip(package)

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def side_by_side():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import side_by_side as module
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_a_ratio_is_that_of_the_rounds_and_of_the_best_peer(side_by_side):
    rows = side_by_side.to_rows({"ours": [1.0, 2.0, 4.0], "a": [2.0, 6.0, 8.0], "b": [9.0] * 3})
    assert [row["seconds"] for row in rows] == [2.0, 6.0, 9.0]
    assert rows[1]["ratio"] == 0.5  # of 1/2, 1/3, 1/2
    assert side_by_side.throughput({"rows": rows}, "ours", ["a", "b"]) == 2.0


def test_an_aim_is_met_or_missed(side_by_side):
    assert side_by_side.aim("x", 1.5, at_least=1.5)["met"]
    missed = side_by_side.aim("ours by theirs", 1.3, at_most=1.2)
    assert side_by_side.describe(missed) == "MISSED: ours by theirs: 1.3 (at most 1.2)"


def test_operations_are_those_of_the_layers(side_by_side):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import models
    finally:
        sys.path.remove(str(BENCHMARKS))
    config = models.make_config(quick=False)
    # EfficientNet-B7 at 600 pixels: 37 billion multiply-adds (arXiv 1905.11946, table 2), its
    # top convolution and classifier among them: 19 * 19 * 640 * 2560 + 2560 * 1000.
    top = 19 * 19 * 640 * 2560 + 2560 * 1000
    assert models.image_flops(config.vision_config, 600) / 2 + top == pytest.approx(37e9, rel=0.05)
    # 12 layers of 768 by 3072 hold 85 million weights, each used once a token.
    assert models.text_flops(config.text_config, 1) / 2 == pytest.approx(85e6, rel=0.01)


# Nobody ships the programs, and even so they take minutes: a weekly job runs them.
programs = pytest.mark.skipif(
    os.environ.get("ALIGN_TF_BENCHMARKS") != "1", reason="ALIGN_TF_BENCHMARKS=1 runs the programs"
)


@programs
def test_the_programs_run(tmp_path):
    file = tmp_path / "figures.json"
    chosen = ["towers", "runtimes", "pipeline", "training", "start", "server", "growth"]
    command = [sys.executable, str(BENCHMARKS), "--quick", "--rounds", "1", "--json", str(file)]
    command += ["--only", ",".join(chosen)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == chosen
    aims = [
        aim for results in parts.values() for result in results for aim in result.get("aims", ())
    ]
    assert f"{sum(aim['met'] for aim in aims)} of {len(aims)} met" in done.stdout
    seconds = [
        row["seconds"]
        for results in parts.values()
        for result in results
        for row in result.get("rows", ())
    ]
    assert len(seconds) >= 15
    assert min(seconds) > 0


@programs
def test_the_profile_names_the_parts_of_a_step():
    command = [sys.executable, str(BENCHMARKS / "step_profile.py"), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    by_part, by_operation = json.loads(done.stdout)
    parts = {row[""] for row in by_part["table"]}
    assert {"optimizer", "text tower, backward", "image tower: BatchNorm, forward"} <= parts
    assert any("MatMul" in row[""] for row in by_operation["table"])


def test_an_unknown_part_is_named():
    command = [sys.executable, str(BENCHMARKS), "--only", "towers,towels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "towels: expected some of towers, " in done.stderr
