"""Fixtures that several tests share: a tiny ALIGN and its checkpoint, pairs for it, the goldens."""

import os

from quick_xla import QUICK_XLA

if os.environ.get("KERAS_BACKEND") == "jax":
    os.environ.setdefault("XLA_FLAGS", QUICK_XLA)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The same kernels on every processor, as the command line takes them: TensorFlow's own name other
# nodes in their errors than those that were recorded.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import collections
import contextlib
import gc
import pathlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import keras
import numpy as np
import pytest
import safetensors.numpy

from align_tf import AlignConfig, AlignImageProcessor, AlignModel, AlignProcessor, AlignTokenizer

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "model"
SERVING = pathlib.Path(__file__).parents[1] / "serving"


# Few tests that take long: pytest-xdist, which deals files out by their numbers of tests, would
# come to these at the end, one worker having work left and the other none.
LONGEST_FIRST = (
    *("training/test_hosts.py", "training/test_resuming.py", "test_readme.py", "cli/test_cli.py"),
    *("models/test_accumulation.py", "search/test_collection.py", "training/test_callbacks.py"),
    *("training/test_training_data.py", "server/test_repeated_labels.py", "server/test_fuzz.py"),
    *("evaluation/test_identity.py", "training/test_adapting.py", "test_serving_configs.py"),
    *("training/test_run.py", "data/test_left_out.py"),
)


# The rooms whose graphs read data: what Grappler makes of them is of no use to their tests.
READING = ("data", "search", "evaluation")


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files: those that take longest, then the others by their numbers of tests."""
    tests = pathlib.Path(__file__).parent
    counts = collections.Counter(item.path for item in items)
    ranks = {tests / name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), -counts[item.path], item.path))


@pytest.fixture(autouse=True, scope="module")
def settled() -> None:
    """Keras and tracing collect garbage often, which goes through all that is alive; most stays."""
    gc.set_threshold(10_000)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def quick_graphs(request) -> Iterator[None]:
    """Grappler takes long over graphs that run a few times; where data are read, it is left out.

    ALIGN_TF_GRAPPLER=1 leaves all as programs have it; `.ci/run` sets it for some.
    """
    as_in_programs = {"ALIGN_TF_GRAPPLER", "ALIGN_TF_RAY"}  # Ray's workers are such
    if request.path.parent.name not in READING or as_in_programs & os.environ.keys():
        yield
        return
    import tensorflow as tf

    make = tf.data.Options

    def options() -> tf.data.Options:
        made = make()
        made.experimental_optimization.apply_default_optimizations = False
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.data, "Options", options)
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        yield
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory) -> Iterator[None]:
    """Keeps the key of collections out of the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Has Ctrl-C come as in a terminal: a shell has its jobs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_config() -> AlignConfig:
    """Three blocks, two layers, 8 dimensions, weights of a trained model's size: not to be set."""
    return AlignConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 20,
            "max_position_embeddings": 16,
            "initializer_range": 0.3,
        },
        vision_config={
            "image_size": 16,
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3, 5],
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "strides": [1, 2],
            "num_block_repeats": [1, 2],
            "expand_ratios": [1, 2],
            "hidden_dim": 8,
            "initializer_range": 0.3,
        },
        projection_dim=8,
    )


@pytest.fixture(scope="session")
def processor() -> AlignProcessor:
    """For `tiny_config`: images of 16 pixels, and five words."""
    images = AlignImageProcessor(size=20, crop_size=16, max_image_pixels=1_000_000)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["red", "green", "blue", "a", "picture"]
    return AlignProcessor(images, AlignTokenizer([*special, *words]))


@pytest.fixture(scope="session")
def checkpoint(tiny_config, processor, tmp_path_factory) -> pathlib.Path:
    """A folder with a model of `tiny_config` and its processor: not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoint")
    keras.utils.set_random_seed(1)
    AlignModel(tiny_config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint) -> AlignModel:
    """The model of `checkpoint`: not to be trained."""
    return AlignModel.from_pretrained(checkpoint)


@pytest.fixture
def pairs() -> dict[str, np.ndarray]:
    """Four images and four texts; the last two texts are padded."""
    rng = np.random.default_rng(0)
    attention_mask = np.ones((4, 6), "int32")
    attention_mask[2:, 4:] = 0
    return {
        "pixel_values": rng.random((4, 16, 16, 3), "float32"),
        "input_ids": rng.integers(1, 40, (4, 6), "int32") * attention_mask,
        "attention_mask": attention_mask,
    }


@pytest.fixture
def golden(tmp_path: pathlib.Path) -> Callable:
    """Reads a golden: its arrays by name, and its model as a checkpoint folder."""

    def read(name: str) -> tuple[dict[str, np.ndarray], pathlib.Path]:
        with np.load(GOLDENS / f"{name}.npz") as file:
            arrays = dict(file)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(arrays["config"].item())
        prefix = "weights/"
        weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        return arrays, folder

    return read


# --- align-tiny, exported and served: once a worker -----------------------------------------


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory) -> pathlib.Path:
    """A folder named align with align-tiny's SavedModel, version 1: not to be written to.

    Without its warmup requests: a server would take as long as the export to run signatures that
    few tests ask for.
    """
    from align_tf import export_saved_model
    from align_tf.export.saved_model import WARMUP_NAME

    folder = tmp_path_factory.mktemp("models") / "align"
    model = AlignModel.from_pretrained("align-tiny")
    processor = AlignProcessor.from_pretrained("align-tiny")
    (export_saved_model(model, processor, folder) / "assets.extra" / WARMUP_NAME).unlink()
    return folder


@pytest.fixture(scope="session")
def tiny_server(tiny_export, tmp_path_factory) -> Iterator:
    """A running server of `tiny_export` that reads serving/'s files: labels, batching, metrics."""
    pytest.importorskip("tensorflow_serving")
    from align_tf.server import ModelServer
    from align_tf.server.batching import read_batching_parameters
    from align_tf.server.prometheus import read_monitoring_config

    config = tmp_path_factory.mktemp("config") / "models.config"
    text = (SERVING / "models.config").read_text()
    config.write_text(text.replace('"/models/', f'"{tiny_export.parent}/'))
    with ModelServer(
        None,
        model_config_file=config,
        batching=read_batching_parameters(SERVING / "batching.config"),
        metrics_path=read_monitoring_config(SERVING / "monitoring.config"),
    ) as server:
        yield server


# --- ports and packages ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def keep_port() -> Iterator[Callable[[], int]]:
    """Finds a port and keeps it: it refuses, and no one is given it but who asks for this one."""
    with contextlib.ExitStack() as kept:

        def keep() -> int:
            taken = kept.enter_context(socket.socket())
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", 0))
            return taken.getsockname()[1]

        yield keep


@pytest.fixture
def absent(monkeypatch) -> Callable[..., None]:
    """Makes a package one that is not installed, and has a package of ours import it anew."""

    def make(package: str, importer: str | None = None) -> None:
        for name in list(sys.modules):
            if importer and name.startswith(f"{importer}."):
                parent, _, last = name.rpartition(".")
                if last in vars(sys.modules[parent]):  # what imports it anew sets this too
                    monkeypatch.setattr(sys.modules[parent], last, sys.modules[name])
                monkeypatch.delitem(sys.modules, name)
            elif name.startswith(f"{package}."):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return make
