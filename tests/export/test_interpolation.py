"""`align-tf interpolate`: weights on the line between models, and a sweep that finds the best."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from keras import ops
from PIL import Image

from align_tf import AlignModel, AlignProcessor
from align_tf.cli.main import main
from align_tf.export.interpolation import Interpolation, sweep


def run(capsys, *arguments):
    code = main(["interpolate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """The checkpoint with 1 and with 3 added to the text projection's bias."""
    folders = []
    for added in (1, 3):
        folder = tmp_path_factory.mktemp("tuned") / str(added)
        shutil.copytree(checkpoint, folder)
        values = tensors(folder)
        values["text_projection.bias"] += added
        safetensors.numpy.save_file(values, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    return folders


@pytest.mark.parametrize(
    ("count", "options", "added"),
    [
        (1, (), 0.5),
        (1, ("--alpha", "0.25"), 0.25),
        (1, ("--alpha", "-1"), -1.0),
        (2, ("--alpha", "1"), 2.0),
        (2, (), 1.0),
    ],
)
def test_weights_are_on_the_line(count, options, added, checkpoint, tuned, capsys, tmp_path):
    output = tmp_path / "between"
    code, out, _ = run(capsys, checkpoint, *tuned[:count], "--output", output, *options)
    assert (code, out) == (0, f"{output}\n")
    before, after = tensors(checkpoint), tensors(output)
    assert before.keys() == after.keys()
    for name, value in before.items():
        wanted = value + (added if name == "text_projection.bias" else 0)
        np.testing.assert_allclose(after[name], wanted, rtol=1e-6, atol=1e-6)
    assert AlignProcessor.from_pretrained(output).tokenizer.vocab_size == 10


def test_weights_that_are_no_numbers_are_told(checkpoint, tuned, capsys, tmp_path):
    code, _, err = run(capsys, checkpoint, tuned[0], "--output", tmp_path / "x", "--alpha", "1e39")
    said = "align-tf: error: --alpha 1e+39: text_projection/bias is no longer finite; expected less"
    assert (code, err.splitlines()[-1]) == (2, said)
    code, _, err = run(capsys, checkpoint, tuned[0], "--output", tmp_path / "x", "--alpha", "1e30")
    said = "align-tf: error: --alpha 1e+30: text_projection/bias is no longer finite; expected less"
    assert (code, err.splitlines()[-1]) == (2, said)
    colder = tmp_path / "colder"
    shutil.copytree(tuned[0], colder)
    values = tensors(colder)
    values["temperature"] /= 2
    safetensors.numpy.save_file(values, colder / "model.safetensors", {"format": "pt"})
    code, _, err = run(capsys, checkpoint, colder, "--output", tmp_path / "x", "--alpha", "3")
    said = "align-tf: error: --alpha 3.0: temperature falls below 0; expected nearer to 0 and 1"
    assert (code, err.splitlines()[-1]) == (2, said)
    broken = tmp_path / "broken"
    shutil.copytree(tuned[0], broken)
    values = tensors(broken)
    values["text_projection.bias"][0] = np.nan
    safetensors.numpy.save_file(values, broken / "model.safetensors", {"format": "pt"})
    code, _, err = run(capsys, checkpoint, broken, "--output", tmp_path / "x")
    said = f"align-tf: error: {broken}: text_projection/bias holds a NaN or an infinity: expected n"
    assert (code, err.splitlines()[-1][: len(said)]) == (2, said)
    assert not (tmp_path / "x").exists()


def test_an_adapter_counts_as_the_model_that_it_makes(checkpoint, pairs, tmp_path):
    model = AlignModel.from_pretrained(checkpoint)
    model.enable_lora(2)
    for weight in model.trainable_weights:
        weight.assign(np.random.default_rng(0).normal(0, 0.3, weight.shape))
    expected = ops.convert_to_numpy(model(pairs).logits_per_image)
    model.save_adapter(tmp_path / "adapter")
    line = Interpolation(str(checkpoint), [str(tmp_path / "adapter")])
    line.move(1.0)
    found = ops.convert_to_numpy(line.model(pairs).logits_per_image)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    line.move(0.0)
    plain = ops.convert_to_numpy(AlignModel.from_pretrained(checkpoint)(pairs).logits_per_image)
    found = ops.convert_to_numpy(line.model(pairs).logits_per_image)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)


def test_a_sweep_stays_at_the_highest_mean(checkpoint, tuned):
    line = Interpolation(str(checkpoint), [str(tuned[0])])
    bias = line.model.text_projection.bias
    start = float(bias[0]) - 1  # of the fine-tuned one, whose weights the model has at first

    def near(alpha):
        return lambda: 1 - (float(bias[0]) - start - alpha) ** 2

    rows, best = sweep(line, [0, 0.25, 0.5, 1], [near(0.0), near(0.6)])
    assert [row["alpha"] for row in rows] == [0, 0.25, 0.5, 1]
    np.testing.assert_allclose(rows[1]["figures"], [0.9375, 0.8775], atol=1e-5)
    assert best == 0.25
    assert float(bias[0]) - start == pytest.approx(best, abs=1e-5)


@pytest.mark.slow
def test_the_command_sweeps(checkpoint, tuned, capsys, tmp_path):
    (tmp_path / "pairs").mkdir()
    for name in ("red", "green", "blue"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        color = tuple(255 * (name == other) for other in ("red", "green", "blue"))
        Image.new("RGB", (20, 20), color).save(tmp_path / "classes" / name / "picture.png")
        Image.new("RGB", (20, 20), color).save(tmp_path / "pairs" / f"{name}.png")
        (tmp_path / "pairs" / f"{name}.txt").write_text(f"a {name} picture")
    pairs, classes, output = tmp_path / "pairs", tmp_path / "classes", tmp_path / "best"
    options = ["--sweep", "--data", pairs, "--data", classes, "--output", output]
    options += ["--task", "retrieval", "--task", "zero-shot", "--plot", tmp_path / "sweep.png"]
    code, out, err = run(capsys, checkpoint, tuned[1], *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["data"] == [str(pairs), str(classes)]
    assert [row["alpha"] for row in found["rows"]] == [step / 10 for step in range(11)]
    means = {row["alpha"]: sum(row["figures"]) for row in found["rows"]}
    assert means[found["best"]] == max(means.values())
    assert Image.open(tmp_path / "sweep.png").width > 500
    wanted = tensors(checkpoint)["text_projection.bias"] + 3 * found["best"]
    np.testing.assert_allclose(tensors(output)["text_projection.bias"], wanted, rtol=1e-5)


MISTAKES = {
    "--data: of no use without --sweep": ["--data", "x"],
    "--plot: of no use without --sweep": ["--plot", "x.png"],
    "--sweep: expected --data, what to measure on": ["--sweep"],
    "--alpha: of no use to --sweep, which finds it": ["--sweep", "--alpha", "1"],
    "--alpha nan: expected a number": ["--alpha", "nan"],
    "--task: 2 of them, expected one or 1": [
        *("--sweep", "--data", "x", "--task", "retrieval", "--task", "zero-shot"),
    ],
}


@pytest.mark.parametrize(("message", "options"), MISTAKES.items())
def test_options_that_do_not_go_together_are_told(message, options, capsys, tmp_path):
    code, _, err = run(capsys, "none", "none", "--output", tmp_path / "out", *options)
    assert (code, err) == (2, f"align-tf: error: {message}\n")


def test_models_that_are_not_of_one_line_are_told(checkpoint, tuned, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    vocab = (other / "vocab.txt").read_text()
    (other / "vocab.txt").write_text(vocab.replace("green", "black"))
    code, _, err = run(capsys, other, tuned[0], "--output", tmp_path / "out")
    assert code == 2
    assert f"{other}: another vocabulary than that of {tuned[0]}: expected the same" in err
    code, _, err = run(capsys, "align-tiny", tuned[0], "--output", tmp_path / "out")
    assert code == 2
    assert f"align-tiny: projection_dim=192, of {tuned[0]} 8: expected models that differ in" in err
    code, _, err = run(capsys, checkpoint, tuned[0], "--output", other)
    assert (code, f"{other}: it is there already; expected a new folder" in err) == (2, True)
    assert not (tmp_path / "out").exists()
