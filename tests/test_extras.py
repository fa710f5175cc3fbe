"""Absent extras: one line for each, with the pip command that brings what is needed."""

import configparser
import importlib
import pathlib
import re
import sys
import types

import numpy as np
import pytest

from align_tf import plots
from align_tf.checkpoints import tensors
from align_tf.cli.main import main
from align_tf.data import readers
from align_tf.evaluation import nearest_neighbors
from align_tf.hub import BUNDLED
from align_tf.search import collection, demo, index, ray_engine
from align_tf.training import recipe

ROOT = pathlib.Path(__file__).parents[1]
EMBEDS = np.eye(4, dtype=np.float32)


# absent package: what asks for it, given a folder with a.parquet and pytorch_model.bin; the line
ABSENT = [
    (
        "torch",
        lambda folder: tensors.read_header(folder / "pytorch_model.bin"),
        'pytorch_model.bin needs PyTorch to be read: pip install "align-tf[torch]"',
    ),
    (
        "pyarrow.parquet",
        lambda folder: readers.open_source(folder / "a.parquet"),
        'a.parquet needs pyarrow to be read: pip install "align-tf[data]"',
    ),
    (
        "pyarrow.parquet",
        lambda folder: collection.Collection(folder),
        'a collection needs pyarrow: pip install "align-tf[data]"',
    ),
    (
        "ray",
        lambda folder: next(
            ray_engine.write_shards((folder, None, None), None, folder, 1, [0], 1, print)
        ),
        'engine="ray" needs Ray: pip install "align-tf[ray]"',
    ),
    (
        "faiss",
        lambda folder: index.build_index(folder, folder / "index"),
        'an index needs FAISS: pip install "align-tf[search]"',
    ),
    (
        "faiss",
        lambda folder: index.Index(folder),
        'an index needs FAISS: pip install "align-tf[search]"',
    ),
    (
        "gradio",
        lambda folder: demo.build_page(None, None, "align-tiny"),
        'the demo needs Gradio: pip install "align-tf[demo]"',
    ),
    (
        "sklearn",
        lambda folder: nearest_neighbors.knn_metrics(EMBEDS, range(4), EMBEDS, range(4), k=1),
        'kNN and the linear probe need scikit-learn: pip install "align-tf[eval]"',
    ),
    (
        "sklearn",
        lambda folder: plots.embeddings(EMBEDS, "abcd"),
        'a plot of embeddings needs scikit-learn: pip install "align-tf[plot]"',
    ),
    (
        "matplotlib",
        lambda folder: plots.curves([{"step": 1, "loss": 2.0}]),
        'a plot needs matplotlib: pip install "align-tf[plot]"',
    ),
    (
        "tensorboard",
        lambda folder: recipe.check_extras(
            recipe.Recipe(model="m", data="d", output="o", steps=1, tensorboard=True)
        ),
        'tensorboard: true needs TensorBoard: pip install "align-tf[tensorboard]"',
    ),
    (
        "wandb",
        lambda folder: recipe.check_extras(
            recipe.Recipe(model="m", data="d", output="o", steps=1, wandb=True)
        ),
        'wandb: true needs Weights & Biases: pip install "align-tf[wandb]"',
    ),
    (
        "mlflow",
        lambda folder: recipe.check_extras(
            recipe.Recipe(model="m", data="d", output="o", steps=1, mlflow=True)
        ),
        'mlflow: true needs MLflow: pip install "align-tf[mlflow]"',
    ),
    (
        "mteb",
        lambda folder: importlib.import_module("align_tf.evaluation.mteb"),
        'a model for MTEB needs mteb: pip install "align-tf[mteb]"',
    ),
    (
        "torch",
        lambda folder: importlib.import_module("align_tf.evaluation.clip_benchmark"),
        'CLIP_benchmark needs extra packages: pip install "align-tf[clip-benchmark]"',
    ),
    *(
        (
            package,
            lambda folder: importlib.import_module("align_tf.server.model_server"),
            'the server needs extra packages: pip install "align-tf[serve]"',
        )
        for package in ("grpc", "grpc_health", "starlette", "uvicorn", "tensorflow_serving")
    ),
]


@pytest.mark.parametrize(("package", "ask", "line"), ABSENT)
def test_an_absent_package_is_a_line_with_the_pip_command(package, ask, line, tmp_path, absent):
    absent(package, "align_tf.server")
    (tmp_path / "a.parquet").touch()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(line)}$") as error:
        ask(tmp_path)
    assert error.value.name.startswith(package)


# absent package: what is asked of the command line; the extra that the one line names
EARLY = [
    ("faiss", "search index red", "search"),
    ("faiss", "index embeds --output index", "search"),
    ("faiss", "demo", "search"),
    ("pyarrow.parquet", "search index red", "data"),
    ("pyarrow.parquet", "embed {folder} --output embeds", "data"),
    ("ray", "embed {folder} --output embeds --engine ray", "ray"),
    ("gradio", "demo", "demo"),
    ("matplotlib", "plot heatmap --images {image} --texts a --output a.png", "plot"),
    ("matplotlib", "plot curves log --output a.png", "plot"),
    ("matplotlib", "evaluate --task zero-shot --data {folder} --plot a.png", "plot"),
    ("sklearn", "plot embeddings embeds --output a.png", "plot"),
    ("sklearn", "evaluate --task knn --data {folder}", "eval"),
]


@pytest.mark.parametrize(("package", "command", "name"), EARLY)
def test_it_is_told_before_anything_else(package, command, name, absent, capsys, monkeypatch):
    absent(package)
    if package != "gradio":  # which comes with an environment of its own
        monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    examples = BUNDLED["align-tiny"] / "examples"
    words = command.format(folder=examples, image=examples / "panda.png").split()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("align-tf: error:") and f'pip install "align-tf[{name}]"' in line


def test_each_extra_that_is_named_is_one_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = set()
    for file in (ROOT / "align_tf").rglob("*.py"):
        named.update(re.findall(r'\bextra\("([\w-]+)"', file.read_text(encoding="utf-8")))
    assert (
        {"serve", "search", "ray", "torch", "plot"} <= named <= set(setup["options.extras_require"])
    )
