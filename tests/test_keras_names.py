"""Keras loads what it saved of align_tf where `import align_tf` stands alone."""

import subprocess
import sys

import keras
import pytest

from align_tf import keras_names


def test_all_registered_classes_are_announced():
    for module in set(keras_names.CLASSES.values()):
        __import__(module)
    known = keras.saving.get_custom_objects()
    registered = {name for name in known if name.startswith(f"{keras_names.PACKAGE}>")}
    assert registered == {f"{keras_names.PACKAGE}>{name}" for name in keras_names.CLASSES}
    for name, module in keras_names.CLASSES.items():
        assert known[f"{keras_names.PACKAGE}>{name}"].__module__ == module


@pytest.mark.slow  # the import of another process
def test_keras_loads_a_compiled_model_by_name(model, tmp_path):
    from align_tf.training import make_optimizer

    path = tmp_path / "model.keras"
    copy = type(model).from_config(model.get_config())
    copy.compile(optimizer=make_optimizer(copy, total_steps=10))
    copy.save(path)
    script = (
        "import align_tf, keras\n"
        f"model = keras.saving.load_model({str(path)!r})\n"
        "print(type(model).__name__, type(model.optimizer).__name__)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout == "AlignModel Lamb\n", shown.stderr
