"""The notebooks run from top to bottom at small size, and find what they should.

That takes minutes, so it is done where ALIGN_TF_NOTEBOOKS=1 asks for it.
"""

import json
import math
import os
import pathlib
import re

import PIL.Image
import PIL.ImageOps
import pytest
from markdown_it import MarkdownIt  # which rich shows Markdown by
from quick_xla import xla_flags

from align_tf import AlignModel
from align_tf.hub import BUNDLED

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))

executed = pytest.mark.skipif(
    os.environ.get("ALIGN_TF_NOTEBOOKS") != "1", reason="ALIGN_TF_NOTEBOOKS=1 runs the notebooks"
)

# XLA's optimisations take longer than the few steps here.
DEVICES = 2  # of the CPU, for the notebook that trains on all there are


def run(name: str, folder: pathlib.Path, **settings: str) -> dict:
    """Executes a notebook in a folder.

    Returns:
        What its cell tagged `results` prints, and as `pictures` how many were drawn.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(folder)}}
    )
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "MODEL": "align-tiny"}
    client.execute(env={**environment, **quiet, **settings})
    (cell,) = [c for c in notebook.cells if "results" in c.metadata.get("tags", ())]
    outputs = [output for c in notebook.cells for output in c.get("outputs", ())]
    pictures = sum("image/png" in output.get("data", ()) for output in outputs)
    return {**json.loads(cell.outputs[-1].text), "pictures": pictures}


def code_cells(path: pathlib.Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_text_reads_as_text_below_its_heading(path):
    """The blocks of each cell of text, as a Markdown parser finds them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = []
    for cell in cells:
        if cell["cell_type"] == "markdown":
            tokens = MarkdownIt().parse("".join(cell["source"]))
            found.append([t.tag for t in tokens if t.level == 0 and t.nesting == 1])
            assert not [t.content for t in tokens if t.content.startswith("#")]
    assert [tag for blocks in found for tag in blocks if tag == "h1"] == ["h1"] == found[0][:1]
    for blocks in found:
        assert sum(tag in ("h1", "h2", "h3") for tag in blocks) <= 1, blocks
    assert sum("p" in blocks for blocks in found) > len(found) / 2


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    for cell in code_cells(path):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_all_notebooks_install_the_package_alike():
    assert len(ALL) == 5
    installs = ["".join(code_cells(path)[0]["source"]) for path in ALL]
    assert len({re.sub(r"\[\w+\]", "", install) for install in installs}) == 1  # but for the extra


@executed
def test_zero_shot(tmp_path):
    found = run("zero_shot", tmp_path)
    assert found["winner"] == "a picture of a panda"
    assert sum(found["probs"]) == pytest.approx(1.0)
    assert found["right"] == [True] * 6
    assert found["top1"]["an ensemble"] >= 5 / 6
    assert set(found["query"][:2]) == {"panda", "rose"}
    assert found["pictures"] == 3


@executed
def test_serving(tmp_path):
    found = run("serving", tmp_path, REQUESTS="4")
    assert found["labels"] == found["expected"]
    assert found["grpc_minus_rest"] < 1e-6
    assert found["plain_minus_rest"] < 1e-6
    assert found["merged_minus_alone"] < 1e-5
    assert found["grpc_minus_keras"] < 1e-4
    for name in ("serving_default", "embed_image", "embed_text", "embed_pixels", "embed_tokens"):
        assert f'"{name}"' in found["signatures"]
    assert found["requests"] == [4] * 5
    assert min(found["throughputs"]) > 0
    assert found["pictures"] == 1


@executed
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_finetune_tpu(tmp_path, backend):
    settings = {"BATCH_SIZE": "16", "EPOCHS": "3", "STEPS_PER_EPOCH": "5", "LEARNING_RATE": "5e-3"}
    found = run(
        "finetune_tpu", tmp_path, KERAS_BACKEND=backend, XLA_FLAGS=xla_flags(DEVICES), **settings
    )
    assert found["backend"] == backend
    assert found["buckets"] == [12, 32]
    if backend == "jax":
        assert found["devices"] == DEVICES
        assert found["compilations_of_buckets"] == 2
        assert found["compilations"] == 1
    assert found["strings_in_a_batch"] == 0
    assert found["interrupted"]
    assert (found["resumed_from"], found["steps"]) == (5, 15)
    assert found["resumed_minus_unbroken"] == 0.0
    assert found["loss"][-1] < found["loss"][0] - 0.1
    for figure in ("r5_i2t", "r5_t2i"):
        assert found["after"][figure] > found["before"][figure] + 0.1
    assert max(found["exported_minus_here"].values()) < 1e-5
    assert found["pictures"] == 2


def write_pairs(folder: pathlib.Path, pairs: list[tuple[PIL.Image.Image, str]]) -> None:
    folder.mkdir()
    for row, (image, caption) in enumerate(pairs):
        image.save(folder / f"{row:03}.png")
        (folder / f"{row:03}.txt").write_text(caption)


@executed
def test_adapt(tmp_path):
    """Colors and turns of pictures are learned, which costs the names of what they show."""
    examples = {
        path.stem.replace("_", " "): PIL.Image.open(path).convert("RGB")
        for path in sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))
    }
    colors, turns = ("red", "green", "blue", "yellow"), ("up", "left", "down", "right")
    learned = [
        (
            PIL.ImageOps.colorize(image.convert("L"), color, "white").rotate(90 * quarter),
            f"{color} {turn}",
        )
        for color in colors
        for quarter, turn in enumerate(turns)
        for image in examples.values()
    ]
    hard = (PIL.ImageOps.flip, PIL.ImageOps.grayscale, lambda image: PIL.ImageOps.crop(image, 18))
    kept = [(change(image), name) for change in hard for name, image in examples.items()]
    write_pairs(tmp_path / "pairs", learned)
    write_pairs(tmp_path / "others", kept)
    settings = {"DATA": "pairs", "KEEP": "others", "STEPS": "120", "BATCH_SIZE": "16"}
    settings |= {"LEARNING_RATE": "7e-4", "LORA_RATE": "4e-3"}  # too high: more is forgotten
    found = run("adapt", tmp_path, KERAS_BACKEND="tensorflow", **settings)
    before, full, lora = (found[name] for name in ("before", "full", "LoRA"))
    assert min(full["r1"], lora["r1"]) > before["r1"] + 0.1
    assert full["top1"] < before["top1"] - 0.1
    assert lora["trained"] < full["trained"] / 5
    # A line goes from the one to the other, and that chosen is the best of it.
    for name, better in (("full", 0.03), ("LoRA", 0.0)):
        line = found[f"{name} between"]
        ends = [[of["r1"], of["top1"]] for of in (before, found[name])]
        assert [line["curve"][0], line["curve"][-1]] == [pytest.approx(end) for end in ends]
        means = [(r1 + top1) / 2 for r1, top1 in line["curve"]]
        assert max(means) == pytest.approx((line["r1"] + line["top1"]) / 2)
        assert max(means) >= max(means[0], means[-1]) + better
    assert found["pictures"] == 2
    for folder in ("full", "between", "adapter"):
        AlignModel.from_pretrained(tmp_path / folder)


@executed
def test_train_from_scratch(tmp_path):
    found = run("train_from_scratch", tmp_path, STEPS="20", TRIAL_STEPS="5", BATCH_SIZE="48")
    losses = found["main"]["loss"]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.1
    # Four parts take the step of the whole batch, and it is a step.
    assert found["moved"] > 1e-4
    assert found["accumulated_minus_whole"] < found["moved"] / 100
    trials = found["trials"]
    assert len(trials) == 5
    assert all(math.isfinite(loss) for trial in trials.values() for loss in trial["loss"])
    assert trials["temperature fixed at 1"]["temperature"] == 1.0
    assert trials["temperature from 1"]["temperature"] != 1.0
    assert found["pictures"] == 3
