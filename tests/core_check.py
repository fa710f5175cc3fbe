"""The core install with the oldest of all it needs: load, train, export and classify align-tiny.

`.ci/run` runs it in an environment without the extras, and its first test in one with them; pytest
does not collect it by itself.
"""

import collections
import importlib.metadata
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from align_tf import AlignModel, AlignProcessor, export_saved_model
from align_tf.data import make_dataset, write_tfrecords
from align_tf.hub import BUNDLED

PICTURES = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))
CAPTIONS = [f"a picture of a {path.stem.replace('_', ' ')}" for path in PICTURES]


def test_what_is_installed_is_the_oldest():
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    installed = {canonicalize_name(name): version for name, version in installed.items()}
    oldest, with_extras = collections.defaultdict(set), "pyarrow" in installed
    for requirement in map(Requirement, importlib.metadata.requires("align-tf")):
        floors = [of.version for of in requirement.specifier if of.operator == ">="]
        assert floors or requirement.marker, f"{requirement} has no floor"
        if with_extras or not requirement.marker:
            oldest[canonicalize_name(requirement.name)] |= set(map(Version, floors))
    found = {
        name: Version(installed[name]) for name in oldest if oldest[name] and name in installed
    }
    assert {"tensorflow", "keras", "numpy", "pillow", "huggingface-hub"} <= set(found)
    assert {name: version for name, version in found.items() if version not in oldest[name]} == {}


def test_no_extra_is_installed():
    installed = {found.name.lower() for found in importlib.metadata.distributions()}
    assert installed.isdisjoint({"jax", "torch", "grpcio-tools", "scikit-learn", "pyarrow"})


def test_a_trained_model_is_exported_and_classifies(tmp_path):
    model = AlignModel.from_pretrained("align-tiny")
    processor = AlignProcessor.from_pretrained("align-tiny")
    write_tfrecords(zip(PICTURES, CAPTIONS, strict=True), tmp_path / "pairs")
    dataset = make_dataset(tmp_path / "pairs", processor, batch_size=3, training=True)
    before = model.get_weights()
    model.compile(optimizer=keras.optimizers.AdamW(1e-5))
    history = model.fit(dataset, steps_per_epoch=3, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))

    outputs = model(processor(images=PICTURES, text=CAPTIONS, padding="longest"))
    expected = tf.nn.softmax(outputs.logits_per_image).numpy()
    version = export_saved_model(model, processor, tmp_path / "align")
    classify = tf.saved_model.load(str(version)).signatures["serving_default"]
    image_bytes = tf.constant([path.read_bytes() for path in PICTURES])
    found = classify(image_bytes=image_bytes, labels=tf.constant([CAPTIONS] * len(PICTURES)))
    np.testing.assert_allclose(found["probs"].numpy(), expected, atol=1e-5)
    assert found["probs"].numpy().argmax(axis=1).tolist() == list(range(len(PICTURES)))


def test_the_command_classifies(tmp_path):
    command = [sys.executable, "-m", "align_tf.cli", "classify", str(PICTURES[0]), "--json"]
    command += ["--labels", *CAPTIONS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f'"{CAPTIONS[0]}": 0.' in done.stdout or f'"{CAPTIONS[0]}": 1.0' in done.stdout
